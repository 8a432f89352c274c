"""A training step of DINO, small crops included, beside one in plain PyTorch, as the released code computes it."""

from bench import steps
from bench.environment import device

CPU = ("vitrail", "plain PyTorch", "plain PyTorch, explicit attention")
GPU = (
    "vitrail",
    "vitrail checkpointed",
    "plain PyTorch",
    "plain PyTorch compiled",
    "plain PyTorch, explicit attention",
)

# Images of a step, with two large and eight small crops each. Smallest first on a GPU: there nobody lacks memory.
CASES = {
    "cpu": (("small", 4, dict.fromkeys(CPU, 3), 3),),
    "cuda": (
        ("small", 64, dict.fromkeys(GPU, 1), 10),
        ("small", 256, dict.fromkeys(GPU, 1), 5),
        ("base", 64, dict.fromkeys(GPU, 1), 5),
    ),
}


def cases(kind: str) -> list[steps.StepCase]:
    return [
        steps.StepCase(
            op="dino_step",
            name=f"{steps.MODELS[model][0]} batch {batch}",
            family="dino",
            model=model,
            batch=batch,
            rounds=rounds,
            steps=count,
            warmup=1 if kind == "cpu" else 3,
        )
        for model, batch, rounds, count in CASES[kind]
    ]


test_dino_step = steps.measures(cases(device().type))
