"""Steps of MAE by one implementation, in a process of its own so that memory is its own. Prints one line of JSON.

    python benchmarks/steps/child.py vitrail --model small --batch 16
    python benchmarks/steps/child.py "transformers compiled" --model huge --batch 256 --steps 10

A step is forward, backward and a fused AdamW update under bf16 autocast. Every implementation starts from the same
weights and sees the same images and masks; all get uint8 images, which ours normalises in its kernels and transformers'
needs normalised before. `bench/steps.py` starts these processes in turns and makes rows of what they print.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.engine.interop.mae import from_hf, load_exactly
from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import IMAGENET_MEAN, IMAGENET_STD, vit_base, vit_huge, vit_large, vit_small
from vitrail.engine.train.throughput import peak_memory

MODELS = {"small": vit_small, "base": vit_base, "large": vit_large, "huge": vit_huge}
IMPLEMENTATIONS = ("vitrail", "vitrail compiled", "transformers", "transformers compiled")
# What allocators say that raise no class of their own: PyTorch's on a CPU, the C++ library's, CUDA's and cuBLAS's.
EXHAUSTED = ("can't allocate memory", "bad_alloc", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to run."""

    implementation: str
    model: str
    batch: int
    image_size: int = 224
    mask_ratio: float = 0.75
    steps: int = 5
    """Timed steps."""
    warmup: int = 1
    """Steps between the first, which is timed apart, and the timed ones."""
    depth: int = 0
    """Blocks of the encoder and of the decoder at most; 0 for the published numbers."""
    backend: str = "inductor"
    """Of `torch.compile`."""
    limit: int = 0
    """Bytes of data that the process may hold, 0 for no limit."""

    @property
    def config(self) -> MAEConfig:
        """The autoencoder, with the published 512 x 8 decoder."""
        config = MAEConfig(encoder=MODELS[self.model](image_size=self.image_size), mask_ratio=self.mask_ratio)
        if not self.depth:
            return config
        encoder = replace(config.encoder, depth=min(self.depth, config.encoder.depth))
        return replace(config, encoder=encoder, decoder_depth=min(self.depth, config.decoder_depth))


def measure(work: Work) -> dict[str, Any]:
    """Run the steps here.

    Returns:
        `loss` of the first step, `seconds` of each timed one, `first_step_s` (compilation included), `peak_bytes` of
        the process while it trains, `step_bytes` (what the steps added to model and images), `flops` of a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device(device):  # a GPU initialises large models in no time
        model = build(work)
        torch.manual_seed(1)
        images = torch.randint(0, 256, (work.batch, work.image_size, work.image_size, 3), dtype=torch.uint8)
        noise = torch.rand(work.batch, math.prod(work.config.encoder.grid))
    model.to(device).train()
    if work.implementation.endswith("compiled"):
        compile_(model, work.backend)
    step = stepper(model, images, noise)
    before = forget_peak(device)
    started = time.perf_counter()
    loss = step().item()
    first_step = time.perf_counter() - started
    for _ in range(work.warmup):
        step()
    seconds = timed(step, work.steps, device)
    peak = peak_memory(device)
    return {
        "loss": loss,
        "seconds": seconds,
        "first_step_s": first_step,
        "peak_bytes": peak,
        "step_bytes": peak - before,
        "flops": skeleton(work.config).flops(work.batch),
    }


def build(work: Work) -> nn.Module:
    """The model of an implementation; the weights are those that transformers draws."""
    torch.manual_seed(0)
    theirs = transformers_model(work.config)
    if work.implementation.startswith("transformers"):
        return theirs
    # All of its parameters and buffers come from the other model, so that initialising them would be for nothing.
    ours = skeleton(work.config).to_empty(device=next(theirs.parameters()).device)
    load_exactly(ours, from_hf(theirs.state_dict()))
    return ours


def skeleton(config: MAEConfig) -> MAE:
    """Our model without values."""
    with torch.device("meta"):
        return MAE(config)


def transformers_classes() -> tuple[Callable[..., Any], Callable[..., nn.Module]]:
    """Configuration and model."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEConfig, ViTMAEForPreTraining


def transformers_model(config: MAEConfig) -> nn.Module:
    """Transformers' ViTMAE of the same size."""
    settings, model = transformers_classes()
    encoder = config.encoder
    return model(
        settings(
            image_size=encoder.image_size,
            patch_size=encoder.patch_size,
            hidden_size=encoder.width,
            intermediate_size=4 * encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            decoder_hidden_size=config.decoder_width,
            decoder_intermediate_size=4 * config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    )


def compile_(model: nn.Module, backend: str) -> None:
    """Compile as a user would: ours block by block, as its trainer does, and theirs as a whole."""
    if isinstance(model, MAE):
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.compile(backend=backend)
    else:
        model.compile(backend=backend)


def stepper(model: nn.Module, images: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """A function that trains one step and returns the loss."""
    device = images.device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if isinstance(model, MAE):
                loss = model.loss(images, model.masks(noise))
            else:
                pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
                loss = model(pixels, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def timed(step: Callable[[], Tensor], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` steps in a row; on a GPU between events, so that the host may run ahead as it does."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        events[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for _ in range(count):
        step()
        marks.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(marks)]


def forget_peak(device: torch.device) -> int:
    """Let the peak begin anew, since building a model takes memory for a moment; returns the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    # Some containers forbid it; the peak of building then counts, for all implementations alike.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def restrict(limit: int) -> None:
    """Make allocations beyond `limit` bytes of data fail, where a machine without memory would kill the process.

    Libraries are loaded and threads started before: neither says in a recognisable way that it lacks memory.
    """
    transformers_classes()
    square = torch.ones(256, 256)
    torch.mm(square, square)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in EXHAUSTED)


def attempt(work: Work) -> dict[str, Any]:
    """`measure`, or `{"outcome": "out of memory"}`."""
    try:
        return measure(work)
    except (RuntimeError, MemoryError) as error:
        if not exhausted(error):
            raise
        return {"outcome": "out of memory"}


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=16)
    for name in ("image_size", "mask_ratio", "steps", "warmup", "depth", "backend", "limit"):
        default = next(field.default for field in fields(Work) if field.name == name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    work = Work(**vars(parser.parse_args()))
    if work.limit:
        restrict(work.limit)
    print(json.dumps(attempt(work)))


if __name__ == "__main__":
    main()
