"""The training engine: models, methods, data, trainer, evaluation."""
