"""profile=true: a trace that names its steps, and a table; training is as without."""

import gzip
import json
import re

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from training_tools import TEXT, differing, finish, start

from utils.monitoring.profiling import costliest


@pytest.mark.slow
def test_each_rank_traces_its_steps_and_trains_as_ever(text_corpus, tmp_path):
    given = [
        *TEXT, f"data_paths=[{text_corpus}]", "device_type=cpu", "global_batch_size=8",
        "max_steps=18", "epochs=9", "evaluators=[]", "seed=3", "checkpoint_interval=4",
    ]  # fmt: skip
    for name, more in (("plain", []), ("traced", ["profile=true"])):
        code, out, err = finish(start(*given, *more, f"checkpoint_path={tmp_path / name}", ranks=2))
        assert code == 0, out + err
    assert "most expensive operations by CPU self time (per step" in out
    assert re.search(r"ms +\d+\.\d% +[\d.]+ x +aten::\w+", out)
    folder = tmp_path / "traced" / "profile"
    names = {f"steps_10_to_15_rank_{rank}.{end}" for rank in (0, 1) for end in ("json.gz", "txt")}
    assert {path.name for path in folder.iterdir()} == names
    for rank in (0, 1):
        with gzip.open(folder / f"steps_10_to_15_rank_{rank}.json.gz") as file:
            trace = json.load(file)
        events = {event.get("name", "") for event in trace["traceEvents"]}
        steps = {name for name in events if name.startswith("ProfilerStep")}
        assert steps == {f"ProfilerStep#{step}" for step in range(10, 16)}
        assert "aten::mm" in events
        assert "aten::mm" in (folder / f"steps_10_to_15_rank_{rank}.txt").read_text("utf-8")
    assert differing(tmp_path / "plain" / "step_18", tmp_path / "traced" / "step_18") == []


def test_a_run_that_is_too_short_says_so(text_corpus, run_training, capfd):
    for steps in (4, 9):  # before step 9 nothing is recorded, after it all is ready
        options = [f"max_steps={steps}", "epochs=9", "profile=true", "evaluators=[]"]
        run = run_training(text_corpus, f"short_{steps}", *options)
        said = f"profile=true traces steps 10 to 15, but the run took only {steps}"
        assert said in capfd.readouterr().out
        assert not (run / "profile").exists() and (run / f"step_{steps}").exists()
    run_training(text_corpus, "half", "max_steps=12", "epochs=9", "profile=true", "evaluators=[]")
    names = {path.name for path in (run.parent / "half" / "profile").iterdir()}
    assert names == {"steps_10_to_12_rank_0.json.gz", "steps_10_to_12_rank_0.txt"}


def test_device_time_is_counted_once():
    """torch's profiler gives a kernel's time to the kernel, to the operation that launched it, and
    to every annotation around it. Made of its own events, as without a card it records none."""

    def event(name, device_type, start, end, **options):
        return FunctionEvent(
            len(events), name, thread=0, start_us=start, end_us=end, use_device="cuda",
            device_type=device_type, stack=[], **options,
        )  # fmt: skip

    events = EventList(use_device="cuda")
    for i, (operation, kernel, microseconds) in enumerate(
        (("aten::mm", "gemm", 3000), ("aten::mm", "gemm", 1000), ("aten::add", "add", 2000))
    ):
        launched = event(operation, DeviceType.CPU, 10 * i, 10 * i + 5)
        launched.append_kernel(kernel, 0, microseconds)
        ran = event(kernel, DeviceType.CUDA, 5000 * i, 5000 * i + microseconds)
        around = ("ProfilerStep#10", "Optimizer.step#AdamW.step")
        events += [launched, ran] + [
            event(name, DeviceType.CUDA, 0, 15000, is_user_annotation=True) for name in around
        ]
    events._build_tree()  # as the profiler does
    headline, *rows = costliest(events.key_averages(), steps=2).splitlines()
    assert "device" in headline and "3.0 ms" in headline
    found = [(row.split()[0], row.split()[2], row.split()[-1]) for row in rows]
    assert found == [("2.00", "66.7%", "gemm"), ("1.00", "33.3%", "add")]
