"""Tokenizers: networks that name the patches of an image, for methods that guess the names of hidden ones (BEiT).

Any codebook can serve: derive a configuration and a tokenizer. What a tokenizer knows are buffers. They are made ready
once, before the first step of a run (`Tokenizer.prepare`), and kept in its checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitrail.kernels import masked_patch_gather

from .dall_e import STRIDE, DallEEncoder

Samples: TypeAlias = Callable[[int], Iterator[Tensor]]
"""Gives so many images as a tokenizer will see them, in batches uint8 `[b, H, W, 3]`; the same ones in every call."""

CONVERT = "python -m vitrail.engine.interop.dall_e encoder.pkl dall_e_encoder.safetensors"


@dataclass(kw_only=True)
class TokenizerConfig(ABC):
    """A tokenizer; each kind derives its own."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Side of the square of pixels that a token stands for."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of different tokens."""

    @abstractmethod
    def build(self) -> Tokenizer:
        """Construct the tokenizer, which then waits for `prepare` or for the state of one that was prepared."""

    def missing(self) -> list[str]:
        """What it needs and does not find, each with its remedy."""
        return []


class Tokenizer(nn.Module, ABC):
    """Names patches."""

    ready = False
    """Whether there is anything in its buffers."""

    @torch.no_grad()
    def forward(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Name patches.

        Args:
            images: uint8 `[B, H, W, 3]`, H and W multiples of the stride.
            rows: which of the `B * L` patches to name, int64 `[R]`; None for all.

        Returns:
            int64 `[R]`, or `[B, L]`, patches row-major.

        Raises:
            RuntimeError: the tokenizer was never prepared.
        """
        if not self.ready:
            raise RuntimeError(f"{type(self).__name__} knows no tokens yet: call prepare, or load the state of a run")
        vectors = self.vectors(images)
        flat = vectors.flatten(0, 1)
        names = self.scores(flat if rows is None else flat.index_select(0, rows)).argmax(dim=-1)
        return names if rows is not None else names.view(vectors.shape[:2])

    @abstractmethod
    def vectors(self, images: Tensor) -> Tensor:
        """What is known of each patch before a token is chosen, `[B, L, K]`."""

    @abstractmethod
    def scores(self, vectors: Tensor) -> Tensor:
        """How well each token fits, `[R, K]` to `[R, vocabulary]`; the best one is chosen."""

    @abstractmethod
    def prepare(self, samples: Samples) -> None:
        """Fill the buffers: read a file, or look at images. Ends with `ready`."""

    @abstractmethod
    def flops(self, images: int, height: int, width: int, named: int) -> float:
        """Of naming `named` patches of each of so many images of that many pixels, two per multiply-accumulate."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.ready = True


@dataclass(kw_only=True)
class DallETokenizerConfig(TokenizerConfig):
    """The encoder of DALL-E's discrete autoencoder (arXiv 2102.12092), whose tokens BEiT was published with."""

    weights: Path | None = None
    """Its weights as .safetensors, made from OpenAI's encoder.pkl by `python -m vitrail.engine.interop.dall_e`."""

    @property
    def stride(self) -> int:
        """8 pixels."""
        return STRIDE

    @property
    def vocabulary(self) -> int:
        """8,192 tokens."""
        return 8192

    def build(self) -> DallETokenizer:
        """Construct the tokenizer without weights."""
        return DallETokenizer(self)

    def missing(self) -> list[str]:
        """The file of weights."""
        if self.weights is not None and self.weights.is_file():
            return []
        return [
            f"there are no weights of DALL-E's encoder at {self.weights}: convert OpenAI's encoder.pkl with "
            f"`{CONVERT}` and pass --method.tokenizer.weights, or take the recipe with a KMeansTokenizerConfig"
        ]


class DallETokenizer(Tokenizer):
    """The token is the largest logit of DALL-E's encoder, float16 on a GPU but for its last layer, as published."""

    def __init__(self, config: DallETokenizerConfig, encoder: DallEEncoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder or DallEEncoder()

    def vectors(self, images: Tensor) -> Tensor:
        """What the last layer reads, `[B, L, 2048]`."""
        dtype = self.encoder.blocks.get_buffer("input.b").dtype
        pixels = images.permute(0, 3, 1, 2).to(dtype) / 255  # channels last in memory
        with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
            return self.encoder.features(pixels).permute(0, 2, 3, 1).flatten(1, 2)

    def scores(self, vectors: Tensor) -> Tensor:
        """Logits `[R, 8192]`, float32."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.encoder.logits(vectors)

    def prepare(self, samples: Samples) -> None:
        """Read the file of weights.

        Raises:
            ValueError: there is none, or it holds other tensors than DALL-E's encoder.
        """
        missing = self.config.missing()
        if missing or self.config.weights is None:
            raise ValueError("; ".join(missing))
        found, wanted = load_file(self.config.weights), self.encoder.state_dict()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ValueError(
                f"{self.config.weights} does not hold DALL-E's encoder, but {len(found)} tensors of other names or "
                f"shapes ({', '.join(sorted(found)[:3])}, ...): convert encoder.pkl with `{CONVERT}`"
            )
        self.encoder.load_state_dict(found)
        self.ready = True

    def flops(self, images: int, height: int, width: int, named: int) -> float:
        """See `Tokenizer.flops`."""
        features, logits = self.encoder.flops(height, width)
        return images * (features + named * logits)


@dataclass(kw_only=True)
class KMeansTokenizerConfig(TokenizerConfig):
    """Typical patches of the training images themselves, found by k-means; needs no file."""

    patch_size: int = 8
    """Side of a patch in pixels of the tokenizer's image."""
    codes: int = 1024
    """Number of typical patches."""
    images: int = 2048
    """Training images whose patches are looked at."""
    contrast: float = 0.05
    """Added to a patch's standard deviation, in 0-1 units, before it is brought to one: what is flat stays flat."""
    seed: int = 0
    """Of the first guess."""

    @property
    def stride(self) -> int:
        """The patch's side."""
        return self.patch_size

    @property
    def vocabulary(self) -> int:
        """The number of typical patches."""
        return self.codes

    def build(self) -> KMeansTokenizer:
        """Construct the tokenizer without typical patches."""
        return KMeansTokenizer(self)


class KMeansTokenizer(Tokenizer):
    """The token is the nearest of a codebook of patches, all without their mean and at about the same contrast."""

    codebook: Tensor

    def __init__(self, config: KMeansTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codebook", torch.zeros(config.codes, 3 * config.patch_size**2))

    def vectors(self, images: Tensor) -> Tensor:
        """Normalised patches `[B, L, 3 P P]`."""
        side = self.config.patch_size
        length = (images.shape[1] // side) * (images.shape[2] // side)
        every = torch.arange(length, device=images.device).expand(images.shape[0], -1)
        pixels = masked_patch_gather(images, every, side, mean=(0.0,) * 3, std=(1.0,) * 3, dtype=self.codebook.dtype)
        std, mean = torch.std_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (std + self.config.contrast)

    def scores(self, vectors: Tensor) -> Tensor:
        """Closeness `[R, codes]`: minus half the squared distance, but for what all codes share."""
        with torch.autocast(vectors.device.type, enabled=False):
            return vectors @ self.codebook.T - self.codebook.square().sum(1) / 2

    def prepare(self, samples: Samples) -> None:
        """Find typical patches by mini-batches (Sculley, WWW 2010).

        Raises:
            ValueError: there are fewer patches than codes.
        """
        from sklearn.cluster import MiniBatchKMeans  # slow to import, and used once in a run

        config = self.config
        patches = torch.cat([self.vectors(images).flatten(0, 1).cpu() for images in samples(config.images)]).numpy()
        if len(patches) < config.codes:
            raise ValueError(
                f"{len(patches)} patches cannot give {config.codes} typical ones: raise tokenizer.images, or lower "
                "tokenizer.codes"
            )
        means = MiniBatchKMeans(config.codes, batch_size=4 * config.codes, n_init=1, random_state=config.seed)
        means.fit(patches)
        self.codebook.copy_(torch.from_numpy(means.cluster_centers_))
        self.ready = True

    def flops(self, images: int, height: int, width: int, named: int) -> float:
        """See `Tokenizer.flops`."""
        return 2.0 * images * named * self.codebook.numel()
