"""A training step of EsViT, small crops included, beside one in plain PyTorch, as the released code computes it."""

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
    "cpu": (("tiny", 2, dict.fromkeys(CPU, 3), 3),),
    "cuda": (
        ("tiny", 32, dict.fromkeys(GPU, 1), 10),
        ("tiny", 128, dict.fromkeys(GPU, 1), 5),
        ("base", 8, dict.fromkeys(GPU, 1), 5),
    ),
}


def cases(kind: str) -> list[steps.StepCase]:
    return [
        steps.StepCase(
            op="esvit_step",
            name=f"{steps.SWINS[model][0]} batch {batch}",
            family="esvit",
            model=model,
            batch=batch,
            rounds=rounds,
            steps=count,
            warmup=1 if kind == "cpu" else 3,
        )
        for model, batch, rounds, count in CASES[kind]
    ]


test_esvit_step = steps.measures(cases(device().type))
