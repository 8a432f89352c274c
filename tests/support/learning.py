"""Short runs on the bundled digits, long enough to see what becomes of the features; a script as `training.py` is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import training

from vitrail.engine.methods.byol import BYOLConfig
from vitrail.engine.methods.joint import spread
from vitrail.engine.methods.moco_v3 import MoCoV3Config
from vitrail.engine.methods.simclr import SimCLRConfig
from vitrail.engine.methods.simsiam import SimSiam, SimSiamConfig
from vitrail.engine.models.vit import ViTConfig
from vitrail.engine.train.config import EvaluateConfig, GuardConfig

STEPS, BATCH = 120, 64
RUNS: dict[str, Any] = {
    "simclr": SimCLRConfig(),
    "moco_v3": MoCoV3Config(),
    "byol": BYOLConfig(),
    "simsiam": SimSiamConfig(),
    "agreement": SimSiamConfig(),
}


class Agreement(SimSiam):
    """What is left without predictor, stop-gradient and batch normalisation: features of two views are to agree."""

    def criterion(self, encoded: Any, schedule: Any) -> Any:
        loss = 1 - torch.nn.functional.cosine_similarity(*encoded.student.float()).mean()
        return loss, {"loss": loss.detach(), "feature_std": spread(encoded.student.flatten(0, 1))}


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
            optim=replace(
                base.optim,
                lr=run.lr * (10 if name == "agreement" else 1),
                warmup_epochs=0.2,
                weight_decay=run.weight_decay,
            ),
            evaluate=EvaluateConfig(knn_every=base.train.epochs, bank=2000, batch=500),
            guard=GuardConfig(intervals=5),
        )
        first: dict[str, float] = {}

        def before(trainer: Any, name: str = name, first: dict[str, float] = first) -> None:
            if name == "agreement":
                trainer.method.__class__ = Agreement
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
