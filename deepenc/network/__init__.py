"""A network as something that can be widened."""
