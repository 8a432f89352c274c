"""Drop-in kernels for self-supervised vision transformers.

Importing this package needs torch alone. Triton and the compiled extension are imported by the first call that runs
them. `python -m vitrail.kernels` prints the environment and what each implementation supports.
"""

from .masked_patch_gather import masked_patch_gather
from .masked_patch_loss import masked_patch_loss
from .modules import MaskedPatchEmbed
from .random_masking import random_masking
from .registry import UnsupportedError, explain
from .restore_tokens import restore_tokens

__all__ = [
    "MaskedPatchEmbed",
    "UnsupportedError",
    "explain",
    "masked_patch_gather",
    "masked_patch_loss",
    "random_masking",
    "restore_tokens",
]
