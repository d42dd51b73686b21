"""Collect routing statistics while a model samples."""
