r"""How long training stands still for a checkpoint, against copying it and against writing it.

    python scripts/benchmarks/checkpoint.py experiment=quickstart
    python scripts/benchmarks/checkpoint.py arch=athena_trm_medium global_batch_size=32 --rounds 5

The run's own saver takes turns with a bare copy of the same tensors to host memory (what a save
must cost), and with a save that is waited for. Steps are timed while a file is being written and
while none is. Overrides are those of pretrain.py; no corpus is read, the tokens are random.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.training_step import make_step
from utils.backend import select_backend
from utils.checkpoint.writer import CheckpointWriter, Contents
from utils.config.load import compose_config, load_config
from utils.core.console import run_cli
from utils.training.state import carry_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for pretrain.py")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind")
    args = parser.parse_args()
    base = ["device_type=auto", *args.overrides, "data_paths=[random]"]
    config = load_config(compose_config(base))
    backend, _ = select_backend(config.device_type)
    step, state = make_step(config, backend)
    for _ in range(3):
        step()

    def timed(act) -> float:
        begun = time.perf_counter()
        act()
        return time.perf_counter() - begun

    def copied():
        return state.tensors(), carry_rows(state.carries)

    kinds = (
        "copy alone",
        "save in the background",
        "save, waited for",
        "step",
        "step while writing",
    )
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    number = 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = CheckpointWriter(Path(folder), backend, keep=1)

        def save() -> None:
            nonlocal number
            number += 1
            tensors, carry = copied()
            slots = [0, config.global_batch_size]
            writer.begin(number, Contents(tensors, {}, {"slots": slots, "carry": carry}))

        def save_and_wait() -> None:
            save()
            writer.settle()

        for _ in range(args.rounds):
            seconds["copy alone"].append(timed(copied))
            seconds["step"].append(timed(step))
            seconds["save in the background"].append(timed(save))
            while not writer.done:
                seconds["step while writing"].append(timed(step))
            writer.settle()
            seconds["save, waited for"].append(timed(save_and_wait))
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.pt"))
        writer.close()
    medians = {kind: statistics.median(values) for kind, values in seconds.items() if values}
    print(
        f"a checkpoint of {size / 1e6:,.0f} MB on {backend.device}, medians of {args.rounds} rounds"
    )
    print(f"\n{'':<26}{'ms':>8}{'ratio to the copy':>20}")
    for kind, median in medians.items():
        print(f"{kind:<26}{median * 1e3:>8.0f}{median / medians['copy alone']:>20.2f}")


if __name__ == "__main__":
    run_cli(main)
