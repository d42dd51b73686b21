"""The embedded demo checkpoint, named ``demo:digits`` on the command line."""
