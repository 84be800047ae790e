"""Networks larger than memory, in folders of several files: one tensor at a time."""
