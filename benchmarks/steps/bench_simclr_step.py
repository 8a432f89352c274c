"""A training step of SimCLR beside lightly's example on timm's ViT; its definition is lightly's for both."""

from bench import steps
from bench.environment import device

CPU = ("vitrail", "lightly", "lightly, explicit attention")
ALL = ("vitrail", "vitrail checkpointed", "lightly")

# Images of a step, two views each. On a GPU only with checkpointing does the largest batch fit for certain.
CASES = {
    "cpu": (("small", 32, dict.fromkeys(CPU, 3), 3),),
    "cuda": (("base", 1024, dict.fromkeys(ALL, 1), 5), ("base", 256, dict.fromkeys(ALL, 1), 10)),
}


def cases(kind: str) -> list[steps.StepCase]:
    return [
        steps.StepCase(
            op="simclr_step",
            name=f"{steps.MODELS[model][0]} batch {batch}",
            family="simclr",
            model=model,
            batch=batch,
            rounds=rounds,
            steps=count,
            warmup=1 if kind == "cpu" else 3,
        )
        for model, batch, rounds, count in CASES[kind]
    ]


test_simclr_step = steps.measures(cases(device().type))
