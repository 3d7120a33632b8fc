"""Speed beside peers and limits: `make bench`, see __main__.py."""
