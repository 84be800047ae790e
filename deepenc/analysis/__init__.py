"""What weights and activations give away: used by attacks, and by defenses that hide from them."""
