"""A harvest at work: workers and their shares, the loop, what is written beside it, and what can go wrong."""
