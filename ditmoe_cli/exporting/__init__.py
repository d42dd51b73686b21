"""Layouts of other programs: checkpoints as these read them."""
