"""Tests of the XLA backend on XLA's own CPU; `make test-xla` runs them in their own environment."""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

collect_ignore_glob = [] if importlib.util.find_spec("torch_xla") else ["test_*.py"]

os.environ.setdefault("PJRT_DEVICE", "CPU")
# Programs that run for milliseconds need not be made fast; compiling them is most of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_modifyitems(items: list) -> None:
    """Those that wait for processes come last; their processes run from the start.

    Called with the items of the whole session, wherever they lie.
    """
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("slow")
    items.sort(key=lambda item: hasattr(getattr(item, "function", None), "waits_for"))


@pytest.fixture(scope="session", autouse=True)
def background(request, text_corpus, tmp_path_factory):
    """Runs what tests wait for, one after the other, beside the tests that do not wait."""
    waiting = [item.function for item in request.session.items]
    waiting = [test.waits_for for test in waiting if hasattr(test, "waits_for")]
    with ThreadPoolExecutor(1) as pool:
        yield {
            work: pool.submit(work, text_corpus, tmp_path_factory.mktemp(work.__name__))
            for work in waiting
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def outcome(request, background):
    """What the processes gave that this test waits for."""
    return background[request.function.waits_for].result()
