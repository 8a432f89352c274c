"""MoCo v3 pre-training of ViT-H/14 on ImageNet-1k (Chen, Xie, He, arXiv 2104.02057).

    deepspeed recipes/mocov3_vith.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/mocov3_vith.py --demo

Published result: 78.1 % top-1 with a linear classifier after 300 epochs (table 5 of the paper, on TPUs).
"""

from dataclasses import replace

try:
    from vitrail.engine.models.vit import moco_vit, vit_huge
    from vitrail.engine.train import RunConfig, launch
    from vitrail.recipes import mocov3_vitb
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of ViT-B/16 with another encoder, whose blocks are recomputed in the backward pass."""
    config = mocov3_vitb.recipe(encoder=moco_vit(vit_huge(patch_size=14)), name="mocov3_vith")
    return replace(config, train=replace(config.train, checkpoint_activations=True))


if __name__ == "__main__":
    launch(recipe)
