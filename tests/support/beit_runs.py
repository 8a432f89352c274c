"""Tiny runs of BEiT in processes of their own; a script as `training.py` is."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training
from safetensors.torch import save_file

from vitrail.engine.methods.beit import BEiTConfig
from vitrail.engine.models.tokenizer import KMeansTokenizerConfig
from vitrail.engine.models.vit import ViTConfig, beit_vit

STEPS, BATCH = 4, 16
# Blocks as small as one patch: every image then hides all of its six, and parts of a batch weigh the same.
METHOD = BEiTConfig(
    encoder=beit_vit(ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=4)),
    tokenizer=KMeansTokenizerConfig(patch_size=4, codes=32, images=100),
    mask_count=6,
    least_area=1,
)


def config(output: Path, *, micro: int, **train: Any) -> Any:
    """A few steps in fp32 on the demo images, the network on 4 x 4 patches, the tokenizer on a crop half as large."""
    settings = {"precision": "fp32", "batch_size": BATCH, "micro_batch": micro, **train}
    base = training.tiny_config(output, **settings, epochs=STEPS / (training.IMAGES // BATCH))
    return replace(
        base,
        method=METHOD,
        data=replace(base.data, decoder="pillow"),
        optim=replace(base.optim, name="sgd", lr=0.1, decay="all"),
    )


def train(run: Any, **hooks: Any) -> dict[str, Any]:
    """Run a configuration; keep its last weights as `<name>.safetensors` beside its output folder."""
    from vitrail.engine.train.checkpoint import whole_state

    result = training.train(run, **hooks)
    whole = whole_state(result.method, sharded=run.train.zero_stage == 3)
    output = run.train.output
    if torch.distributed.get_rank() != 0:
        return {}
    save_file({k: v.contiguous() for k, v in whole.items()}, output.with_name(output.name + ".safetensors"))
    report: dict[str, Any] = {name: training.logged(output, name) for name in ("loss", "gradient_norm", "accuracy")}
    return report | {"events": training.events(output)}


def runs(scratch: Path) -> Any:
    """One rank: in one pass, in parts, recomputed, interrupted; two: every stage, and interrupted when sharded."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    report = {}
    if world == 1:
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "accumulated": {"micro": 4},
            "recomputed": {"checkpoint_activations": True},
        }
    else:
        ways = {f"stage {stage}": {"zero_stage": stage} for stage in range(4)}
    for name, change in ways.items():
        report[name] = train(config(scratch / name, **({"micro": BATCH // world} | change)))
    stage = 1 if world == 1 else 3
    run = config(scratch / "parts", micro=BATCH // world, zero_stage=stage)
    training.train(run, stop_after=2)
    report["parts"] = train(run, before=_prepared_once)
    if world == 1:  # as somebody who looks at the run opens it
        from vitrail.engine.show.run import open_run

        report["opened"] = open_run(scratch / "parts", torch.device("cpu")).method.tokenizer.ready
    return report


def _prepared_once(trainer: Any) -> None:
    """Whoever continues finds the codebook in the checkpoint."""
    assert trainer.state.step == 2
    assert trainer.method.tokenizer.ready
    assert trainer.method.tokenizer.codebook.abs().max() > 0


if __name__ == "__main__":
    training.run_in_process({"runs": runs})
