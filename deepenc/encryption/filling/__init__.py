"""What confusion channels are made of, and how they are trained."""
