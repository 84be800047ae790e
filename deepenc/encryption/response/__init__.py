"""Equation 1: what confusion channels do to the outputs."""
