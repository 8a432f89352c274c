"""Vision transformers and their heads."""
