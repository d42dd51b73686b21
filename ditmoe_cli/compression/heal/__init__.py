"""Healing: a compressed checkpoint trained to predict as its original does, without data."""
