"""Where the time of a few steps goes: a trace by torch.profiler, and a table."""

from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import profile, schedule, supported_activities

from utils.atomic import write_atomically
from utils.backend import Backend
from utils.reporting import tell

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
        if self._backend.is_main and self._backend.name == "xla":
            tell("note: profile=true sees what the host does; on XLA most happens on the device")
        return self

    def step(self) -> None:
        """To be called after each step."""
        if self._profile is not None and self._steps <= LAST:
            self._steps += 1
            self._profile.step()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        if kind is None and self._steps < FIRST and self._backend.is_main:
            tell(f"note: profile=true traces steps {FIRST} to {LAST}, but the run took only "
                 f"{self._steps}: nothing was written")  # fmt: skip

    def _write(self, found: profile) -> None:
        """A trace is never worth a run: what goes wrong here is told, and no more."""
        if self._steps < FIRST:
            return
        try:
            self._write_files(found, min(self._steps, LAST))
        except Exception as error:
            tell(f"warning: the profile could not be written ({error})")

    def _write_files(self, found: profile, last: int) -> None:
        assert self._folder is not None
        folder = self._folder / "profile"
        name = f"steps_{self._began + FIRST}_to_{self._began + last}_rank_{self._backend.rank}"
        trace = folder / f"{name}.json.gz"
        with write_atomically(trace) as part:
            found.export_chrome_trace(str(part))
        events = found.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = events.table(sort_by=order, row_limit=-1, max_name_column_width=80)
        with write_atomically(folder / f"{name}.txt") as part:
            part.write_text(table, encoding="utf-8")
        if self._backend.is_main:
            tell(costliest(events, order, last - FIRST + 1) + f"\n  trace: {trace}")


def costliest(events: Any, order: str, steps: int) -> str:
    """A few lines with the operations that took most time of their own."""
    times = [(getattr(e, order) / 1000 / steps, e.count / steps, e.key) for e in events]
    times = [item for item in times if not item[2].startswith("ProfilerStep")]
    whole = sum(time for time, *_ in times)
    where = "device" if "device" in order else "CPU"
    lines = [f"costliest operations, {where} time of their own in a step, of {whole:,.1f} ms"]
    for time, calls, name in sorted(times, reverse=True)[:_ROWS]:
        lines.append(f"  {time:10,.2f} ms {time / (whole or 1):6.1%} {calls:9,.1f} x  {name[:70]}")
    return "\n".join(lines)
