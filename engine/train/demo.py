"""Any recipe on the bundled images, in minutes on a laptop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .config import RunConfig


def shrink(config: RunConfig) -> RunConfig:
    """Shrink a recipe to the bundled images and a small model; method, code and schedule shape stay.

    The optimiser's published settings hold for millions of images and hundreds of epochs, so the demo has a batch, a
    learning rate and a warm-up of its own.
    """
    return replace(
        config,
        method=config.method.demo(),
        data=replace(config.data, source="demo"),
        optim=replace(config.optim, lr=2e-3, warmup_epochs=1),
        train=replace(
            config.train,
            epochs=20,
            batch_size=128,
            micro_batch=64,
            log_every=50,
            save_every=5,
            checkpoint_activations=False,
            output=Path("runs") / f"demo-{config.train.output.name}",
        ),
        evaluate=replace(config.evaluate, knn_every=5, bank=4_000),
    )
