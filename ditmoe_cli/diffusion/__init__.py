"""Sampling: schedules, solvers, guidance, noise, the sampling loop, the VAE."""
