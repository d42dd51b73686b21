"""Bytes on disk: names, headers, readers and writers. No modelling."""
