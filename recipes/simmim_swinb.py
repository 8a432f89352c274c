"""SimMIM pre-training of Swin-B at 192 pixels on ImageNet-1k (Xie et al., arXiv 2111.09886).

    deepspeed recipes/simmim_swinb.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/simmim_swinb.py --demo

Published result of the released code with these settings: 84.0 % top-1 after fine-tuning at 224 pixels.
"""

from dataclasses import replace

try:
    from vitrail.engine.models.swin import swin_base
    from vitrail.engine.train import RunConfig, launch
    from vitrail.recipes import simmim_vitb16
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of ViT-B/16 with another encoder, without stochastic depth."""
    encoder = replace(swin_base(window=6, image_size=192), norm_eps=1e-5, mask_token=True)
    return simmim_vitb16.recipe(encoder=encoder, name="simmim_swinb")  # 22 of 36 squares


if __name__ == "__main__":
    launch(recipe)
