"""Work on whole sets: check, mend, change the container, join, cut, compare, carry. Needs no teacher and no torch."""
