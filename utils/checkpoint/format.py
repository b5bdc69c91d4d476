"""Checkpoints: directories that are written atomically and run no code when read.

`step_<n>/` contains model.pt; ema.pt if weights are averaged; optimizer.pt; rng.pt; one
carry_<rank>.pt per rank (rows in progress by slot); state.json (format, counters, stream position);
config.yaml; the corpus' dataset.json, identifiers.json and tokenizer.json; source/ (architecture
and loss); manifest.json (SHA-256 of every other file). It is written under a hidden name and
renamed at the end (`utils/checkpoint/writer.py`). In the directory of a run, `best` is a link to
the checkpoint with the best evaluation.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Container
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from utils.core.atomic import write_atomically
from utils.core.console import notify
from utils.core.errors import UserError
from utils.core.functions import has_utf8_name, nearest

FORMAT = 3
"""Version of a checkpoint's files. In 2, latents and memory were named after AthenaTRM's fields."""
READABLE = (2, FORMAT)

MANIFEST = "manifest.json"
EVALUATED = "evaluated.json"  # in a run's directory: counters after the last finished evaluation
_STEP = re.compile(r"step_(\d+)")


def step_folder(run: Path, step: int) -> Path:
    """Return the path of a run's checkpoint of `step`."""
    return run / f"step_{step}"


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(folder.name.removeprefix("step_"))


def checkpoints_of(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [p for p in run.iterdir() if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def checkpoint_in(path: Path) -> Path:
    """Return the newest checkpoint if `path` is the directory of a run, else `path` itself."""
    if not (path / MANIFEST).is_file() and (newest := checkpoints_of(path)):
        return newest[-1]
    return path


def missing_advice(path: Path) -> str:
    """Return advice on a path that does not exist: a similar name next to it, if there is one."""
    near = nearest(path.name, sorted(other.name for other in path.parent.glob("*")))
    return f"did you mean {path.parent / near}?" if near else "give a checkpoint or a run"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_evaluation(run: Path, counters: dict[str, Any]) -> None:
    """Record that the evaluation at this step is finished, with the run's counters after it.

    It is written to the run's directory, because the checkpoint of this step is already complete.
    """
    with write_atomically(run / EVALUATED) as part:
        part.write_text(json.dumps(counters), "utf-8")


def read_evaluation(run: Path) -> dict[str, Any]:
    """Return the run's counters after its last recorded evaluation; {} if there is none."""
    try:
        counters = json.loads((run / EVALUATED).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return counters if isinstance(counters, dict) else {}


def forget_evaluation(run: Path, after: int) -> None:
    """Delete the record of an evaluation later than step `after`: the run repeats those steps."""
    if read_evaluation(run).get("step", after) > after:
        with suppress(OSError):
            (run / EVALUATED).unlink()


def note_start(run: Path, resume: str) -> None:
    """Record that this launch has resumed from the checkpoint that `resume` names."""
    if launch := os.environ.get("TORCHELASTIC_RUN_ID"):
        with suppress(OSError):
            (run / ".launch").write_text(f"{launch} {resume}", "utf-8")


def is_restart(run: Path, resume: str) -> bool:
    """Return whether an earlier attempt of this launch has resumed from the checkpoint `resume`.

    If so, this attempt continues from the last checkpoint of that one.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    with suppress(OSError):
        noted = (run / ".launch").read_text("utf-8")
        return noted == f"{os.environ['TORCHELASTIC_RUN_ID']} {resume}"
    return False


def set_aside(run: Path, start: Path, step: int) -> None:
    """Rename the checkpoints of a run that do not precede `start`, at `step`, from which it
    resumes: all later ones, and others of the same step.

    Otherwise they would count as the newest, and the run would delete its new checkpoints as old
    ones.
    """
    for folder in checkpoints_of(run):
        if step_of(folder) < step or (folder.exists() and folder.samefile(start)):
            continue
        aside = folder.with_name(f"abandoned_{folder.name}_{int(time.time())}")
        folder.rename(aside)
        notify(f"note: {folder.name} does not precede {start}; renamed to {aside.name}")
    forget_evaluation(run, step if start.parent.resolve() == run.resolve() else -1)


def prune(run: Path, keep: int | None, spare: Container[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and the steps in `spare`; None: keep all.

    Each is renamed first, so that a crash never leaves a half-deleted checkpoint.
    """
    if keep is None:
        return
    for folder in checkpoints_of(run)[:-keep]:
        if step_of(folder) not in spare:
            doomed = folder.with_name(f".{folder.name}.pruned")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def link_best(run: Path, step: int | None) -> None:
    """Point `best` in the run's directory to the checkpoint of `step`; remove it for None."""
    link, part = run / "best", run / ".best.part"
    try:
        if step is not None and step_folder(run, step).is_dir():
            part.unlink(missing_ok=True)
            part.symlink_to(step_folder(run, step).name)
            part.replace(link)
        elif link.is_symlink():
            link.unlink()
    except OSError as error:  # some storage does not support links, and the run does not need them
        notify(f"note: the link {link} could not be created ({error.strerror or error})")


def recover(run: Path) -> None:
    """Clean up after a crash: delete half-written checkpoints, restore a half-replaced one."""
    for left in sorted(run.glob(".step_*.*")):
        place = run / left.stem.removeprefix(".")
        if left.suffix == ".old" and not place.exists():
            left.rename(place)
        else:
            shutil.rmtree(left, ignore_errors=True)


class Checkpoint:
    """A checkpoint, opened for reading. Raises UserError if it has no readable manifest."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            below = sorted(path.parent.parent for path in self.folder.glob(f"*/step_*/{MANIFEST}"))
            runs = ", ".join(dict.fromkeys(map(str, below)))
            advice = f"runs below it: {runs}" if runs else "give a run, or a step_<n> in one"
            raise UserError(f"{self.folder} is not a checkpoint: it has no {MANIFEST}; {advice}")
        try:
            self.files: dict[str, str] = json.loads(manifest.read_text("utf-8"))
        except ValueError:
            raise UserError(
                f"checkpoint {self.folder} is damaged: {MANIFEST} cannot be read; resume an older "
                "step_<n> with resume=<directory>"
            ) from None

    def verify(self) -> None:
        """Compare every file with the manifest; raise UserError if one differs."""
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file() or sha256(path) != digest:
                raise UserError(
                    f"checkpoint {self.folder} is damaged: {name} has changed; resume an "
                    "older step_<n> with resume=<directory>"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @cached_property
    def state(self) -> dict[str, Any]:
        """Format, counters, stream position and micro-batch rows of the run."""
        return self.json("state.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's config, with the keys of the version that wrote it."""
        return yaml.safe_load(self.text("config.yaml"))

    def tensors(self, stem: str) -> Any:
        """Load `<stem>.pt` to the host."""
        return torch.load(self.folder / f"{stem}.pt", map_location="cpu", weights_only=True)

    def all_tensors(self) -> dict[str, Tensor]:
        """Load every tensor, by path: model/<name>, optimizer/0/state/<name>/exp_avg, …"""
        stems = [name.removesuffix(".pt") for name in self.files if name.endswith(".pt")]
        return {k: v for stem in stems for k, v in _leaves(self.tensors(stem), stem).items()}

    def text(self, name: str) -> str:
        """Return the content of a text file."""
        return (self.folder / name).read_text("utf-8")

    def json(self, name: str) -> Any:
        """Return the value in a JSON file."""
        return json.loads(self.text(name))

    def carry(self, slots: range, only: str = "") -> dict[str, Tensor] | None:
        """Return the rows in progress of a range of slots, from the files of all ranks; None if not
        saved.

        only: name of the only tensor to return; all by default.
        """
        parts = []
        for name in sorted(n for n in self.files if re.fullmatch(r"carry_\d+\.pt", n)):
            path = self.folder / name
            mapped = has_utf8_name(path)  # torch cannot memory-map others
            shard = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            low, high = shard["slots"]
            start, stop = max(low, slots.start), min(high, slots.stop)
            if start < stop:
                names = [only] if only else shard["carry"]
                rows = {k: shard["carry"][k][start - low : stop - low] for k in names}
                parts.append((start, rows))
        if not parts:
            return None
        parts.sort(key=lambda part: part[0])
        return {k: torch.cat([rows[k] for _, rows in parts]) for k in parts[0][1]}


def _leaves(value: Any, name: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, list):
        value = dict(enumerate(value))
    items = value.items() if isinstance(value, dict) else ()
    return {k: v for key, item in items for k, v in _leaves(item, f"{name}/{key}").items()}


def newest_whole(run: Path, rename: bool = True) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run; None if it never had one.

    Damaged checkpoints are reported, renamed if `rename` is set, and skipped.
    Raises UserError if all are damaged, or were found damaged by an earlier start.
    """
    found = [p for p in run.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()]
    for folder in sorted(found, key=step_of, reverse=True):
        try:
            opened = Checkpoint(folder)
            opened.verify()
            return opened
        except OSError as error:  # not renamed, because storage may answer again
            notify(f"note: {folder} cannot be read ({error.strerror or error})")
        except UserError as error:
            note = f"note: {error.args[0].partition(';')[0]}"
            if rename and folder.is_dir():
                aside = folder.with_name(f"damaged_{folder.name}_{int(time.time())}")
                folder.rename(aside)
                note += f"; renamed to {aside.name}"
            notify(note)
    damaged = sorted(p.name for p in run.glob("damaged_step_*"))
    if found or damaged:
        raise UserError(
            f"all checkpoints in {run} are damaged or cannot be read; check "
            f"{', '.join(damaged) or 'them'}, or start a new run with another run_name or "
            "resume=none"
        )
    return None


def load_weights(path: str | Path, which: str) -> tuple[dict[str, Tensor], Checkpoint | None]:
    """Load the weights of a checkpoint, of a run (its newest), or of a single file such as TRM's.

    which: `ema` for the averages if there are any, `raw` for the weights as trained.
    Returns the weights, named as in the model without its loss head, and the checkpoint; None for a
    single file. Raises UserError if the checkpoint does not exist or is damaged.
    """
    path = Path(path)
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception:  # from pickle, zip or torch, with long messages
            state = None
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            whole = (path.parent / MANIFEST).is_file()
            advice = f"give its folder, {path.parent}" if whole else "give a run, a step_<n> in one"
            raise UserError(
                f"{path} is not a file of weights (tensors by name, saved by torch); {advice}, or "
                "a file of TRM's weights"
            )
        return {_bare(name): value for name, value in state.items()}, None
    if not path.is_dir():
        raise UserError(f"load_checkpoint={path} does not exist; {missing_advice(path)}")
    checkpoint = Checkpoint(checkpoint_in(path))
    checkpoint.verify()
    weights = checkpoint.tensors("model")
    if which == "ema" and "ema.pt" in checkpoint:
        for name, value in checkpoint.tensors("ema")["shadow"].items():
            weights[name] = value.to(weights[name].dtype)
    return {_bare(name): value for name, value in weights.items()}, checkpoint


def _bare(name: str) -> str:
    """Remove the prefixes of a compiled module, as TRM saves it, and of the loss head."""
    return name.removeprefix("_orig_mod.").removeprefix("model.")
