"""Quantisation: how many bits each weight keeps."""
