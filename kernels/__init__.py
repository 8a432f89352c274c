"""Drop-in kernels for self-supervised vision transformers.

Importing this package needs torch alone. Triton and the compiled extension are imported by the first call that runs
them. `python -m vitrail.kernels` prints the environment and what each implementation supports.
"""

from .adamw_ema import FusedAdamWEMA, adamw_ema_
from .bias_gelu import bias_gelu
from .clip_loss import clip_loss
from .info_nce_loss import info_nce_loss
from .knn_topk import knn_topk
from .koleo_loss import koleo_loss
from .lamb import FusedLAMB, lamb_
from .lars import FusedLARS, lars_
from .losses import CLIPLoss, InfoNCELoss, KoLeoLoss, NTXentLoss, PrototypeCrossEntropy
from .masked_patch_gather import masked_patch_gather
from .masked_patch_loss import masked_patch_loss
from .modules import MaskedPatchEmbed, WindowAttention
from .multi_tensor_ema import multi_tensor_ema_
from .multi_tensor_norm import multi_tensor_clip_, multi_tensor_norm
from .multi_tensor_scale import multi_tensor_scale_
from .nt_xent_loss import nt_xent_loss
from .packed_attention import packed_attention
from .prototype_cross_entropy import cross_view_match, prototype_cross_entropy, update_center_
from .random_masking import random_masking
from .region_match import nearest_neighbors, region_match, region_match_crops
from .registry import UnsupportedError, explain
from .restore_tokens import restore_tokens
from .sinkhorn_knopp import sinkhorn_center, sinkhorn_knopp
from .softmax_col_pass import softmax_col_pass
from .softmax_row_pass import softmax_row_pass
from .window_attention import window_attention

__all__ = [
    "CLIPLoss",
    "FusedAdamWEMA",
    "FusedLAMB",
    "FusedLARS",
    "InfoNCELoss",
    "KoLeoLoss",
    "MaskedPatchEmbed",
    "NTXentLoss",
    "PrototypeCrossEntropy",
    "UnsupportedError",
    "WindowAttention",
    "adamw_ema_",
    "bias_gelu",
    "clip_loss",
    "cross_view_match",
    "explain",
    "info_nce_loss",
    "knn_topk",
    "koleo_loss",
    "lamb_",
    "lars_",
    "masked_patch_gather",
    "masked_patch_loss",
    "multi_tensor_clip_",
    "multi_tensor_ema_",
    "multi_tensor_norm",
    "multi_tensor_scale_",
    "nearest_neighbors",
    "nt_xent_loss",
    "packed_attention",
    "prototype_cross_entropy",
    "random_masking",
    "region_match",
    "region_match_crops",
    "restore_tokens",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "softmax_col_pass",
    "softmax_row_pass",
    "update_center_",
    "window_attention",
]
