"""Follow channels through the operators that a network runs."""
