"""Calibration tokens replayed through blocks, and the errors that changes make there."""
