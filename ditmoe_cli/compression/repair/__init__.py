"""Repairs without training: what makes up for experts that were dropped or changed."""
