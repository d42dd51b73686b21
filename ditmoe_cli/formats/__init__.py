"""Number formats: how weights are stored in fewer bits; one class a format, by name in `registry`."""
