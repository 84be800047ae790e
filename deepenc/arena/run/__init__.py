"""Many duels, killed at any moment."""
