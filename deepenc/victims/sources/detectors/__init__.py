"""Detectors with their images, one victim a file."""
