"""Any recipe on the bundled images, in minutes on a laptop."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from .config import RunConfig

BATCH = 128  # over all ranks, however many there are


def shrink(config: RunConfig) -> RunConfig:
    """Shrink a recipe to the bundled images and a small model; method, code and schedule shape stay.

    The optimiser's published settings hold for millions of images and hundreds of epochs, so the demo has a batch, a
    learning rate and a warm-up of its own.
    """
    return replace(
        config,
        method=config.method.demo(),
        data=replace(config.data, source="demo"),
        optim=replace(config.optim, lr=4e-3, warmup_epochs=1),
        train=replace(
            config.train,
            epochs=12,
            batch_size=BATCH,
            micro_batch=max(1, BATCH // int(os.environ.get("WORLD_SIZE", "1"))),
            log_every=50,
            save_every=4,
            checkpoint_activations=False,
            output=Path("runs") / f"demo-{config.train.output.name}",
        ),
        evaluate=replace(config.evaluate, knn_every=3, bank=4_000),
    )
