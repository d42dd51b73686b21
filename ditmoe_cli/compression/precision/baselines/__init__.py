"""Published methods of mixed precision, as baselines."""
