"""Samples turned into numbers: features, statistics, distances."""
