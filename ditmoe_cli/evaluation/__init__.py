"""Evaluation of checkpoints: samples, features, distances and other scores, comparison step by step, benchmark."""
