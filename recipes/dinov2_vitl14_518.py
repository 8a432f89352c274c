"""The end of DINOv2's pre-training: ViT-L/14 on images of 518 pixels (Oquab et al., arXiv 2304.07193).

    deepspeed recipes/dinov2_vitl14_518.py --data.path /imagenet22k --train.init-from runs/dinov2_vitl14/checkpoints/...

It starts from a checkpoint of `dinov2_vitl14.py`, whose positions are stretched from 16 x 16 to 37 x 37 patches. The
paper's last phase has 10,000 steps; the schedules are compressed into them, at a tenth of the learning rate, which is
this recipe's choice.
"""

from dataclasses import replace

try:
    from vitrail.engine.train import RunConfig, launch
    from vitrail.recipes.dinov2_vitl14 import recipe as at_224
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe() -> RunConfig:
    """The recipe for 224 pixels with larger crops, compressed."""
    config = at_224("dinov2_vitl14_518", image_size=518, steps=10_000)
    return replace(
        config,
        optim=replace(config.optim, base_lr=config.optim.base_lr / 10),
        train=replace(
            config.train,
            micro_batch=8,
            checkpoint_activations=True,  # 24 blocks of 1,370 tokens
            save_every=1,
        ),
        evaluate=replace(config.evaluate, knn_every=1),
    )


if __name__ == "__main__":
    launch(recipe)
