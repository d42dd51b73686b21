"""Experts as their mean plus compressed differences."""
