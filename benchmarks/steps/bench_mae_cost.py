"""What a training step of MAE costs as images grow, and as more patches are hidden."""

from bench import steps
from bench.environment import device

CPU = device().type == "cpu"
MODEL, BATCH, STEPS = ("small", 4, 4) if CPU else ("large", 128, 10)

# Image size and share of hidden patches; the usual point first, since both series contain it.
POINTS = ((224, 0.75), (160, 0.75), (288, 0.75), (224, 0.5), (224, 0.9))

test_mae_cost = steps.measures(
    [
        steps.StepCase(
            op="mae_cost",
            name=f"{steps.MODELS[MODEL][0]} batch {BATCH}, {size} pixels, {100 * ratio:.0f} % masked",
            model=MODEL,
            batch=BATCH,
            rounds={"vitrail": 1, "transformers": 1},
            steps=STEPS,
            warmup=1 if CPU else 3,
            image_size=size,
            mask_ratio=ratio,
        )
        for size, ratio in POINTS
    ]
)
