"""The trainer and its state."""

from .config import ConfigError, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from .launch import launch

__all__ = ["ConfigError", "EvaluateConfig", "OptimConfig", "RunConfig", "TrainConfig", "launch"]
