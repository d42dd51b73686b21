"""Expert pruning: which experts stay."""
