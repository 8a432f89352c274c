"""Rows as two machines might have left them: with faster peers, absent peers, and steps that did not fit."""

from dataclasses import replace

from bench.rows import Row

CPU = {
    "device": "Some CPU",
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.15.0",
    "peers": {"timm": "1.0"},
    "commit": "a" * 40,
    "code": "c" * 16,
}
GPU = {**CPU, "device": "NVIDIA H200", "driver": "600.1"}


def compared(times: dict[str, float], make) -> list[Row]:
    """A row for each implementation, with its speed over every other one."""
    rows = []
    for name, own in times.items():
        ratios = {other: [time / own, 0.93 * time / own, 1.07 * time / own] for other, time in times.items()}
        del ratios[name]
        rows.append(replace(make(name, own), speed_over=ratios))
    return rows


def op(name: str, case: str, direction: str, times: dict[str, float], *, cache="hot", environment=CPU) -> list[Row]:
    def make(implementation: str, time: float) -> Row:
        return Row(
            suite="kernels",
            op=name,
            case=case,
            implementation=implementation,
            shape={"batch": 16},
            dtype="bfloat16",
            direction=direction,
            cache=cache,
            timer="wall",
            samples=9,
            median_s=time,
            quantiles_s=[0.95 * time, 1.05 * time],
            peak_bytes=3 << 20,
            bytes=1 << 20,
            gb_per_s=(1 << 20) / time / 1e9,
            floor_s=1e-4,
            bound="memory",
            roofline=1e-4 / time,
            absent={"xformers": "runs on CUDA only"},
            environment=environment,
            date="2026-11-24T10:00:00+00:00",
        )

    return compared(times, make)


def step(op: str, case: str, times: dict[str, float], *, batch=16, length=196, masked=147, **fields) -> list[Row]:
    def make(implementation: str, time: float) -> Row:
        return Row(
            suite="steps",
            op=op,
            case=case,
            implementation=implementation,
            shape={"batch": batch, "patch": 16, "visible": length - masked, "masked": masked},
            dtype="bfloat16",
            direction="step",
            cache="hot",
            median_s=time,
            quantiles_s=[0.9 * time, 1.1 * time],
            peak_bytes=int(time * 2**30),
            extra={"images_per_s": batch / time, "first_step_s": 2 * time},
            environment=CPU,
            date="2026-11-25T10:00:00+00:00",
            **fields,
        )

    return compared(times, make)


def failed(rows: list[Row]) -> list[Row]:
    """The same, out of memory."""
    nothing = {
        "median_s": None,
        "quantiles_s": None,
        "peak_bytes": None,
        "speed_over": {},
        "extra": {"limit_bytes": 4 << 30},
    }
    return [replace(row, outcome="out of memory", **nothing) for row in rows]


def loader(case: str, rates: dict[str, float]) -> list[Row]:
    def make(implementation: str, time: float) -> Row:
        return Row(
            suite="data",
            op="loader",
            case=case,
            implementation=implementation,
            shape={"batch": 8},
            dtype="uint8",
            direction="pass",
            cache="hot",
            median_s=time,
            quantiles_s=[0.9 * time, 1.1 * time],
            extra={"images_per_s": 1 / time, "images_per_s_per_core": 0.5 / time},
            environment=CPU,
            date="2026-11-25T10:00:00+00:00",
        )

    return compared({name: 1 / rate for name, rate in rates.items()}, make)


def cpu_rows() -> list[Row]:
    """A machine where everything was measured; the op `gather` is slower than a peer, and large batches do not fit."""
    times = {"vitrail": 1.0, "vitrail compiled": 0.9, "transformers": 1.5, "transformers compiled": 0.95}
    rows = [
        *op("gather", "ViT-B/16", "forward", {"vitrail": 4e-3, "eager": 6e-3, "compiled": 1e-3}),
        *op("gather", "ViT-H/14", "forward+backward", {"vitrail": 4e-3, "eager": 5e-3, "compiled": 8e-3}),
        *op("loss", "ViT-B/16", "forward", {"vitrail": 2e-3, "eager": 9e-3, "timm": 7e-3}),
        *step("mae_step", "ViT-S/16 batch 16", times),
        *step("mae_batch", "ViT-S/16 batch 8", {"vitrail": 0.5, "transformers": 0.8}, batch=8),
        *step("mae_batch", "ViT-S/16 batch 16", {"vitrail": 1.0, "transformers": 1.6}),
        *step("mae_batch", "ViT-S/16 batch 32", {"vitrail": 2.0}, batch=32),
        *failed(step("mae_batch", "ViT-S/16 batch 32", {"transformers": 3.2}, batch=32)),
        *step("mae_cost", "ViT-S/16, 160 pixels", {"vitrail": 0.3, "transformers": 0.4}, length=100, masked=75),
        *step("mae_cost", "ViT-S/16, 224 pixels", {"vitrail": 1.0, "transformers": 1.5}),
        *step("mae_cost", "ViT-S/16, 90 % masked", {"vitrail": 0.8, "transformers": 1.3}, masked=177),
        *loader("MAE views", {"DALI": 300, "Pillow": 150, "torchvision": 180}),
        *loader("Flip alone", {"DALI": 30000, "Pillow": 15000, "torchvision": 18000}),
    ]
    constant = replace(rows[0], op="roofline", case="copy", implementation="torch", dtype="uint8", speed_over={})
    return [*rows, replace(constant, cache="cold", absent={})]


def gpu_rows() -> list[Row]:
    """A machine with a GPU and ops alone, in both states of the cache."""
    times = {"vitrail": 2e-5, "eager": 6e-5}
    warm = {"vitrail": 1e-5, "eager": 7e-5}
    return [
        *op("loss", "ViT-B/16", "forward", times, cache="cold", environment=GPU),
        *op("loss", "ViT-B/16", "forward", warm, environment=GPU),
    ]
