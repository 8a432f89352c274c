"""`pytest benchmarks`: the options, the shared state and the table at the end. The work is in `harness/bench`."""

import sys
from pathlib import Path

import pytest
from bench import plugin

# `python -m pytest` puts the repository's root on the path, where transformers would take our folder `kernels` for the
# package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parents[1]]

pytest_addoption = plugin.add_options
SESSION = pytest.StashKey[plugin.Session]()


def pytest_configure(config: pytest.Config) -> None:
    """Open the session."""
    config.stash[SESSION] = plugin.open_session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Turn cases into tests."""
    plugin.generate(metafunc, dry=metafunc.config.getoption("--dry"))


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> plugin.Session:
    """What the tests of this run share."""
    return request.config.stash[SESSION]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table last."""
    session = config.stash[SESSION]
    if session.written or session.absent:
        terminalreporter.section("vitrail")
        terminalreporter.write_line(plugin.summary(session))
