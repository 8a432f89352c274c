"""Names of masked autoencoders elsewhere: the official release and Hugging Face's ViTMAE.

Both directions are pure renaming (Hugging Face splits the qkv projection in three); nothing is guessed, and a key that
fits nothing is an error that lists it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_OFFICIAL_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}

_HF = [  # (pattern in transformers' ViTMAEForPreTraining, name in the official release); 4.x and 5.x name layers apart
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^vit\.(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"^decoder\.decoder_layers\.(\d+)\.", r"decoder_blocks.\1."),
    (r"^decoder\.(mask_token|decoder_pos_embed)$", r"\1"),
    (r"^decoder\.(decoder_embed|decoder_norm|decoder_pred)\.", r"\1."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", r".attn.query."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", r".attn.key."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", r".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
]


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the official `MaskedAutoencoderViT` (encoder and decoder) under the names of `MAE`."""
    renamed = {}
    for name, value in state.items():
        for theirs, ours in _OFFICIAL_DECODER.items():
            if name.startswith(theirs):
                renamed[ours + name[len(theirs) :]] = value
                break
        else:
            renamed[f"encoder.{name}"] = value
    return renamed


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of `MAE` under the names of the official release; the encoder's are timm's too.

    Raises:
        KeyError: a name belongs to neither the encoder nor the decoder.
    """
    renamed = {}
    for name, value in state.items():
        if name.startswith("encoder."):
            renamed[name.removeprefix("encoder.")] = value
            continue
        matches = [(theirs, ours) for theirs, ours in _OFFICIAL_DECODER.items() if name.startswith(ours)]
        if not matches:
            raise KeyError(f"{name} is no parameter of a masked autoencoder")
        theirs, ours = matches[0]
        renamed[theirs + name[len(ours) :]] = value
    return renamed


def from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of transformers' `ViTMAEForPreTraining` under the names of `MAE`; q, k and v are joined."""
    official: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _HF:
            name = re.sub(pattern, replacement, name)
        official[name] = value
    for name in [n for n in official if ".attn.query." in n]:
        parts = [official.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        official[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    return from_official(official)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state whose names must be exactly the module's.

    Raises:
        KeyError: names are missing or left over; all of them are listed.
    """
    wanted = module.state_dict().keys()
    missing, surplus = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or surplus:
        raise KeyError(f"the state does not fit {type(module).__name__}; missing: {missing}; left over: {surplus}")
    module.load_state_dict(dict(state))
