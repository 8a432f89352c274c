"""MAE pre-training of ViT-B/16 on ImageNet-1k (He et al., arXiv 2111.06377).

    deepspeed recipes/mae_vitb.py --data.path /imagenet/train --data.val-path /imagenet/val

Published result: 83.6 % top-1 after fine-tuning at 224 pixels (table 3 of the paper).
"""

try:
    from vitrail.engine.models.vit import vit_base
    from vitrail.engine.train import RunConfig, launch
    from vitrail.recipes import mae_vith
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of ViT-H/14 with another encoder."""
    return mae_vith.recipe(encoder=vit_base(patch_size=16), name="mae_vitb")


if __name__ == "__main__":
    launch(recipe)
