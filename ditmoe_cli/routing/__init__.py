"""How a checkpoint routes: collected into a profile, measured, reported."""
