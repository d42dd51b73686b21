"""Schedules of compute: what each block computes in each evaluation, by the methods of others or by a program."""
