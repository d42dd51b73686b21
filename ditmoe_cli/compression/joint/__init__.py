"""Structure and bits from one budget."""
