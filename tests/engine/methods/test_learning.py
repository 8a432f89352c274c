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
    assert run["knn"][-1] > run["untrained"]["knn"] + 0.03
    assert "collapse" not in run["alarms"]


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_methods_without_negatives_do_not_collapse(runs, name):
    run, collapsed = runs[name], runs["agreement"]
    assert run["rankme"][-1] > 2 * collapsed["rankme"][-1]
    assert run["feature_std"][-1] > 0.4
    assert run["knn"][-1] > run["untrained"]["knn"]
    assert "collapse" not in run["alarms"]


def test_a_collapse_is_seen(runs):
    """Two views that are only to agree: all images get the same features."""
    run = runs["agreement"]
    assert run["rankme"][-1] < 2
    assert run["feature_std"][-1] < 0.1
    assert "collapse" in run["alarms"]
