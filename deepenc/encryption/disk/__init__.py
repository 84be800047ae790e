"""Encrypted networks on disk."""
