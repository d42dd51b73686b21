"""Linear algebra on experts: neurons, matching, means, ridge, low rank."""
