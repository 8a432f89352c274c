"""A training step of MAE beside transformers' ViTMAE, from ViT-S to ViT-H, eager and compiled."""

from bench import steps
from bench.environment import device

ALL = ("vitrail", "transformers", "vitrail compiled", "transformers compiled")
PLAIN = ("vitrail", "transformers")

# The most telling first: a budget of time cuts from the end. Two rounds or three for the pair that is quoted. On a CPU
# our compiled blocks are left out: they take more than a minute to compile and are no faster.
CASES = {
    "cpu": (
        ("small", 16, {**dict.fromkeys(PLAIN, 3), "transformers compiled": 1}, 5),
        ("base", 8, dict.fromkeys(PLAIN, 1), 3),
        ("large", 4, dict.fromkeys(PLAIN, 1), 2),
        ("huge", 2, dict.fromkeys(PLAIN, 1), 2),
    ),
    "cuda": (
        ("huge", 256, {**dict.fromkeys(PLAIN, 2), "vitrail compiled": 1, "transformers compiled": 1}, 10),
        ("large", 256, dict.fromkeys(ALL, 1), 10),
        ("base", 512, dict.fromkeys(ALL, 1), 10),
        ("small", 1024, dict.fromkeys(ALL, 1), 10),
    ),
}

test_mae_step = steps.measures(
    [
        steps.StepCase(
            op="mae_step",
            name=f"{steps.MODELS[model][0]} batch {batch}",
            model=model,
            batch=batch,
            rounds=rounds,
            steps=count,
            warmup=1 if device().type == "cpu" else 3,
        )
        for model, batch, rounds, count in CASES[device().type]
    ]
)
