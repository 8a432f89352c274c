"""Time one training step of MAE, ours and transformers', each in a process of its own so that memory is its own.

    python benchmarks/steps/mae_step.py                                   # ViT-S/16, batch 16, on a CPU
    python benchmarks/steps/mae_step.py --model huge --batch 256          # on a GPU

Processes alternate, so that a machine that slows down slows all of them. A step is forward, backward and a fused AdamW
update under bf16 autocast; both models start from the same weights, see the same images and masks, and their first
losses are compared before anything is timed. Writes one JSON row per implementation.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vitrail.engine.interop.mae import from_hf, load_exactly
from vitrail.engine.methods.mae import MAE, MAEConfig
from vitrail.engine.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViTConfig, vit_base, vit_huge, vit_large, vit_small
from vitrail.engine.train.throughput import peak_memory

MODELS = {"small": vit_small(), "base": vit_base(), "large": vit_large(), "huge": vit_huge()}
IMPLEMENTATIONS = ("vitrail", "vitrail compiled", "transformers", "transformers compiled")


def their_model(encoder: ViTConfig) -> torch.nn.Module:
    """Transformers' ViTMAE of the same size, the 512 x 8 decoder included."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.width,
            intermediate_size=4 * encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            patch_size=encoder.patch_size,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    )


def measure(implementation: str, model: str, batch: int, steps: int) -> dict[str, Any]:
    """Run steps of one implementation in this process.

    Returns:
        First loss, seconds per step after two warm-up steps, seconds to the first step, peak memory and the share of it
        that the steps added.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = MODELS[model]
    torch.manual_seed(0)
    theirs = their_model(encoder)
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    noise = torch.rand(batch, encoder.grid[0] * encoder.grid[1], device=device)
    ours = MAE(MAEConfig(encoder=encoder))
    load_exactly(ours, from_hf(theirs.state_dict()))
    used = (ours if implementation.startswith("vitrail") else theirs).to(device).train()
    del ours, theirs

    if implementation.endswith("compiled"):
        if isinstance(used, MAE):
            for block in [*used.encoder.blocks, *used.decoder.blocks]:
                block.compile()
        else:
            used.compile()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    optimizer = torch.optim.AdamW(used.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if isinstance(used, MAE):
                loss = used.loss(images, used.masks(noise))
            else:
                pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
                loss = used(pixels, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    before, started = resident(device), time.perf_counter()
    first_loss = step().item()
    first_step = time.perf_counter() - started
    step()
    seconds = []
    for _ in range(steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = peak_memory(device)
    flops = MAE(MAEConfig(encoder=encoder)).flops(batch)
    return {
        "loss": first_loss,
        "seconds": seconds,
        "first_step_s": first_step,
        "peak_bytes": peak,
        "step_bytes": peak - before,
        "flops": flops,
    }


def resident(device: torch.device) -> int:
    """Memory held now, bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":unknown")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu.split(":")[1].strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def compare(implementations: list[str], model: str, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Measure implementations in alternating processes; one row each, with its ratio to every other.

    Raises:
        RuntimeError: the first losses differ by more than bf16 explains, so that the models are not the same.
    """
    # Waiting threads that spin on disturb all implementations on a shared machine; these settings are everyone's.
    settings = {"GOMP_SPINCOUNT": "20000", **os.environ}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in implementations}
    for _ in range(rounds):
        for name in implementations:
            command = [sys.executable, __file__, "--child", name, "--model", model, "--batch", str(batch)]
            command += ["--steps", str(steps)]
            done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    losses = [run["loss"] for parts in runs.values() for run in parts]
    if max(losses) - min(losses) > 1e-3 * max(losses):
        raise RuntimeError(f"the implementations do not compute the same loss: {losses}")
    medians = {name: statistics.median(s for run in parts for s in run["seconds"]) for name, parts in runs.items()}
    rows = []
    for name, parts in runs.items():
        times = sorted(s for run in parts for s in run["seconds"])
        rows.append(
            {
                "benchmark": "mae_step",
                "implementation": name,
                "model": f"ViT-{model}",
                "batch": batch,
                "median_s": medians[name],
                "quantiles_s": [times[len(times) // 5], times[-1 - len(times) // 5]],
                "images_per_second": batch / medians[name],
                "gflops": parts[0]["flops"] / medians[name] / 1e9,
                "first_step_s": min(run["first_step_s"] for run in parts),
                "peak_bytes": max(run["peak_bytes"] for run in parts),
                "step_bytes": max(run["step_bytes"] for run in parts),
                "speed_over": {other: medians[other] / medians[name] for other in runs if other != name},
                "environment": environment(),
            }
        )
    return rows


def main() -> None:
    """Parse arguments, measure, print a table and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per implementation")
    parser.add_argument("--implementations", nargs="+", default=["vitrail", "transformers"], choices=IMPLEMENTATIONS)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.model, arguments.batch, arguments.steps)))
        return
    rows = compare(arguments.implementations, arguments.model, arguments.batch, arguments.steps, arguments.rounds)
    for row in rows:
        print(
            f"{row['implementation']:24} {row['images_per_second']:8.1f} img/s  {row['gflops']:8.0f} GFLOP/s  "
            f"peak {row['peak_bytes'] / 2**30:6.2f} GiB (steps {row['step_bytes'] / 2**30:.2f})  "
            + "  ".join(f"{ratio:.2f}x {other}" for other, ratio in row["speed_over"].items())
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
