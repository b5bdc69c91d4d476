"""A session of the GPU check: its device, its folder and the output of results."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import train
from scripts.gpu_checks.runs import small_corpora
from utils.backend import Backend, select_backend
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.config.values import assignment

COMPILED, EAGER = "compile=true", "compile=false"


@dataclass
class Session:
    """One part of the check in its process.

    folder: the part's own; parts share corpora next to it. tiny: use sizes that take seconds on a
    CPU. emit: receives each result, a JSON-compatible dict.
    """

    backend: Backend
    folder: Path
    tiny: bool
    emit: Callable[[dict[str, Any]], None]
    failed: bool = False

    @property
    def on_cuda(self) -> bool:
        return self.backend.name == "cuda"

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Emit the results that the `with` block stores in the dict. If it raises, the check has
        failed.

        `passed` remains None for a measurement, which has no expected value.
        """
        found: dict[str, Any] = {"check": name, "passed": None}
        try:
            yield found
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            found |= dict(passed=False, problem=f"{type(error).__name__}: {first[:300]}")
            found["trace"] = traceback.format_exc()[-2000:]
        self.failed |= found["passed"] is False
        self.emit(found)

    def ways(self) -> dict[str, tuple[str, ...]]:
        """Return overrides for each way to run a model, by name; without compilation on a CPU,
        where it is slow.
        """
        ways: dict[str, tuple[str, ...]] = {"eager": (EAGER,), "compiled": (COMPILED,)}
        return {"eager": ways["eager"]} if self.tiny else ways

    def config(self, *overrides: str) -> PretrainConfig:
        """Compose a config for this device that needs no corpus."""
        given = [f"device_type={self.backend.name}", "data_paths=[random]", *overrides]
        return load_config(compose_config(given))

    def corpora(self) -> str:
        """Return the override for two small corpora; build them if they do not exist."""
        folder = self.folder.parent / "corpora"
        paths = [folder / name for name in ("first", "second")]
        if not all(path.is_dir() for path in paths):
            small_corpora(folder)
        return assignment("data_paths", paths)

    def train(self, name: str, *overrides: str, device_type: str | None = None) -> Path:
        """Train as pretrain.py does, in this process; return the run's folder."""
        folder = self.folder / name
        given = [assignment("checkpoint_path", folder), "run_name=gpu_check", *overrides]
        given.append(f"device_type={device_type or self.backend.name}")
        config = load_config(compose_config(given))
        backend, reason = select_backend(config.device_type)
        if status := backend.launch(train, config, reason):
            raise RuntimeError(f"training ended with status {status}")
        return folder
