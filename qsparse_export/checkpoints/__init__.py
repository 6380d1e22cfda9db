"""Checkpoint readers: one module per format."""
