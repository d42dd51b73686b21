"""Scores of images: one a file, each computed as the program that defines it does."""
