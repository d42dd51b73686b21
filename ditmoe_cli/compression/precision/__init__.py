"""Plan precisions: a number format for each weight within a budget of bytes."""
