"""Checkpoints trained to be sampled in few steps."""
