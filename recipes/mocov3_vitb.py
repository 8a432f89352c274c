"""MoCo v3 pre-training of ViT-B/16 on ImageNet-1k (Chen, Xie, He, arXiv 2104.02057).

    deepspeed recipes/mocov3_vitb.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/mocov3_vitb.py --demo

Published result: 76.7 % top-1 with a linear classifier after 300 epochs (released checkpoint).
"""

from pathlib import Path

try:
    from vitrail.engine.methods.moco_v3 import MoCoV3Config
    from vitrail.engine.models.vit import ViTConfig, moco_vit, vit_base
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe(encoder: ViTConfig | None = None, name: str = "mocov3_vitb") -> RunConfig:
    """The settings of the released code for vision transformers; they hold for every encoder."""
    return RunConfig(
        method=MoCoV3Config(
            encoder=encoder or moco_vit(vit_base(patch_size=16)),
            freeze_patch_embed=True,  # section 4.2 of the paper: without it training is unstable
            hidden=4096,
            dim=256,
            temperature=0.2,
            momentum=0.99,  # to 1 along half a cosine
            crop_scale=(0.08, 1.0),
        ),
        optim=OptimConfig(
            base_lr=1.5e-4,  # x 4096 / 256 = 2.4e-3
            warmup_epochs=40,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            decay="all",  # of vectors and biases as well
        ),
        train=TrainConfig(
            epochs=300,
            batch_size=4096,  # images whose keys are each other's negatives
            micro_batch=64,
            grad_cache=True,  # fewer than 64 GPUs still see 4,096 keys, for one more forward pass
            zero_stage=1,
            output=Path("runs") / name,
        ),
        evaluate=EvaluateConfig(knn_every=10),
    )


if __name__ == "__main__":
    launch(recipe)
