r"""Check Athena on this machine's GPU: its numbers, restarts, speed and memory.

    python scripts/gpu_check.py
    python scripts/gpu_check.py curve resume --output results.jsonl
    python scripts/gpu_check.py --tiny

Runs each part in its own process, in the order of --list, and stops parts that exceed their time
limit. Each result is printed and appended to a JSON lines file as soon as it is known; `passed` is
null for a measurement. Exits with status 1 if a check failed. Needs no network.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError

SECONDS = 480
PARTS = {
    "environment": ("speed@check_environment", 13),
    "curve": ("training@check_curve", 55),
    "resume": ("training@check_resume", 50),
    "compile": ("training@check_compile", 28),
    "fast": ("training@check_fast", 24),
    "kernels": ("kernels@check_kernels", 60),
    "deterministic": ("training@check_deterministic", 20),
    "waits": ("training@check_waits", 25),
    "speed": ("speed@check_speed", 85),
    "formulas": ("speed@check_formulas", 32),
    "generation": ("speed@check_generation", 13),
    "training": ("training@train_on_plays", 60),
    "memory": ("training@check_memory", 15),
}
"""module@function in scripts/gpu_checks, and its share of SECONDS as time limit."""
FAILED = 1  # exit status
_NOT_SHOWN = ("part", "check", "passed", "trace", "text")


def load(part: str) -> Callable[[Any], None]:
    module, _, function = PARTS[part][0].partition("@")
    return getattr(importlib.import_module(f"scripts.gpu_checks.{module}"), function)


def format_result(record: dict[str, Any]) -> str:
    """Format a result as a line, followed by its table if it has one."""
    sign = {True: "PASS", False: "FAIL", None: "    "}[record["passed"]]
    values = [
        f"{k.replace('_', ' ')} {format_value(v)}" for k, v in record.items() if k not in _NOT_SHOWN
    ]
    line = f"{sign}  {record['part']}: {record['check']}: {', '.join(values)}"
    return line + ("\n" + record["text"] if "text" in record else "")


def format_value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(format_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(record: dict[str, Any], output: Path, printed: TextIO | None = None) -> None:
    """Append a result to the file, and print it."""
    with output.open("a", encoding="utf-8") as file:
        print(json.dumps(record), file=file)
    print(format_result(record), file=printed, flush=True)


def run_here(part: str, args: Namespace) -> int:
    """Run a part in this process; everything except results is printed to standard error."""
    printed = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    from scripts.gpu_checks.session import Session
    from utils.backend import select_backend

    folder = args.here / part
    folder.mkdir(parents=True, exist_ok=True)
    backend, _ = select_backend("auto")
    session = Session(
        backend,
        folder,
        args.tiny,
        lambda found: report({"part": part} | found, args.output, printed),
    )
    load(part)(session)
    return FAILED if session.failed else 0


def run_part(part: str, limit: float, work: Path, args: Namespace) -> bool:
    """Run a part in another process; return whether all its checks passed."""
    begun, log, status = time.monotonic(), work / f"{part}.log", None
    command = [sys.executable, __file__, part, "--here", str(work), "--output", str(args.output)]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*command, *(["--tiny"] if args.tiny else [])],
            stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with suppress(ProcessLookupError):  # ends the processes that the part started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1)}
    if status is None:
        found["problem"] = f"exceeded its limit of {limit:.0f} s; raise it with --seconds"
    elif status not in (0, FAILED):
        last = " | ".join(log.read_text("utf-8", errors="replace").splitlines()[-5:])
        found["problem"] = f"ended with status {status}: {last[-800:]}"
    report({"part": part, "check": "all", "passed": status == 0} | found, args.output)
    return status == 0


def run(args: Namespace) -> int:
    """Run the named parts; return the exit status."""
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"unknown part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if args.here is not None:
        return run_here(args.parts[0], args)
    limits = {part: seconds * args.seconds / SECONDS for part, (_, seconds) in PARTS.items()}
    if args.list:
        for part, limit in limits.items():
            print(f"{part:<15}{limit:4.0f} s  {load(part).__doc__}")
        return 0
    import torch

    if not args.tiny and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; use --tiny to run the checks on a CPU")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    work, failed = Path(tempfile.mkdtemp(prefix="athena_gpu_check_")), []
    for part in (part for part in PARTS if part in (args.parts or PARTS)):
        if not run_part(part, limits[part], work, args):
            failed.append(part)
    print(f"results: {args.output}")
    if failed:
        print(f"failed: {', '.join(failed)}; their output: {work}/*.log")
        return FAILED
    shutil.rmtree(work)
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    parser = command_parser("python scripts/gpu_check.py", __doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="(default: all)")
    add("--list", action="store_true", help="list the parts with their limits, and run nothing")
    add("--output", type=Path, default=Path("data/gpu_check.jsonl"), metavar="FILE",
        help="(default: data/gpu_check.jsonl)")  # fmt: skip
    add("--seconds", type=float, default=SECONDS, help="limit of all parts together, of which each "
        f"has a share; raise it for a slower GPU (default: {SECONDS})")  # fmt: skip
    add(
        "--tiny",
        action="store_true",
        help="use small sizes, also on a CPU, to test that everything runs",
    )
    add("--here", type=Path, metavar="FOLDER", help=SUPPRESS)
    args = parser.parse_args(argv)
    if status := run_cli(lambda: run(args)):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
