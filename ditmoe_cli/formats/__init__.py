"""Number formats: how weights are stored in fewer bits."""
