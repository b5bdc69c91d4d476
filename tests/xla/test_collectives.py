"""What replicas tell one another: alone, split by XLA itself (SPMD), and as two."""

import json
import re
from pathlib import Path

from process_tools import HERE, after, in_background, run
from training_tools import contents, metrics_of
from xla_tools import TEXT, apart, differences, run_on

from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint


def programs(folder: Path, operation: str) -> int:
    """Compiled programs, out of those that XLA wrote down, which hold an operation."""
    files = list(folder.glob("*after_optimizations.txt"))
    assert files, "XLA wrote no program down"
    found = re.compile(rf" {operation}(-start)?\(")
    return sum(found.search(path.read_text("utf-8")) is not None for path in files)


def written_down(folder: Path) -> str:
    return (
        f"--xla_backend_optimization_level=0 --xla_dump_to={folder} --xla_dump_hlo_as_text "
        "--xla_dump_hlo_module_re=SyncTensorsGraph"
    )


ALONE = [*TEXT, "arch.forward_dtype=float64", "max_steps=4"]
TWO = [
    *TEXT, "arch.forward_dtype=float64", "max_steps=10", "eval_max_batches=2",
    "evaluators=[text@PerplexityEvaluator]", "grad_accum_steps=2", "eval_batch_size=8",
]  # fmt: skip


def all_reduce_alone(text_corpus, tmp_path) -> tuple[str, Path]:
    script = str(HERE / "all_reduce_alone.py")
    return run(
        script, str(text_corpus), str(tmp_path / "run"), *ALONE,
        XLA_ALWAYS_ALLREDUCE="1", XLA_FLAGS=written_down(tmp_path / "programs"),
    ), tmp_path  # fmt: skip


@after(all_reduce_alone)
def test_an_all_reduce_of_one_replica_changes_nothing(outcome, text_corpus, tmp_path):
    out, folder = outcome
    asked = int(re.search(r"all-reduces: (\d+)", out)[1])
    assert asked > 4 and programs(folder / "programs", "all-reduce") > 2
    plain = run_on(CPUBackend(), text_corpus, tmp_path, *ALONE)
    found = differences(plain, folder / "run", 4)
    assert max(found.values()) <= 1e-7, found


@in_background
def test_gradients_of_a_sharded_batch_are_those_of_one_device(text_corpus, tmp_path):
    out = run(
        str(HERE / "sharded_gradients.py"), str(text_corpus),
        CPU_NUM_DEVICES="2", XLA_FLAGS=written_down(tmp_path),
    )  # fmt: skip
    found = json.loads(out.splitlines()[-1])
    print(found)
    assert found["gradients"] <= 1e-6 and found["losses"] <= 1e-6
    assert found["largest gradient"] > 1e-2 and found["flags agree"]
    assert "devices=[2,1,1]" in found["carry"], "the rows are not split over the devices"
    assert programs(tmp_path, "all-reduce") > 0


def two_replicas(text_corpus, tmp_path) -> tuple[str, Path]:
    script = str(HERE / "two_replicas.py")
    return run(
        script, str(text_corpus), str(tmp_path / "run"), *TWO, CPU_NUM_DEVICES="2"
    ), tmp_path / "run"


@after(two_replicas)
def test_two_replicas_train_as_one(outcome, text_corpus, tmp_path):
    """All of training: gradients, identifiers, flags, figures of evaluation, checkpoints."""
    out, two = outcome
    assert "xla:0 on CPU (as the test asks), 2 ranks" in out
    one = run_on(CPUBackend(), text_corpus, tmp_path / "one", *TWO)
    for name in ("train/lm_loss", "train/grad_norm", "train/steps", "eval/all/lm_loss",
                 "eval/text/nats_per_token"):  # fmt: skip
        values = metrics_of(one, name), metrics_of(two, name)
        # sums over the rows of an evaluation are float32 on all devices
        limit = 1e-5 if name.startswith("eval") else 1e-7
        assert max(abs(a - b) for a, b in zip(*values, strict=True)) <= limit, name
    states = [Checkpoint(run / "step_10").json("state.json")["stream"] for run in (one, two)]
    assert states[0] == states[1]
    shards = {name.split("/")[0] for name in contents(two / "step_10")}
    assert {"carry_0", "carry_1"} <= shards

    # goes on alone, from either checkpoint alike: weights, averages, moments and held rows
    ends = [
        run_on(
            CPUBackend(), text_corpus, tmp_path / f"after_{i}", *TWO, "max_steps=11",
            "resume_allow=[max_steps]", f"resume={run / 'step_10'}",
        )
        for i, run in enumerate((one, two))
    ]  # fmt: skip
    found = apart(*(run / "step_11" for run in ends))
    print(f"two replicas: {found}")
    assert max(found.values()) <= 1e-7, found
    assert contents(two / "step_10")["model/model.inner.puzzle_emb.weights"].any()
