"""The losses as modules."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .clip_loss import clip_loss
from .features import check_temperature
from .groups import check_group
from .info_nce_loss import info_nce_loss
from .koleo_loss import koleo_loss
from .nt_xent_loss import nt_xent_loss
from .prototype_cross_entropy import prototype_cross_entropy, update_center_
from .prototype_cross_entropy.op import Prototypes
from .sinkhorn_knopp import sinkhorn_center

CENTERING = ("mean", "sinkhorn", "none")


class NTXentLoss(nn.Module):
    """SimCLR's loss as a module: see `nt_xent_loss`.

    Args:
        temperature: Divisor of the cosines.
        group: Process group over which views are gathered, `torch.distributed.group.WORLD` for all processes; None for
            this process alone. Gradients averaged over the ranks are then those of the whole batch.
        impl: `auto`, `triton` or `reference`.

    Raises:
        TypeError: `group` is not a process group.
        ValueError: The temperature is not a finite positive number.
    """

    def __init__(self, temperature: float = 0.1, group: dist.ProcessGroup | None = None, impl: str = "auto") -> None:
        super().__init__()
        check_group(group)
        self.temperature, self.group, self.impl = check_temperature("temperature", temperature), group, impl

    def extra_repr(self) -> str:
        """Returns the settings."""
        return f"temperature={self.temperature}, gathers={self.group is not None}, impl={self.impl!r}"

    def forward(self, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        """Returns the mean over this process's 2 N views of z1, z2 [N, d]."""
        return nt_xent_loss(z1, z2, self.temperature, group=self.group, impl=self.impl)


class InfoNCELoss(nn.Module):
    """The MoCo family's loss as a module: see `info_nce_loss`.

    Args:
        temperature: Divisor of the cosines.
        group: Process group whose ranks' keys are negatives too; None for this process alone.
        impl: `auto`, `triton` or `reference`.

    Raises:
        TypeError: `group` is not a process group.
        ValueError: The temperature is not a finite positive number.
    """

    def __init__(self, temperature: float = 0.2, group: dist.ProcessGroup | None = None, impl: str = "auto") -> None:
        super().__init__()
        check_group(group)
        self.temperature, self.group, self.impl = check_temperature("temperature", temperature), group, impl

    def extra_repr(self) -> str:
        """Returns the settings."""
        return f"temperature={self.temperature}, gathers={self.group is not None}, impl={self.impl!r}"

    def forward(self, q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the mean over the queries q [N, d] against keys k [N, d], or these and a queue [M, d]."""
        return info_nce_loss(q, k, self.temperature, group=self.group, queue=queue, impl=self.impl)


class CLIPLoss(nn.Module):
    """The symmetric contrastive loss with a learned temperature: see `clip_loss`.

    Args:
        temperature: At the start; CLIP's is 0.07.
        max_scale: Largest factor of the cosines; CLIP's is 100. At the limit the gradient to the scale is zero.
        learned: Whether the temperature is learned.
        group: Process group over which features are gathered; None for this process alone.
        impl: `auto`, `triton` or `reference`.

    Attributes:
        log_scale: 0-d parameter, the logarithm of the factor of the cosines; exempt it from weight decay.

    Raises:
        TypeError: `group` is not a process group.
        ValueError: The temperature is not a finite positive number.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        max_scale: float = 100.0,
        learned: bool = True,
        group: dist.ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_group(group)
        scale = torch.tensor(1 / check_temperature("temperature", temperature))
        self.log_scale = nn.Parameter(scale.log(), requires_grad=learned)
        self.max_scale, self.group, self.impl = max_scale, group, impl

    def extra_repr(self) -> str:
        """Returns the settings."""
        return f"max_scale={self.max_scale}, gathers={self.group is not None}, impl={self.impl!r}"

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Returns the mean over this process's N rows of a, b [N, d] and both directions."""
        scale = self.log_scale.exp().clamp(max=self.max_scale)
        return clip_loss(a, b, scale, group=self.group, impl=self.impl)


class KoLeoLoss(nn.Module):
    """The spreading regulariser as a module: see `koleo_loss`.

    Args:
        eps: Added inside the distance and inside the logarithm.
        impl: Implementation of the search for neighbours.
    """

    def __init__(self, eps: float = 1e-8, impl: str = "auto") -> None:
        super().__init__()
        self.eps, self.impl = eps, impl

    def extra_repr(self) -> str:
        """Returns the settings."""
        return f"eps={self.eps}, impl={self.impl!r}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the loss of features x [N, d]."""
        return koleo_loss(x, eps=self.eps, impl=self.impl)


class PrototypeCrossEntropy(nn.Module):
    """Cross-entropy against a linear teacher, with the state that its centring needs: see `prototype_cross_entropy`.

    Call the module for the loss, and `update_center` afterwards, once the optimiser has made the step: the loss of a
    step uses the centre of the steps before (DINO's rule).

    Args:
        num_prototypes: Number K of prototypes.
        student_temp: Divisor of the student's logits.
        centering: `mean` subtracts the moving mean of the teacher's logits (DINO, EsViT, iBOT); `sinkhorn` balances the
            prototypes over the batch (SwAV, DINOv2); `none` does neither.
        center_momentum: Share of the old centre in the moving mean.
        iterations: Of Sinkhorn-Knopp.
        normalized: Promises unit rows of features and prototypes, which saves the softmaxes their search for a maximum.
        group: Process group over whose teacher rows centres are formed; None for this process alone. The loss itself is
            the mean over this process's rows.
        impl: `auto`, `triton`, `chunked` or `reference`.

    Attributes:
        center: [K] float32 buffer, saved with the state dict.

    Raises:
        TypeError: `group` is not a process group.
        ValueError: `centering` or a number is out of range.
    """

    center: torch.Tensor

    def __init__(
        self,
        num_prototypes: int,
        student_temp: float = 0.1,
        centering: str = "mean",
        center_momentum: float = 0.9,
        iterations: int = 3,
        normalized: bool = False,
        group: dist.ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if centering not in CENTERING:
            raise ValueError(f"centering must be one of {', '.join(map(repr, CENTERING))}, got {centering!r}")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must lie between 0 and 1, got {center_momentum}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        check_group(group)
        self.student_temp = check_temperature("student_temp", student_temp)
        self.centering, self.center_momentum, self.iterations = centering, center_momentum, iterations
        self.normalized, self.group, self.impl = normalized, group, impl
        self.register_buffer("center", torch.zeros(num_prototypes))

    def extra_repr(self) -> str:
        """Returns the settings."""
        return (
            f"num_prototypes={len(self.center)}, student_temp={self.student_temp}, centering={self.centering!r}, "
            f"normalized={self.normalized}, impl={self.impl!r}"
        )

    def forward(
        self,
        student: torch.Tensor,
        student_prototypes: Prototypes,
        teacher: torch.Tensor,
        teacher_prototypes: Prototypes,
        teacher_temp: float,
        *,
        match: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the mean over all pairs of rows, or with `weight` the weighted sum.

        Args:
            student: [R, d].
            student_prototypes: [K, d] or the layer.
            teacher: [Q, d'].
            teacher_prototypes: [K, d'] or the layer.
            teacher_temp: Divisor of the teacher's logits in this step.
            match: [R] or [U, R], as in `prototype_cross_entropy`.
            weight: [R], likewise.
        """
        center: torch.Tensor | None = None
        if self.centering == "mean":
            center = self.center
        elif self.centering == "sinkhorn":
            passes = "auto" if self.impl == "chunked" else self.impl
            center = sinkhorn_center(
                *(teacher, teacher_prototypes, teacher_temp, self.iterations), group=self.group, impl=passes
            )
        options: dict[str, Any] = {"center": center, "match": match, "weight": weight, "impl": self.impl}
        return prototype_cross_entropy(
            *(student, student_prototypes, teacher, teacher_prototypes),
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
            # Sinkhorn's centre is logarithms of masses, of any size.
            normalized=self.normalized and self.centering != "sinkhorn",
            **options,
        )

    def update_center(self, teacher: torch.Tensor, teacher_prototypes: Prototypes) -> None:
        """Moves the mean centre towards that of these teacher rows [Q, d'], of all ranks; else does nothing."""
        if self.centering == "mean":
            update_center_(self.center, teacher, teacher_prototypes, self.center_momentum, group=self.group)
