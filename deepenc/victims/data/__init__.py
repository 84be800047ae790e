"""Data sets, their parts, and the cache of what was trained on them."""
