"""The light decoder of a masked autoencoder, computing only what the loss reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.kernels import restore_tokens

from .attention import AttentionBackend
from .block import NORM_EPS, Block, run_block
from .initialisation import xavier_init_
from .positions import sincos_positions


class PaddedLinear(nn.Linear):
    """A linear layer whose output is widened to a multiple of 8 with zeros.

    588 = 14 * 14 * 3 columns in bf16 are rows of 1,176 bytes, which are not 16-byte aligned and send the matrix
    product down a slow path. The parameters keep their published shape; only the product is padded.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.padded_features = -(-out_features // 8) * 8

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., padded_features]`."""
        extra = self.padded_features - self.out_features
        if not extra:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, F.pad(self.weight, (0, 0, 0, extra)), F.pad(self.bias, (0, extra)))


class MAEDecoder(nn.Module):
    """Decoder of MAE (arXiv 2111.06377): mask tokens join the encoded ones, a few narrow blocks, a pixel head.

    Three savings over the textbook form, all exact:

    * in the first block a masked token is `mask_token + position` in every image, so its LayerNorm and qkv
      projection are computed once per position rather than once per token;
    * in the last block only masked tokens are queries, since nobody reads the others' output;
    * the final norm and the pixel head run on masked tokens alone.
    """

    num_prefix = 1
    pos_embed: Tensor

    def __init__(
        self,
        *,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        grid: tuple[int, int],
        patch_size: int,
        attention: AttentionBackend = "auto",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"the decoder needs at least one block, got depth {depth}")
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, grid, prefix=self.num_prefix))
        self.blocks = nn.ModuleList(Block(width, heads, attention=attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pred = PaddedLinear(width, 3 * patch_size**2)
        xavier_init_(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_keep: Tensor, ids_restore: Tensor, rows: Tensor | None = None) -> Tensor:
        """Predict pixels.

        Args:
            latent: encoded class token and visible patches `[B, 1 + V, D]`.
            ids_keep: their patch numbers `[B, V]`.
            ids_restore: place of each patch in the shuffled order `[B, L]`; places from V on are masked.
            rows: patches to predict `[B, M]`; None means all `L`.

        Returns:
            `[B, M or L, K]` with K padded to a multiple of 8; the columns from `3 P P` on are zero.
        """
        positions = self.pos_embed[0]
        x = self.embed(latent)
        qkv = self._first_projection(x, ids_keep, ids_restore)
        x = restore_tokens(x, ids_restore, self.mask_token[0, 0], positions, num_prefix=self.num_prefix)
        last = len(self.blocks) - 1
        wanted = None if rows is None else rows + self.num_prefix
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, qkv=qkv if i == 0 else None, rows=wanted if i == last else None)
        if rows is None:
            x = x[:, self.num_prefix :]
        return self.pred(self.norm(x))

    def _first_projection(self, x: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        """LayerNorm and qkv of the first block for all tokens, `[B, 1 + L, 3 * width]`.

        The L possible masked tokens are projected once for the whole batch.
        """
        block = self.blocks[0]
        assert isinstance(block, Block)
        prefix, patches = self.pos_embed[0].split([self.num_prefix, self.pos_embed.shape[1] - self.num_prefix])
        seen = torch.cat([prefix.expand(x.shape[0], -1, -1), F.embedding(ids_keep, patches)], dim=1)
        table = block.project(self.mask_token[0] + patches)
        return restore_tokens(block.project(x + seen), ids_restore, table, None, num_prefix=self.num_prefix)
