"""Collecting a routing profile while a model samples."""
