"""Drawn scenes with captions, their grader, and the recipe of the small teacher in configs/teachers/shapes."""
