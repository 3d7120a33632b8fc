"""Work on whole sets: check, mend, change the container, join, cut, compare, carry. Needs no teacher and no torch, but
for what asks the teacher again (repair, recompute, add_samples) and what draws (look)."""
