"""Wan's autoencoder for one frame, as the 2D network that it is."""
