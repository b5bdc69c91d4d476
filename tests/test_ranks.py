"""The curve does not depend on how a batch is divided over micro-batches and ranks.

All ways of a world size run in one launch.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from several_runs import FAULTS, train_all
from training_tools import PUZZLES, TEXT, contents, finish, metrics_of, start

from utils.checkpoint.format import Checkpoint

WAYS = {
    "one": (1, ""),
    "micro": (1, "grad_accum_steps=2"),
    "two": (2, ""),
    "fsdp": (2, "parallel=fsdp"),
    "fsdp micro": (2, "parallel=fsdp grad_accum_steps=2"),
}
SHARED = """run_name=ranks device_type=cpu arch.forward_dtype=float64 max_steps=20 lr=1e-3
    lr_warmup_steps=0 evaluators=[] log_interval=1 global_batch_size=8 ema_rate=0.9 epochs=40
    eval_max_batches=3 eval_batch_size=8""".split()

Item = tuple[str, str, str | None]
"""Kind of corpus, way, fault."""


def train_ways(items: Iterable[Item], corpora: dict[str, Path], folder: Path) -> dict[Item, Path]:
    """Train each item, the ways of one rank in this process; return the runs' folders."""
    folders, launches = {}, {1: [], 2: []}
    for kind, way, fault in items:
        ranks, extra = WAYS[way]
        run = folder / f"{kind} {way} {fault}"
        options = TEXT if kind == "text" else PUZZLES
        overrides = [f"data_paths=[{corpora[kind]}]", f"checkpoint_path='{run}'", *SHARED, *options]
        launches[ranks].append((fault, [*overrides, *extra.split()]))
        folders[kind, way, fault] = run
    train_all(launches[1])
    if launches[2]:
        code, out, err = finish(
            start(json.dumps(launches[2]), ranks=2, script="tests/several_runs.py"), timeout=500
        )
        assert code == 0, out + err
    return folders


def differences(one: Path, other: Path) -> dict[str, float]:
    """How far a run is from another: in losses, gradient norms and weights."""
    found = {}
    shown = ("lm_loss", "grad_norm", "steps", "examples")
    for metric in (*(f"train/{metric}" for metric in shown), "eval/all/lm_loss"):
        a, b = (metrics_of(run, metric) for run in (one, other))
        found[metric] = max(abs(x - y) for x, y in zip(a, b, strict=True))
    a, b = (contents(run / "step_20") for run in (one, other))
    assert {key for key in a if "carry" not in key} == {key for key in b if "carry" not in key}
    for key in a:
        if key.startswith(("model/", "ema/")) or "exp_avg" in key:
            found[key] = (a[key] - b[key]).abs().max().item()
    return found


def stream_position(run: Path) -> dict:
    return Checkpoint(run / "step_20").json("state.json")["stream"]


@pytest.mark.canary
def test_two_ranks_train_as_one_does(text_corpus, tmp_path):
    items = [("text", way, None) for way in ("one", "two")]
    one, two = train_ways(items, {"text": text_corpus}, tmp_path).values()
    assert {k: v for k, v in differences(one, two).items() if not v <= 1e-7} == {}
    assert stream_position(one) == stream_position(two)


@pytest.fixture(scope="module")
def runs(text_corpus, puzzle_corpus, tmp_path_factory) -> dict[Item, Path]:
    items = [(kind, way, None) for kind in ("text", "puzzles") for way in WAYS]
    items += [("text", "two", fault) for fault in FAULTS]
    corpora = {"text": text_corpus, "puzzles": puzzle_corpus}
    return train_ways(items, corpora, tmp_path_factory.mktemp("ways"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "puzzles"])
def test_ranks_and_micro_batches_leave_the_curve_alone(kind, runs):
    one = runs[kind, "one", None]
    for way in set(WAYS) - {"one"}:
        other = runs[kind, way, None]
        off = {name: value for name, value in differences(one, other).items() if not value <= 1e-7}
        assert off == {}, way
        assert stream_position(one) == stream_position(other)
    steps = metrics_of(one, "train/steps")
    assert len(set(steps)) > 2, "rows should halt at different steps"
    table = contents(one / "step_20")["model/model.inner.puzzle_emb.weights"]
    assert table.any(), "the identifier embedding was never trained"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_of_ranks_sees_faults(fault, runs):
    """The faults are put in on purpose; the comparison must be able to go red."""
    found = differences(runs["text", "one", None], runs["text", "two", fault])
    assert max(found.values()) > 1e-6
