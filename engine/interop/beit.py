"""Names of BEiT and of SimMIM's vision transformers elsewhere: the official releases and Hugging Face's Beit.

All is renaming, but that the official release writes the index of the relative positions, which follows from the size,
and that Hugging Face splits the qkv projection in three. A key that fits nothing is an error that lists it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.attention import RelativePositionBias

TABLE, INDEX = "rel_pos_bias.relative_position_bias_table", "rel_pos_bias.relative_position_index"
_HEAD = "lm_head."
_ENDS = {  # of names in blocks, official and ours
    "gamma_1": "ls1.gamma",
    "gamma_2": "ls2.gamma",
    "attn.q_bias": "attn.qkv.q_bias",
    "attn.v_bias": "attn.qkv.v_bias",
}
_ENCODER = (  # names in the official release
    r"cls_token|mask_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    rf"|{re.escape(TABLE)}|{re.escape(INDEX)}"
    r"|blocks\.\d+\.(gamma_[12]|norm[12]\.(weight|bias)|mlp\.fc[12]\.(weight|bias)"
    r"|attn\.(q_bias|v_bias|qkv\.weight|proj\.(weight|bias)))"
)

_HF = [  # (pattern in transformers' BeitForMaskedImageModeling, official name); 4.x and 5.x name layers apart
    (r"^beit\.embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^beit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^beit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^beit\.(?:encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^beit\.(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.query."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.key."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.attn\.query\.bias$", ".attn.q_bias"),
    (r"\.attn\.value\.bias$", ".attn.v_bias"),
]


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights in what a released file holds: under "model", under "module", or bare, as the official code looks."""
    for key in ("model", "module"):
        if isinstance(checkpoint.get(key), Mapping):
            inner: Mapping[str, Tensor] = checkpoint[key]
            return inner
    return checkpoint


def encoder_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder of a pre-trained BEiT, or of SimMIM's ViT, under the names of `VisionTransformer`.

    Args:
        state: with the prefix `encoder.` (SimMIM), where whatever else there is belongs to the decoder and is left out,
            or without (BEiT), where `lm_head` is left out.

    Raises:
        KeyError: a name is not one of such an encoder, as in a fine-tuned network, whose blocks have a table each.
    """
    if any(name.startswith("encoder.") for name in state):
        state = {name[len("encoder.") :]: value for name, value in state.items() if name.startswith("encoder.")}
    else:
        state = {name: value for name, value in state.items() if not name.startswith(_HEAD)}
    strange = sorted(name for name in state if not re.fullmatch(_ENCODER, name))
    if strange:
        raise KeyError(
            f"{len(strange)} names are not those of an encoder pre-trained by BEiT or SimMIM: {', '.join(strange)}; "
            "fine-tuned networks, with a table of positions in every block, cannot be read"
        )
    return {_renamed(name, _ENDS): value for name, value in state.items() if name != INDEX}


def encoder_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `VisionTransformer` under the official names, without a prefix; SimMIM's release has `encoder.`.

    Raises:
        KeyError: a name has no counterpart.
        ValueError: the relative positions are those of a grid that is not square.
    """
    back = {ours: theirs for theirs, ours in _ENDS.items()}
    renamed = {_renamed(name, back): value for name, value in state.items()}
    strange = sorted(name for name in renamed if not re.fullmatch(_ENCODER, name))
    if strange:
        raise KeyError(f"{', '.join(strange)}: the official networks have nothing of the kind")
    if TABLE in renamed:
        renamed[INDEX] = _index(renamed[TABLE])
    return renamed


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pre-trained official BEiT under the names of `BEiT`, but for the tokenizer, which it does not hold.

    Raises:
        KeyError: see `encoder_from_official`.
    """
    encoder = {f"encoder.{name}": value for name, value in encoder_from_official(state).items()}
    return encoder | {name: value for name, value in state.items() if name.startswith(_HEAD)}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `BEiT` under the official names, its tokenizer left out.

    Raises:
        KeyError: a name has no counterpart.
        ValueError: see `encoder_to_official`.
    """
    encoder = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    rest = [name for name in state if not name.startswith(("encoder.", "tokenizer.", _HEAD))]
    if rest:
        raise KeyError(f"{', '.join(sorted(rest))}: no part of BEiT")
    return encoder_to_official(encoder) | {name: value for name, value in state.items() if name.startswith(_HEAD)}


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of transformers' `BeitForMaskedImageModeling` under the names of `BEiT`; q, k and v are joined.

    Raises:
        KeyError: see `encoder_from_official`.
    """
    official: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _HF:
            name = re.sub(pattern, replacement, name)
        official[name] = value
    for name in [n for n in official if n.endswith(".attn.query.weight")]:
        parts = [official.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        official[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return from_official(official)


def _renamed(name: str, ends: Mapping[str, str]) -> str:
    """A name whose end is one of `ends`, with the other end."""
    for old, new in ends.items():
        if name.startswith("blocks.") and name.endswith(f".{old}"):
            return name[: -len(old)] + new
    return name


def _index(table: Tensor) -> Tensor:
    """The official buffer of a square grid's table, int64 `[1 + L, 1 + L]`: the row of the table for each pair."""
    side = (math.isqrt(len(table) - 3) + 1) // 2
    if (2 * side - 1) ** 2 + 3 != len(table):
        raise ValueError(f"the table of relative positions has {len(table)} rows, which no square grid of patches has")
    with torch.device("cpu"):
        return RelativePositionBias((side, side), 1).index
