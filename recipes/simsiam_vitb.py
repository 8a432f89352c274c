"""SimSiam pre-training of ViT-B/16 on ImageNet-1k (Chen and He, arXiv 2011.10566).

    deepspeed recipes/simsiam_vitb.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/simsiam_vitb.py --demo

There is no published result with a vision transformer; the paper's ResNet-50 is `simsiam_r50.py`.
"""

from pathlib import Path

try:
    from vitrail.engine.methods.simsiam import SimSiamConfig
    from vitrail.engine.models.vit import moco_vit, vit_base
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """SimSiam's loss, heads and views; encoder and optimiser as MoCo v3 trains them."""
    return RunConfig(
        method=SimSiamConfig(
            encoder=moco_vit(vit_base(patch_size=16)),
            freeze_patch_embed=True,  # arXiv 2104.02057, section 4.2
            dim=2048,
            hidden=512,
            crop_scale=(0.2, 1.0),
        ),
        optim=OptimConfig(
            # The settings of MoCo v3's transformers; the predictor's learning rate is constant.
            base_lr=1.5e-4,
            warmup_epochs=40,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            decay="all",
        ),
        train=TrainConfig(
            epochs=100,
            batch_size=512,  # the paper's; larger ones do not help (table 2)
            micro_batch=64,
            grad_cache=True,  # the heads' batch statistics are those of 512 images on any number of GPUs
            zero_stage=1,
            output=Path("runs/simsiam_vitb"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
