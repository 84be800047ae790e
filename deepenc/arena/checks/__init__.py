"""What a plugin must prove."""
