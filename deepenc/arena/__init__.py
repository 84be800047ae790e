"""Attack against defense."""
