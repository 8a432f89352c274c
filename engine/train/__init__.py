"""The trainer and its state."""
