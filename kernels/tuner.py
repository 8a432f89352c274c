"""The offline tuner: measures the candidates of tunable kernels on the GPU at hand, and writes the file to look up.

For each call that an op names, every candidate must compile without spills and be as accurate as the default against
float64. Those are timed alone, one launch with a cold L2 cache; the fastest few are timed again in turns with the
default, and one replaces it only if it is faster by `GAIN`.
"""

import collections
import functools
import importlib
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import resources
from .launch import Launch, Passes, launches_of
from .tuning import Config, Key, Tunable, config_file, forced, forget

GAIN = 0.03  # of the default's time that a candidate must save
ROUNDS = 5  # of timing the finalists in turns
FINALISTS = 3  # besides the default
FACTOR = 2.0  # on the default's error
FLOOR = 4 * torch.finfo(torch.float32).eps  # of the largest value, added to the allowed error
DRY_CAPABILITY = 90

Timer = Callable[[Launch], float]
Inspector = Callable[[Launch], str | None]


@dataclass(frozen=True)
class Entry:
    """What was measured for one key of one kernel, as it stands in the file.

    Attributes:
        kernel: Name of the kernel.
        key: Of the launch.
        config: The fastest configuration, or the default.
        us: Median time of one launch in microseconds.
        default_us: The same for the default configuration, timed in turns with it.
        triton: Version.
        torch: Version.
        date: Of the measurement.
    """

    kernel: str
    key: Key
    config: Config
    us: float
    default_us: float
    triton: str
    torch: str
    date: str


@dataclass(frozen=True)
class Result:
    """The outcome for one kernel of one call.

    Attributes:
        case: Name of the call.
        entry: For the file.
        refused: Why candidates were not timed, one sentence each.
    """

    case: str
    entry: Entry
    refused: list[str]


def kernel_modules() -> dict[str, ModuleType]:
    """Returns the kernel modules that have something to tune, by op. They hold TUNABLES and tuning_calls()."""
    modules = {name.split(".")[-2]: importlib.import_module(name) for name in resources.KERNEL_MODULES}
    return {op: module for op, module in modules.items() if getattr(module, "TUNABLES", ())}


def tune(
    op: str, device: torch.device, timer: Timer | None = None, inspector: Inspector | None = None
) -> Iterator[Result]:
    """Measures every tunable kernel of an op at every call that the op names.

    Args:
        op: Name of the op.
        device: Where to measure.
        timer: Returns the time of a launch in microseconds; None for `time_launch`.
        inspector: Returns why a launch is refused, or None; None for `inspect`.

    Yields:
        One result for each kernel and key.
    """
    module = kernel_modules()[op]
    torch.manual_seed(0)
    seen: set[tuple[str, str]] = set()
    for case, build in module.tuning_calls().items():
        passes: Passes = build(device=device)
        for tunable, which in ((tunable, which) for tunable in module.TUNABLES for which in passes):
            trial = Trial(tunable, module, which, passes[which])
            key = trial.key()
            if key is None or (tunable.kernel, str(key)) in seen:
                continue
            seen.add((tunable.kernel, str(key)))
            launches, refused = accepted(trial, inspector or inspect)
            times = fastest(launches, tunable.default, timer or time_launch)
            yield Result(case, _entry(tunable.kernel, key, *times), refused)


@dataclass(frozen=True)
class Trial:
    """One tunable kernel in one pass of one call.

    Attributes:
        tunable: The kernel.
        module: Of its launchers.
        which: The pass, `forward` or `backward`.
        args: Of the pass.
    """

    tunable: Tunable
    module: ModuleType
    which: str
    args: tuple[Any, ...]

    def key(self) -> Key | None:
        """Returns the key of the kernel's launch, or None if the pass does not launch it."""
        with forced(self.tunable, self.tunable.default) as keys:
            launches_of(self.module, {self.which: self.args})
        return keys[0] if keys else None

    def launch(self, config: Config) -> Launch:
        """Returns the kernel's launch under a configuration, not made. The pass must launch it."""
        with forced(self.tunable, config):
            launches = launches_of(self.module, {self.which: self.args})
        kernel = getattr(self.module, self.tunable.kernel)
        return next(launch for launch in launches if launch.kernel is kernel)

    def run(self, config: Config) -> tuple[torch.Tensor, ...]:
        """Returns the results of the pass under a configuration, NaN where it writes nothing."""
        before = torch.are_deterministic_algorithms_enabled()
        # Fills fresh memory, which would hold the right values where an earlier candidate wrote its results.
        torch.use_deterministic_algorithms(True)
        try:
            with forced(self.tunable, config):
                return _flat(getattr(self.module, self.which)(*self.args))
        finally:
            torch.use_deterministic_algorithms(before)

    def truth(self) -> tuple[torch.Tensor, ...]:
        """Returns the reference's results in float64."""
        reference = importlib.import_module(f"vitrail.kernels.{self.tunable.op}.reference")
        return _flat(getattr(reference, self.which)(*map(_double, self.args)))


def accepted(trial: Trial, inspector: Inspector) -> tuple[list[tuple[Config, Launch]], list[str]]:
    """Returns the configurations worth timing with their launches, the default first, and why others are refused.

    Candidates that launch the same as an earlier one (a tile wider than the row is cut to it) are left out.
    """
    default = trial.tunable.default
    truth = trial.truth()
    limits = [_limits(*pair) for pair in zip(trial.run(default), truth, strict=True)]
    launches: list[tuple[Config, Launch]] = []
    refused: list[str] = []
    seen: list[Any] = []
    for config in (default, *(config for config in trial.tunable.candidates if config != default)):
        launch = trial.launch(config)
        if (launch.grid, launch.options) in seen:
            continue
        seen.append((launch.grid, launch.options))
        if config != default:
            reason = inspector(launch) or inaccuracy(trial.run(config), truth, limits)
            if reason:
                refused.append(f"{config}: {reason}")
                continue
        launches.append((config, launch))
    return launches, refused


def fastest(launches: list[tuple[Config, Launch]], default: Config, timer: Timer) -> tuple[Config, float, float]:
    """Returns the configuration to use, its time and the default's, in microseconds.

    All are timed once. The fastest few and the default are then timed in turns, so that a change of clocks or a
    neighbour's load falls on all alike, and a lucky first timing decides nothing.
    """
    first = [timer(launch) for _, launch in launches]
    order = sorted(range(len(launches)), key=lambda index: first[index])
    finalists = [index for index in order if launches[index][0] != default][:FINALISTS]
    base = next(index for index, (config, _) in enumerate(launches) if config == default)
    times: dict[int, list[float]] = collections.defaultdict(list)
    for _ in range(ROUNDS):
        for index in (base, *finalists):
            times[index].append(timer(launches[index][1]))
    medians = {index: statistics.median(values) for index, values in times.items()}
    best = min(medians, key=lambda index: medians[index])
    if medians[best] > (1 - GAIN) * medians[base]:
        best = base
    return launches[best][0], medians[best], medians[base]


def time_launch(launch: Launch) -> float:
    """Returns the median time of one launch with a cold L2 cache, in microseconds."""
    from triton.testing import do_bench

    milliseconds: float = do_bench(lambda: _make(launch), warmup=10, rep=50, return_mode="median")
    return 1000 * milliseconds


def inspect(launch: Launch) -> str | None:
    """Makes a launch and returns why its compiled kernel is refused, or None."""
    from triton.errors import TritonError

    try:
        compiled = _make(launch)
    except TritonError as error:  # it does not compile, or asks for more than the GPU has
        return str(error).partition("\n")[0]
    return f"it spills ({compiled.n_spills} words)" if compiled.n_spills else None


def _make(launch: Launch) -> Any:
    return launch.kernel[launch.grid](*launch.args, **launch.options)


def _limits(default: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Returns the largest error and root mean square error that a candidate may have, given the default's result."""
    if truth.numel() == 0 or not truth.is_floating_point():
        return 0.0, 0.0
    floor = FLOOR * truth.abs().max().item()
    largest, mean = _errors(default, truth)
    return FACTOR * largest + floor, FACTOR * mean + floor


def inaccuracy(
    results: Iterable[torch.Tensor], truth: Iterable[torch.Tensor], limits: Iterable[tuple[float, float]]
) -> str | None:
    """Returns in which output a candidate is less accurate than it may be, or None. Integers must be right."""
    for index, (result, expected, (largest, mean)) in enumerate(zip(results, truth, limits, strict=True)):
        have = _errors(result, expected)
        if not (have[0] <= largest and have[1] <= mean):  # also where the error is NaN
            return f"output {index} is off by {have[0]:.3g} (root mean square {have[1]:.3g}), allowed {largest:.3g}"
    return None


def _errors(result: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    if truth.numel() == 0:
        return 0.0, 0.0
    error = result.double().sub_(truth).abs_()
    return error.max().item(), error.square().mean().sqrt().item()


def _double(value: Any) -> Any:
    """Returns an argument for the reference in float64: floating tensors and dtypes become float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) else value


def _flat(outputs: Any) -> tuple[torch.Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _entry(kernel: str, key: Key, config: Config, us: float, default_us: float) -> Entry:
    import triton

    versions = (triton.__version__, torch.__version__, date.today().isoformat())
    return Entry(kernel, key, config, round(us, 2), round(default_us, 2), *versions)


def prepare(folder: Path, op: str, device: torch.device) -> Path:
    """Returns the file of an op for the GPU `device`, in a folder that exists.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    path = config_file(folder, op, torch.cuda.get_device_name(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to")
    return path


def write(path: Path, device: torch.device, entries: list[Entry]) -> None:
    """Writes what was measured on the GPU `device`, in place of an earlier file."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    gpu = {"gpu": torch.cuda.get_device_name(device), "capability": capability, "driver": _driver()}
    whole = path.with_suffix(".tmp")
    whole.write_text(as_json(gpu, entries))
    os.replace(whole, path)
    forget()


def as_json(gpu: dict[str, str | None], entries: list[Entry]) -> str:
    """Formats a file, one line for each entry."""
    lines = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in entries)
    facts = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in gpu.items())
    return f'{{\n{facts}  "entries": [\n{lines}\n  ]\n}}\n'


def _driver() -> str | None:
    """Returns the version of NVIDIA's driver, or None where nvidia-smi cannot say."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


Candidate = tuple[str, str, int]  # op, kernel, number among the tunable's candidates


@functools.cache
def candidate_launches(ops: tuple[str, ...]) -> dict[tuple[Candidate, str], Launch]:
    """Returns the launches of every candidate at every call that is tuned, on meta tensors, by candidate and call.

    Those of one candidate that compile alike are there once.
    """
    launches: dict[tuple[Candidate, str], Launch] = {}
    seen: set[tuple[Candidate, str]] = set()
    for op, module in ((op, module) for op, module in kernel_modules().items() if op in ops):
        for case, build in module.tuning_calls().items():
            passes = build(device="meta")
            trials = (Trial(tunable, module, which, passes[which]) for tunable in module.TUNABLES for which in passes)
            for trial in trials:
                if trial.key() is None:
                    continue
                for number, config in enumerate(trial.tunable.candidates):
                    candidate, launch = (op, trial.tunable.kernel, number), trial.launch(config)
                    if (candidate, resources.variant(launch)) not in seen:
                        seen.add((candidate, resources.variant(launch)))
                        launches[candidate, case] = launch
    return launches


def compile_candidates(ops: tuple[str, ...]) -> dict[Candidate, list[resources.Resources]]:
    """Compiles every candidate of the given ops ahead of time, for cc 9.0, and returns what its variants use."""
    names = list(candidate_launches(ops))
    jobs = [(name, DRY_CAPABILITY) for name in names]
    used = resources.compile_all(functools.partial(candidate_launches, ops), jobs)
    table: dict[Candidate, list[resources.Resources]] = collections.defaultdict(list)
    for (candidate, _), entry in zip(names, used, strict=True):
        table[candidate].append(entry)
    return dict(table)
