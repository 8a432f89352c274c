"""Sources, view specifications, sample order and DALI pipelines.

    source = open_source(DataConfig(path="/imagenet/train"))
    loader = build_loader(source, views, micro_batch=64, accumulation=1, rank=0, world=1, seed=0, device="cuda")
    for batch in loader: ...

Nothing here imports the rest of the engine, and DALI is imported only to decode with it.
"""

from .batch import Batch, Loader
from .config import DataConfig
from .faults import DataError
from .loader import build_loader, evaluation_batches
from .source import Source
from .sources import open_source
from .views import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    HorizontalFlip,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
)

__all__ = [
    "Batch",
    "CenterCrop",
    "ColorJitter",
    "DataConfig",
    "DataError",
    "GaussianBlur",
    "HorizontalFlip",
    "Loader",
    "RandomGrayscale",
    "RandomResizedCrop",
    "Resize",
    "Solarize",
    "Source",
    "View",
    "build_loader",
    "evaluation_batches",
    "open_source",
]
