"""A run on disk: its folder, checkpoints, and everything that is made from a fitted model."""
