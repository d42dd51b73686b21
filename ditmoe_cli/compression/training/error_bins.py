"""How many step bins errors of training are told by. Torch-free."""

BINS = 10
