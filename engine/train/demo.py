"""Any recipe on the bundled images, in minutes on a laptop."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..methods.joint import JointConfig
from .config import ConfigError, RunConfig


def shrink(config: RunConfig) -> RunConfig:
    """Shrink a recipe to the bundled images and a small model; method, code and schedule shape stay.

    The optimiser's published settings hold for millions of images and hundreds of epochs, so each method's demo has a
    batch, a learning rate and a warm-up of its own.
    """
    run = config.method.demo_run()
    milestones = tuple(epoch / config.train.epochs * run.epochs for epoch in config.optim.milestones)
    optim = replace(config.optim, milestones=milestones, warmup_lr=0.0)
    return replace(
        config,
        method=config.method.demo(),
        data=replace(config.data, source="demo"),
        optim=replace(optim, lr=run.lr, warmup_epochs=run.warmup_epochs, weight_decay=run.weight_decay),
        train=replace(
            config.train,
            epochs=run.epochs,
            batch_size=run.batch_size,
            micro_batch=max(1, run.batch_size // int(os.environ.get("WORLD_SIZE", "1"))),
            log_every=50,
            save_every=run.epochs / 3,
            checkpoint_activations=False,
            output=Path("runs") / f"demo-{config.train.output.name}",
        ),
        evaluate=replace(config.evaluate, knn_every=run.epochs / 4, bank=4_000),
    )


def provoke(config: RunConfig) -> dict[str, RunConfig]:
    """Runs that show what a frozen patch projection is for: the demo, and two whose learning rate is far too high.

    Of these two, one trains the patch projection and one does not. They are short, log every step and look at the
    nearest neighbours often, so that spikes, dips and alarms can be seen side by side.

    Args:
        config: a demo, of a method with a patch projection that can be frozen.

    Raises:
        ConfigError: the method has none.
    """
    method = config.method
    if not isinstance(method, JointConfig) or not method.freeze_patch_embed:
        raise ConfigError(
            f"--provoke compares a frozen patch projection with a trained one, and {type(method).__name__} has none "
            "that is frozen: try it with recipes/mocov3_vitb.py"
        )
    trained = replace(method, freeze_patch_embed=False)
    batch = config.train.batch_size // 2
    variants = {
        "frozen": (method, 1.0),
        "frozen, learning rate x 15": (method, 15.0),
        "trained, learning rate x 15": (trained, 15.0),
    }
    return {
        name: replace(
            config,
            method=variant,
            optim=replace(config.optim, lr=config.peak_lr * factor, warmup_epochs=0.5, weight_decay=0.0),
            train=replace(
                config.train,
                epochs=2,
                batch_size=batch,
                micro_batch=max(1, config.train.micro_batch // 2),
                log_every=1,
                resume=False,
                output=config.train.output / name.replace(", learning rate x ", "-x"),
            ),
            evaluate=replace(config.evaluate, knn_every=0.125),
        )
        for name, (variant, factor) in variants.items()
    }
