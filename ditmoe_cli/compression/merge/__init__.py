"""Expert merging: which experts become one, and what that one is."""
