"""A training step of SiT, corruption included, beside one in plain PyTorch, as the released code computes it."""

from bench import steps
from bench.environment import device

CPU = ("vitrail", "plain PyTorch", "plain PyTorch, explicit attention", "plain PyTorch, explicit attention, corrupting")
GPU = ("vitrail", "vitrail checkpointed", *CPU[1:])

# Images of a step, with two views each. Smallest first on a GPU: there nobody lacks memory.
CASES = {
    "cpu": (("small", 16, dict.fromkeys(CPU, 3), 3),),
    "cuda": (
        ("small", 64, dict.fromkeys(GPU, 1), 10),
        ("small", 256, dict.fromkeys(GPU, 1), 5),
        ("base", 64, dict.fromkeys(GPU, 1), 5),
    ),
}


def cases(kind: str) -> list[steps.StepCase]:
    return [
        steps.StepCase(
            op="sit_step",
            name=f"{steps.MODELS[model][0]} batch {batch}",
            family="sit",
            model=model,
            batch=batch,
            rounds=rounds,
            steps=count,
            warmup=1 if kind == "cpu" else 3,
            # Over eight draws of weights and images, every implementation was up to 0.14 % away from float32's loss,
            # in either direction: at the start all images look alike, and batch normalisation magnifies rounding.
            agreement=3e-3,
        )
        for model, batch, rounds, count in CASES[kind]
    ]


test_sit_step = steps.measures(cases(device().type))
