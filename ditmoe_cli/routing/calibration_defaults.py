"""The settings of a plain calibration run, for the command and for planners that profile by themselves."""

IMAGES = 64
STEPS = 20
BINS = 10
RESERVOIR = 20_480  # tokens per block
BATCH = 32
