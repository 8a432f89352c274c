"""Short runs on the bundled digits, long enough to see what becomes of the features; a script as `training.py` is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training

from vitrail.engine.methods.byol import BYOLConfig
from vitrail.engine.methods.moco_v3 import MoCoV3Config
from vitrail.engine.methods.simclr import SimCLRConfig
from vitrail.engine.methods.simsiam import SimSiam, SimSiamConfig
from vitrail.engine.models.vit import ViTConfig
from vitrail.engine.train.config import EvaluateConfig, GuardConfig

STEPS, BATCH = 200, 64
RUNS: dict[str, Any] = {
    "simclr": SimCLRConfig(),
    "moco_v3": MoCoV3Config(),
    "byol": BYOLConfig(),
    "simsiam": SimSiamConfig(),
    "no stop-gradient": SimSiamConfig(),
}


class Cheater(SimSiam):
    """SimSiam whose projections get a gradient: nothing keeps it from giving all images the same answer."""

    def criterion(self, encoded: Any, schedule: Any) -> Any:
        _, metrics = super().criterion(encoded, schedule)
        projected = self.projector(encoded.student.flatten(0, 1))
        loss = -torch.nn.functional.cosine_similarity(*projected.float().chunk(2)).mean()
        return loss, {**metrics, "loss": loss.detach()}


def learn(scratch: Path) -> Any:
    """For every run the online evaluations, the first one of the untrained network, and the kinds of its alarms."""
    report = {}
    for name, config in RUNS.items():
        method = config.demo()
        assert isinstance(method.encoder, ViTConfig)
        method = replace(method, encoder=replace(method.encoder, width=64, depth=2))
        run = config.demo_run()
        output = scratch / name
        base = training.tiny_config(
            output, batch_size=BATCH, micro_batch=BATCH, log_every=10, epochs=STEPS * BATCH / training.IMAGES
        )
        settings = replace(
            base,
            method=method,
            data=replace(base.data, threads=2, decoder="pillow"),
            optim=replace(base.optim, lr=run.lr, warmup_epochs=0.2, weight_decay=run.weight_decay),
            evaluate=EvaluateConfig(knn_every=base.train.epochs / 2, bank=2000, batch=500),
            guard=GuardConfig(intervals=5),
        )
        first: dict[str, float] = {}

        def before(trainer: Any, name: str = name, first: dict[str, float] = first) -> None:
            if name == "no stop-gradient":
                trainer.method.__class__ = Cheater
            first.update(trainer.knn(trainer.method))

        training.train(settings, before=before)
        lines = map(training.json.loads, (output / "metrics.jsonl").read_text().splitlines())
        report[name] = {
            "untrained": first,
            "knn": training.logged(output, "knn", kind="evaluation"),
            "rankme": training.logged(output, "rankme", kind="evaluation"),
            "feature_std": training.logged(output, "feature_std"),
            "alarms": sorted({line["alarm"] for line in lines if "alarm" in line}),
        }
    return report


if __name__ == "__main__":
    training.run_in_process({"learn": learn})
