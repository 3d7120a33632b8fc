"""A teacher's folder into memory, once: what it holds, how it is read and checked, what it is by content."""
