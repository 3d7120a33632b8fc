"""What harvest and train both stand on. Nothing here imports torch."""
