"""How many confusion channels go where."""
