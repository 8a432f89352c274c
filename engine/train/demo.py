"""Any recipe on the bundled images, in minutes on a laptop."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .config import RunConfig


def shrink(config: RunConfig) -> RunConfig:
    """Shrink a recipe to the bundled images and a small model; method, code and schedule shape stay.

    The optimiser's published settings hold for millions of images and hundreds of epochs, so each method's demo has a
    batch, a learning rate and a warm-up of its own.
    """
    run = config.method.demo_run()
    return replace(
        config,
        method=config.method.demo(),
        data=replace(config.data, source="demo"),
        optim=replace(config.optim, lr=run.lr, warmup_epochs=run.warmup_epochs, weight_decay=run.weight_decay),
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
