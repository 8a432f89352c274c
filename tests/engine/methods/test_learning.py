"""What the methods on two views make of the bundled digits within a few hundred steps."""

import learning
import pytest
import training

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return training.run_case("learn", tmp_path_factory.mktemp("learning"), ranks=1, script=learning.__file__)


@pytest.mark.parametrize("name", ["simclr", "moco_v3"])
def test_negatives_teach_digits(runs, name):
    run = runs[name]
    print(name, run)
    assert run["knn"][-1] > run["untrained"]["knn"] + 0.05
    assert "collapse" not in run["alarms"]


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_methods_without_negatives_do_not_collapse(runs, name):
    run, collapsed = runs[name], runs["no stop-gradient"]
    print(name, run)
    assert run["rankme"][-1] > 2 * collapsed["rankme"][-1]
    assert run["feature_std"][-1] > 0.5
    assert run["knn"][-1] > 0.15  # of ten classes
    assert "collapse" not in run["alarms"]


def test_a_collapse_is_seen(runs):
    """SimSiam with a gradient to both sides (arXiv 2011.10566, section 4.1)."""
    run = runs["no stop-gradient"]
    print(run)
    assert run["rankme"][-1] < 2
    assert "collapse" in run["alarms"]
