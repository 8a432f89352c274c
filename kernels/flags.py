"""Every environment variable that changes what the kernels do, in one table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """An environment variable.

    Attributes:
        name: As set in the shell.
        default: What an unset variable means.
        effect: What a set one does.
    """

    name: str
    default: str
    effect: str


IMPL = Flag(
    name="VITRAIL_IMPL",
    default="auto",
    effect='What impl="auto" means: auto, cuda, triton, chunked or reference. A name that cannot run is an error.',
)

CONFIGS = Flag(
    name="VITRAIL_CONFIGS",
    default="tuned",
    effect="Where launch configurations come from: tuned (the package's files), default (none), or a folder that "
    "tune --output wrote. Read once, at the first launch.",
)

FLAGS = (
    IMPL,
    CONFIGS,
    Flag(
        name="VITRAIL_BUILD_EXT",
        default="auto",
        effect="Read by setup.py: 1 makes it an error if the compiled extension cannot be built, 0 leaves it out.",
    ),
    Flag(
        name="TRITON_INTERPRET",
        default="0",
        effect='1 runs Triton kernels on CPU tensors, slowly, when impl="triton" asks for them. Read at import.',
    ),
    Flag(
        name="TRITON_CACHE_DIR",
        default="~/.triton/cache",
        effect="Where compiled Triton kernels are kept between processes.",
    ),
)
