"""A recipe of six tiny steps, started as any recipe is: `tiny_recipe.py <output> [flags]`."""

import os
import sys
from pathlib import Path

import training

from vitrail.engine.train import launch

if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as in `training.train`
    output, *flags = sys.argv[1:]
    launch(lambda: training.tiny_config(Path(output)), flags)
