"""Report what a routing profile shows: numbers, figures, one page."""
