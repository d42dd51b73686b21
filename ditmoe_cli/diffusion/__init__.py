"""From noise to images: schedules, guidance, solvers."""
