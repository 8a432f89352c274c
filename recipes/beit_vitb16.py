r"""BEiT pre-training of ViT-B/16 on ImageNet-1k (Bao et al., arXiv 2106.08254).

    python -m vitrail.engine.interop.dall_e encoder.pkl dall_e_encoder.safetensors
    deepspeed recipes/beit_vitb16.py --method.tokenizer.weights dall_e_encoder.safetensors \
        --data.path /imagenet/train --data.val-path /imagenet/val
    deepspeed recipes/beit_vitb16.py --demo

`encoder.pkl` is what OpenAI published of DALL-E; it is read without running anything in it.

Published result: 83.2 % top-1 after fine-tuning at 224 pixels (table 1 of the paper).
"""

from dataclasses import replace
from pathlib import Path

try:
    from vitrail.engine.methods.beit import BEiTConfig
    from vitrail.engine.models.backbone import IMAGENET_MEAN, IMAGENET_STD
    from vitrail.engine.models.tokenizer import DallETokenizerConfig, TokenizerConfig
    from vitrail.engine.models.vit import beit_vit, vit_base
    from vitrail.engine.train import EvaluateConfig, OptimConfig, RunConfig, TrainConfig, launch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: install vitrail first, with `pip install -e .` in its folder") from None


def recipe(tokenizer: TokenizerConfig | None = None, name: str = "beit_vitb16") -> RunConfig:
    """The released code's run of 800 epochs.

    Args:
        tokenizer: another one than DALL-E's, such as `KMeansTokenizerConfig()`, which needs no file.
        name: of the output folder.
    """
    return RunConfig(
        method=BEiTConfig(
            encoder=replace(beit_vit(vit_base(patch_size=16), layer_scale=0.1), drop_path=0.1),
            tokenizer=tokenizer or DallETokenizerConfig(),
            mask_count=75,  # of 196
            crop_scale=(0.08, 1.0),
            mean=IMAGENET_MEAN,  # (0.5, 0.5, 0.5) for ImageNet-22k
            std=IMAGENET_STD,
        ),
        optim=OptimConfig(
            lr=1.5e-3,  # of the batch of 2048; not scaled with it
            min_lr=1e-5,
            warmup_epochs=10,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            clip=3.0,
        ),
        train=TrainConfig(
            epochs=800,
            batch_size=2048,
            micro_batch=128,  # 16 GPUs x 128 in the released command line; fewer GPUs accumulate
            zero_stage=1,
            output=Path("runs") / name,
        ),
        evaluate=EvaluateConfig(knn_every=20),
    )


if __name__ == "__main__":
    launch(recipe)
