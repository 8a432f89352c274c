"""The trainer and its state."""

from .config import ConfigError, EvaluateConfig, GuardConfig, OptimConfig, RunConfig, TrainConfig, TrainingError
from .launch import launch

__all__ = [
    "ConfigError",
    "EvaluateConfig",
    "GuardConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "TrainingError",
    "launch",
]
