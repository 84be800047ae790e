"""Where victims come from; one kind a file."""
