"""What is done to confusion channels after they were filled."""
