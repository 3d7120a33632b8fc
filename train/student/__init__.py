"""Wan-Lite, and how it is cut from a teacher."""
