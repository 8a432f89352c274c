"""BYOL pre-training of ViT-B/16 on ImageNet-1k (Grill et al., arXiv 2006.07733), stabilised as MoCo v3's paper does.

    deepspeed recipes/byol_vitb.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/byol_vitb.py --demo

Published result: 71.0 % top-1 with a linear classifier after 100 epochs (arXiv 2104.02057, section 4.2).
"""

from pathlib import Path

try:
    from vitrail.engine.methods.byol import BYOLConfig
    from vitrail.engine.models.vit import moco_vit, vit_base
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """BYOL's loss, heads and views; encoder and optimiser as MoCo v3 trains them."""
    return RunConfig(
        method=BYOLConfig(
            encoder=moco_vit(vit_base(patch_size=16)),
            freeze_patch_embed=True,  # + 1.3 points (arXiv 2104.02057, section 4.2)
            hidden=4096,
            dim=256,
            momentum=0.99,  # the paper's for 300 epochs; 0.996 for 1000
            crop_scale=(0.08, 1.0),
        ),
        optim=OptimConfig(
            # The settings of MoCo v3's transformers: the paper does not print those of its BYOL. With a ResNet the
            # published optimiser is LARS: --optim.name lars --optim.base-lr 0.45 --optim.weight-decay 1e-6.
            base_lr=1.5e-4,
            warmup_epochs=40,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            decay="all",
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=4096,
            micro_batch=64,
            grad_cache=True,  # the heads' batch statistics are those of 4,096 images on any number of GPUs
            zero_stage=1,
            output=Path("runs/byol_vitb"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
