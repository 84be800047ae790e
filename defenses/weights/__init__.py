"""What confusion channels are filled with."""
