"""Built-in defenses: placements, weights, hardenings, and the presets they make."""
