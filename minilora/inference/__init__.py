"""Using a trained model: `generate` samples from it, `evaluate` holds its answers against the exact scorers."""
