"""Training of checkpoints on what an original predicts: states, targets and the loop, apart from each other."""
