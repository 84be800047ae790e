"""Networks and data to attack."""
