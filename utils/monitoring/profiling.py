"""Where the time of a few steps goes: a trace by torch.profiler, and a table."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile, schedule, supported_activities

from utils.backend import Backend
from utils.core.atomic import write_atomically
from utils.core.console import notify

FIRST, LAST = 10, 15
"""Steps of this process that are traced: the first ones compile, tune and warm up."""

_ROWS = 12


class StepProfiler:
    """Traces steps FIRST to LAST that this process takes. Every rank writes a trace of its own to
    <run>/profile, to open in chrome://tracing or ui.perfetto.dev, and all operations as a table.

    Args:
        folder: the run's; None: trace nothing.
        began: the run's step before the first of this process.
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
        self._profile.step()  # so that the trace names steps by their number
        if self._backend.name == "xla":
            self._backend.report(
                "note: profile=true sees what the host does; on XLA most happens on the device"
            )
        return self

    def step(self) -> None:
        """Count a step; call it after each."""
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
                f"{self._steps}: nothing was written"
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
    """Return what ran on the device. Its time is that of the operations which launched it, and of
    annotations around it, too: in a sum of all events it would count several times."""
    return [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]


def costliest(events: Iterable[Any], steps: int) -> str:
    """Return lines with what took most time of its own: kernels, or operations on the CPU."""
    events = list(events)
    if found := kernels(events):
        what, times = "kernels, device", [(e.self_device_time_total, e) for e in found]
    else:
        what, times = "operations, CPU", [(e.self_cpu_time_total, e) for e in events]
    rows = [
        (time / 1000 / steps, event.count / steps, event.key)
        for time, event in times
        if not event.key.startswith("ProfilerStep")
    ]
    whole = sum(time for time, *_ in rows)
    lines = [f"costliest {what} time of their own in a step, of {whole:,.1f} ms"]
    for time, calls, name in sorted(rows, reverse=True)[:_ROWS]:
        lines.append(f"  {time:10,.2f} ms {time / (whole or 1):6.1%} {calls:9,.1f} x  {name[:70]}")
    return "\n".join(lines)
