"""The momentum of teachers over a run."""

import pytest

from vitrail.engine.methods.schedules import cosine_momentum


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.99), (0.5, 0.9900000685), (40, 0.9904322727), (150, 0.995), (300, 1.0)]
)
def test_momentum_of_moco_v3_over_300_epochs(epoch, expected):
    assert cosine_momentum(epoch / 300, 0.99) == pytest.approx(expected, rel=0, abs=5e-11)
