"""Means over keys and examples, and how far they can be trusted."""
