"""EsViT pre-training of Swin-B with windows of 14 on ImageNet-1k (Li et al., arXiv 2106.09785).

    deepspeed recipes/esvit_swinb_w14.py --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/esvit_swinb_w14.py --demo

Published result: 79.3 % by nearest neighbours and 81.3 % with a linear classifier after 300 epochs. The authors
compared views alone for about 200 epochs and went on with regions; here one run does both.
"""

from dataclasses import replace

try:
    from vitrail.engine.models.swin import swin_base
    from vitrail.engine.train import RunConfig, launch
    from vitrail.recipes import esvit_swint_w7
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The settings of Swin-T with a larger network and larger windows, eight images at a time on a GPU."""
    encoder = replace(swin_base(window=14), drop_path=0.2)
    config = esvit_swint_w7.recipe(encoder=encoder, name="esvit_swinb_w14", region_epoch=200)
    return replace(config, train=replace(config.train, micro_batch=8))


if __name__ == "__main__":
    launch(recipe)
