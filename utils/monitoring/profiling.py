"""Profile a few steps: a trace by torch.profiler, and a table of operations."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile, schedule, supported_activities

from utils.backend import Backend
from utils.core.atomic import write_atomically
from utils.core.console import notify

FIRST, LAST = 10, 15
"""Steps of this process to trace, after the first ones, which compile, tune and warm up."""

_ROWS = 12


class StepProfiler:
    """Trace steps FIRST to LAST of this process. Every rank writes its own trace to <run>/profile,
    for chrome://tracing or ui.perfetto.dev, and a table of all operations.

    Args:
        folder: the run's folder; None: do not trace.
        began: the run's step at which this process started.
    """

    def __init__(self, folder: Path | None, backend: Backend, began: int):
        self._folder, self._backend, self._began = folder, backend, began
        self._profile: Any = None
        self._steps = 0

    def __enter__(self) -> "StepProfiler":
        if self._folder is None:
            return self
        self._profile = profile(
            activities=supported_activities(),
            schedule=schedule(wait=FIRST - 1, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._profile.start()
        self._profile.step()  # so that the trace has the right step numbers
        if self._backend.name == "xla":
            self._backend.report(
                "note: profile=true traces the host, but on XLA most work happens on the device"
            )
        return self

    def step(self) -> None:
        """Count a step. Call this after each step."""
        if self._profile is not None and self._steps <= LAST:
            self._steps += 1
            self._profile.step()

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        if kind is None and self._steps < FIRST:
            self._backend.report(
                f"note: profile=true traces steps {FIRST} to {LAST}, but the run took only "
                f"{self._steps} steps: nothing was written"
            )

    def _write(self, found: profile) -> None:
        """Write the trace; a failure is reported and never ends the run."""
        if self._steps < FIRST:
            return
        try:
            self._write_files(found, min(self._steps, LAST))
        except Exception as error:
            notify(f"warning: the profile could not be written ({error})")

    def _write_files(self, found: profile, last: int) -> None:
        assert self._folder is not None
        folder = self._folder / "profile"
        name = f"steps_{self._began + FIRST}_to_{self._began + last}_rank_{self._backend.rank}"
        trace = folder / f"{name}.json.gz"
        with write_atomically(trace) as part:
            found.export_chrome_trace(str(part))
        events = found.key_averages()
        order = "self_device_time_total" if kernels(events) else "self_cpu_time_total"
        table = events.table(sort_by=order, row_limit=-1, max_name_column_width=80)
        with write_atomically(folder / f"{name}.txt") as part:
            part.write_text(table, encoding="utf-8")
        self._backend.report(costliest(events, last - FIRST + 1) + f"\n  trace: {trace}")


def kernels(events: Iterable[Any]) -> list[Any]:
    """Return the events that ran on the device. Their time is also part of the operations that
    launched them and of annotations, so a sum over all events would count it several times.
    """
    return [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]


def costliest(events: Iterable[Any], steps: int) -> str:
    """Return lines with the most expensive kernels, or operations on the CPU, by self time."""
    events = list(events)
    if found := kernels(events):
        what, times = "kernels by device", [(e.self_device_time_total, e) for e in found]
    else:
        what, times = "operations by CPU", [(e.self_cpu_time_total, e) for e in events]
    rows = [
        (time / 1000 / steps, event.count / steps, event.key)
        for time, event in times
        if not event.key.startswith("ProfilerStep")
    ]
    whole = sum(time for time, *_ in rows)
    lines = [f"most expensive {what} self time (per step, {whole:,.1f} ms in total)"]
    for time, calls, name in sorted(rows, reverse=True)[:_ROWS]:
        lines.append(f"  {time:10,.2f} ms {time / (whole or 1):6.1%} {calls:9,.1f} x  {name[:70]}")
    return "\n".join(lines)
