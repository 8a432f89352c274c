"""SimCLR pre-training of ViT-B/16 on ImageNet-1k (Chen et al., arXiv 2002.05709), stabilised as MoCo v3's paper does.

    deepspeed recipes/simclr_vitb.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/simclr_vitb.py --demo

Published result: 69.3 % top-1 with a linear classifier after 100 epochs (arXiv 2104.02057, section 4.2).
"""

from pathlib import Path

try:
    from vitrail.engine.methods.simclr import SimCLRConfig
    from vitrail.engine.models.vit import moco_vit, vit_base
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """SimCLR's loss, head and views; encoder and optimiser as MoCo v3 trains them."""
    return RunConfig(
        method=SimCLRConfig(
            encoder=moco_vit(vit_base(patch_size=16)),
            freeze_patch_embed=True,  # + 0.8 points (arXiv 2104.02057, section 4.2)
            dim=128,
            projector_layers=3,  # second version of the released code
            temperature=0.1,
            jitter=(0.8, 0.8, 0.8, 0.2),
            crop_scale=(0.08, 1.0),
        ),
        optim=OptimConfig(
            # The settings of MoCo v3's transformers: the paper does not print those of its SimCLR.
            base_lr=1.5e-4,
            warmup_epochs=40,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            decay="all",
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=4096,  # images whose views are each other's negatives
            micro_batch=64,
            grad_cache=True,  # fewer than 64 GPUs still see 8,191 other views, for one more forward pass
            zero_stage=1,
            output=Path("runs/simclr_vitb"),
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
