r"""Measure how long a checkpoint pauses training, compared with copying and writing it.

    python scripts/benchmarks/checkpoint.py experiment=quickstart
    python scripts/benchmarks/checkpoint.py arch=athena_trm_medium global_batch_size=32 rounds=5

Alternates between saving in the background, only copying the same tensors to host memory (the
minimum cost of a save), and saving in the foreground. Steps are timed with and without a file being
written. Takes every key of pretrain.py; needs no corpus, because the tokens are random.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pydantic import Field

from scripts.training_step import make_step
from utils.backend import select_backend
from utils.checkpoint.writer import CheckpointWriter
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import compose_config, load_config
from utils.config.schema import PositiveInt


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    rounds: PositiveInt = Field(7, description="measurements of each kind")


def run(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    base = ["device_type=auto", *given, "data_paths=[random]"]
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
        return state.tensors(), state.carry_rows()

    seconds = defaultdict[str, list[float]](list)
    number = 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writer = CheckpointWriter(Path(folder), backend, keep=1)

        def save() -> None:
            nonlocal number
            number += 1
            tensors, carry = copied()
            slots = [0, config.global_batch_size]
            files = {f"{stem}.pt": value for stem, value in tensors.items()}
            writer.begin(number, files | {"carry_0.pt": {"slots": slots, "carry": carry}})

        def save_and_wait() -> None:
            save()
            writer.wait()

        for _ in range(options.rounds):
            seconds["copy alone"].append(timed(copied))
            seconds["step"].append(timed(step))
            seconds["save in the background"].append(timed(save))
            while not writer.done:
                seconds["step while writing"].append(timed(step))
            writer.wait()
            seconds["save, waited for"].append(timed(save_and_wait))
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.pt"))
        writer.close()
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    print(f"a checkpoint of {size / 1e6:,.0f} MB on {backend.device}, "
          f"medians of {options.rounds} rounds")  # fmt: skip
    print(f"\n{'':<26}{'ms':>8}{'ratio to the copy':>20}")
    for kind, median in medians.items():
        print(f"{kind:<26}{median * 1e3:>8.0f}{median / medians['copy alone']:>20.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
