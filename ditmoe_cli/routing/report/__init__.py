"""Reports on a routing profile: numbers, figures, one page."""
