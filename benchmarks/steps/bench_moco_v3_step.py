"""A training step of MoCo v3 beside one in plain PyTorch, as the authors' code computes it on timm's ViT."""

from bench import steps
from bench.environment import device

CPU = ("vitrail", "plain PyTorch", "plain PyTorch, explicit attention")
ALL = ("vitrail", "vitrail checkpointed", "plain PyTorch")

# Images of a step, two views each. On a GPU only with checkpointing does the largest batch fit for certain.
CASES = {
    "cpu": (("small", 32, dict.fromkeys(CPU, 3), 3),),
    "cuda": (
        ("base", 1024, dict.fromkeys(ALL, 1), 5),
        ("large", 128, dict.fromkeys(ALL, 1), 10),
        ("base", 256, dict.fromkeys(ALL, 1), 10),
    ),
}


def cases(kind: str) -> list[steps.StepCase]:
    return [
        steps.StepCase(
            op="moco_v3_step",
            name=f"{steps.MODELS[model][0]} batch {batch}",
            family="moco_v3",
            model=model,
            batch=batch,
            rounds=rounds,
            steps=count,
            warmup=1 if kind == "cpu" else 3,
        )
        for model, batch, rounds, count in CASES[kind]
    ]


test_moco_v3_step = steps.measures(cases(device().type))
