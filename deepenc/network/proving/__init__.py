"""Believe nothing: each site is proved before it is used."""
