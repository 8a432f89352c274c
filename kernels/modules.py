"""The ops as modules."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .masked_patch_gather import masked_patch_gather
from .patches import CHANNELS, check_images, check_normalisation, patch_width
from .window_attention import window_attention

ALIGNMENT = 8  # values; 16 bytes of bf16, what cuBLAS's fast kernels and wide loads ask of a row


class PatchProjection(nn.Conv2d):
    """The patch-embedding convolution, applied to patches that are already vectors.

    A convolution whose stride is its kernel size is a linear map of patches. This one keeps the convolution's
    parameters, initialisation and state dict, and takes patch vectors in place of images.

    Args:
        patch_size: Side P of a patch in pixels.
        embed_dim: Output width D.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__(CHANNELS, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Projects patch vectors.

        Args:
            patches: [..., K] with K at least 3 P², in the order (row, column, channel); surplus columns are ignored.

        Returns:
            [..., D].
        """
        # Only here: a parameter may exist just while the module that owns it runs (DeepSpeed ZeRO-3).
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        weight = F.pad(weight, (0, patches.shape[-1] - weight.shape[1]))
        return F.linear(patches, weight, self.bias)


class MaskedPatchEmbed(nn.Module):
    """Patch embedding of the chosen patches only. Equals `nn.Conv2d` on normalised images, then indexing.

    The state-dict keys are `proj.weight` [D, 3, P, P] and `proj.bias` [D], as in timm and the official models.

    Args:
        image_size: Expected side, or (height, width), of the images in pixels; None accepts any.
        patch_size: Side P of a patch in pixels.
        embed_dim: Output width D.
        in_chans: Number of channels; only 3 exists.
        mean: Three channel means in 0-1 units, subtracted from uint8 (as value / 255) and floating images alike;
            None for images that are already normalised.
        std: Three channel standard deviations; given with `mean` or not at all.
        impl: Implementation of the gather: `auto`, `cuda`, `triton` or `reference`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int = 16,
        embed_dim: int = 768,
        in_chans: int = CHANNELS,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if in_chans != CHANNELS:
            raise ValueError(f"in_chans must be {CHANNELS}, got {in_chans}; use nn.Conv2d for other images")
        check_normalisation(mean, std)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self.image_size is not None and any(side % patch_size for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size={patch_size}")
        self.patch_size = patch_size
        self.mean, self.std, self.impl = mean, std, impl
        self.columns = -(-patch_width(patch_size) // ALIGNMENT) * ALIGNMENT
        self.proj = PatchProjection(patch_size, embed_dim)

    def extra_repr(self) -> str:
        """Returns what the submodule does not show."""
        return f"image_size={self.image_size}, mean={self.mean}, std={self.std}, impl={self.impl!r}"

    def forward(self, images: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds the patches.

        Args:
            images: [B, H, W, 3] or [B, 3, H, W], uint8 or floating.
            indices: [B, V] int64, row-major patch numbers; None for all patches in order.

        Returns:
            [B, V, D], in the autocast dtype under autocast, else in the parameters' dtype.

        Raises:
            ValueError: The images are not of the expected size.
        """
        rows, cols = check_images(images, self.patch_size)
        size = (rows * self.patch_size, cols * self.patch_size)
        if self.image_size is not None and size != tuple(self.image_size):
            raise ValueError(f"images are of size {size}, but this module was built for {tuple(self.image_size)}")
        if indices is None:
            indices = torch.arange(rows * cols, device=images.device).expand(images.shape[0], -1)
        autocast = torch.is_autocast_enabled(images.device.type)
        patches = masked_patch_gather(
            images,
            indices,
            self.patch_size,
            mean=self.mean,
            std=self.std,
            pad_to=self.columns,
            dtype=None if autocast else self.proj.weight.dtype,
            impl=self.impl,
        )
        projected: torch.Tensor = self.proj(patches)
        return projected


class QKVProjection(nn.Linear):
    """The joint projection to queries, keys and values, which also hands out what it makes of a token of zeros.

    Args:
        dim: Width C of the tokens.
        bias: Whether there is one.
    """

    def __init__(self, dim: int, bias: bool = True) -> None:
        super().__init__(dim, 3 * dim, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        """Projects [..., C] to [..., 3 C]; returns that and the bias [3 C], if there is one."""
        # Only here: a parameter may exist just while the module that owns it runs (DeepSpeed ZeRO-3).
        return super().forward(x), None if self.bias is None else self.bias.clone()


class WindowAttention(nn.Module):
    """Swin's (shifted) window attention on maps, with both projections. Nothing is rolled, partitioned or masked.

    The state-dict keys are `qkv.weight`, `qkv.bias`, `proj.weight`, `proj.bias` and `relative_position_bias_table`, as
    in timm and the official models (Liu et al. 2021, arXiv 2103.14030), which have a table of indices besides.

    Args:
        dim: Width C of the tokens.
        num_heads: Number of heads; a divisor of C.
        window_size: Side of a window in tokens, 1 to 16.
        shift: Of the windows, 0 to window_size - 1.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        impl: Implementation of the attention: `auto`, `triton`, `cuda` or `reference`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        shift: int = 0,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; choose a divisor of the width")
        if not 0 <= shift < window_size:
            raise ValueError(f"shift must be between 0 and window_size - 1 = {window_size - 1}, got {shift}")
        self.num_heads, self.window_size, self.shift, self.impl = num_heads, window_size, shift, impl
        self.qkv = QKVProjection(dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def extra_repr(self) -> str:
        """Returns what the submodules do not show."""
        return f"heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}, impl={self.impl!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attends within windows.

        Args:
            x: [B, H, W, C]: a map of any size; what its last windows lack is padded with zeros.

        Returns:
            [B, H, W, C].
        """
        qkv, bias = self.qkv(x)
        attended = window_attention(
            qkv,
            self.relative_position_bias_table,
            window_size=self.window_size,
            shift=self.shift,
            num_heads=self.num_heads,
            qkv_bias=bias,
            impl=self.impl,
        )
        projected: torch.Tensor = self.proj(attended)
        return projected
