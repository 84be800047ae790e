"""The paper's method: confusion channels, and the key that removes them."""
