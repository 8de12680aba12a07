import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and small real models that lie beside the project on some machines; a fresh clone has none."""
    for place in (os.environ.get("LUTHIER_SHARED"), PROJECT.parent / "shared", PROJECT.parent.parent / "shared"):
        if place and (Path(place) / "models").is_dir():
            return Path(place)
    pytest.skip("no ../shared beside the project: real models and data are not committed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, but each notebook on its own: six long tests in one file would keep one process busy alone."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None

    class NotebooksApart(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_a_notebook_runs" in nodeid else super()._split_scope(nodeid)

    return NotebooksApart(config, log)
