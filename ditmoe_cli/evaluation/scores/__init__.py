"""Scores of images: one a file, each as the program that defines it takes it."""
