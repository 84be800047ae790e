"""What networks are for."""
