"""Making checkpoints smaller: planners, plans, and the one function that applies them."""
