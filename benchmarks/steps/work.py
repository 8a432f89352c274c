"""What a process of `child.py` is to run."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """Steps of one implementation."""

    family: str = "mae"
    """The method: `mae`, `moco_v3`, `simclr`, `dino`, `esvit` or `sit`."""
    implementation: str
    model: str
    batch: int
    """Images of a step, whatever the number of their views."""
    image_size: int = 224
    local_size: int = 96
    """Side of the small crops of DINO and EsViT in pixels."""
    prototypes: int = 65_536
    """Of each of their heads."""
    mask_ratio: float = 0.75
    """Share of the patches that MAE hides."""
    steps: int = 5
    """Timed steps."""
    warmup: int = 1
    """Steps between the first, which is timed apart, and the timed ones."""
    depth: int = 0
    """Blocks at most, of each network; 0 for the published numbers."""
    backend: str = "inductor"
    """Of `torch.compile`."""
    limit: int = 0
    """Bytes of data that the process may hold, 0 for no limit."""
