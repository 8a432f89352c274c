"""Whose implementations there are, and why one cannot run here.

A case names its implementations; this table says what each name needs. A peer that is not there leaves a reason in the
rows, never a silent gap.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


def _no_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "runs on CUDA only"


def _anywhere(device: torch.device) -> str | None:
    return None


def _no_apex(device: torch.device) -> str | None:
    if importlib.util.find_spec("amp_C") is None:
        return "NVIDIA's apex is not built here (apex on PyPI is another project): build it from its source"
    return _no_gpu(device)


def _no_linear_cross_entropy(device: torch.device) -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked torch.nn.functional.linear_cross_entropy"


def _chosen_anyway(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "is what vitrail chooses on a CPU"


@dataclass(frozen=True)
class Peer:
    """What an implementation needs."""

    package: str | None = None
    """Module that must be importable."""
    install: str = ""
    """How to get it."""
    device: Callable[[torch.device], str | None] = _anywhere
    """Why it cannot run on a device."""


PEERS = {
    "vitrail": Peer(),
    "vitrail passes": Peer(),
    "vitrail chunked": Peer(device=_chosen_anyway),
    "eager": Peer(),
    "compiled": Peer(),
    "SDPA": Peer(),
    "FlexAttention": Peer(),
    "plain PyTorch": Peer(),
    "torch foreach": Peer(),
    "torch loop": Peer(),
    "one by one": Peer(),
    "torch mul_ add_": Peer(),
    "torch fused + foreach": Peer(),
    "linear_cross_entropy": Peer(device=_no_linear_cross_entropy),
    "timm": Peer("timm", "pip install timm"),
    "transformers": Peer("transformers", "pip install transformers"),
    "lightly": Peer("lightly", "pip install lightly"),
    "liger-kernel": Peer("liger_kernel", "pip install liger-kernel", _no_gpu),
    "xformers": Peer("xformers", "pip install xformers", _no_gpu),
    "DeepSpeed FusedAdam": Peer("deepspeed", "pip install deepspeed", _no_gpu),
    "DeepSpeed CPUAdam": Peer("deepspeed", "pip install deepspeed"),
    "apex": Peer(device=_no_apex),
    "torchvision": Peer("torchvision", "pip install torchvision"),
    "Pillow": Peer("PIL", "pip install pillow"),
    "DALI": Peer("nvidia.dali", "pip install nvidia-dali-cuda130"),
    "DALI GPU": Peer("nvidia.dali", "pip install nvidia-dali-cuda130", _no_gpu),
}


def absent(name: str, device: torch.device) -> str | None:
    """Why the implementation `name` cannot run on `device`; None if it can.

    The suffixes ` compiled`, ` checkpointed`, `, explicit attention` and, after that, `, corrupting` are understood.

    Raises:
        KeyError: Nobody of that name is in the table.
    """
    known = re.sub("( compiled| checkpointed|, explicit attention(, corrupting)?)$", "", name)
    if known not in PEERS:
        raise KeyError(f"no implementation called {name!r} in benchmarks/harness/bench/peers.py; add it there")
    peer = PEERS[known]
    if peer.package is not None and not _importable(peer.package):
        return f"{peer.package} is not installed: {peer.install}"
    return peer.device(device)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent of a dotted name
        return False
