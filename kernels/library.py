"""Registration with the PyTorch dispatcher, so that every pass is one opaque node under `torch.compile`."""

from collections.abc import Callable
from typing import Any

import torch

from .registry import Op

_LIBRARY = torch.library.Library("vitrail", "DEF")


def define(
    op: Op, which: str, arguments: str, returns: str, fake: Callable[..., Any], *, opaque: bool = True
) -> Callable[..., Any]:
    """Defines one pass of `op` as `torch.ops.vitrail.<name>`, or `<name>_backward`.

    The choice of implementation happens inside the op, on real tensors: a compiled graph stays the same whichever
    runs, and predicates see real strides. There is no autograd formula here; the public function supplies it.

    Args:
        op: The registry entry.
        which: `forward` or `backward`.
        arguments: Argument list of the schema, all positional and without defaults; `str impl` is appended.
        returns: Return type of the schema.
        fake: Builds outputs of the right shape, dtype and strides from the same arguments without `impl`.
        opaque: False makes eager calls go straight to the implementation: the dispatcher takes longer over a list of
            hundreds of tensors than over the rest.

    Returns:
        The callable op.
    """
    name = op.name if which == "forward" else f"{op.name}_{which}"
    _LIBRARY.define(f"{name}({arguments}, str impl) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        *call, impl = args
        return op.run(which, impl, *call)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"vitrail::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.vitrail, name).default
    if opaque:
        return overload
    return lambda *args: overload(*args) if torch.compiler.is_compiling() else run(*args)
