"""Checkpoints: folders that appear whole or not at all, and run no code when read.

`step_<n>/` holds model.pt and, where it applies, ema.pt; optimizer.pt; one carry_<rank>.pt a
rank (held rows by slot); state.json (step, stream position, counters); config.yaml; the corpus'
dataset.json and tokenizer.json; source/ (architecture and loss); manifest.json (SHA-256 of every
other file). It is written beside its place under another name and renamed at the end
(`utils/checkpoint/writer.py`). In a run's folder `best` is a link to the checkpoint with the best
evaluation.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core.console import notify
from utils.core.errors import UserError
from utils.core.functions import has_utf8_name, nearest

MANIFEST = "manifest.json"
EVALUATED = "evaluated.json"  # in a run's folder: the last evaluation that was finished
_STEP = re.compile(r"step_(\d+)")


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints_of(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [p for p in run.iterdir() if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def checkpoint_in(path: Path) -> Path:
    """The newest checkpoint of a run's folder; any other path as it is."""
    if not (path / MANIFEST).is_file() and (newest := checkpoints_of(path)):
        return newest[-1]
    return path


def missing_advice(path: Path) -> str:
    """Return what to do about a path that does not exist: the nearest name beside it, if any."""
    near = nearest(path.name, sorted(other.name for other in path.parent.glob("*")))
    return f"did you mean {path.parent / near}?" if near else "name a checkpoint, or a run"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_evaluation(run: Path, counters: dict[str, Any]) -> None:
    """Remembers that the evaluation at this step is done, and what the run counted after it.

    Beside the checkpoint of the step, which was whole before the evaluation began.
    """
    part = run / ".evaluated.part"
    part.write_text(json.dumps(counters), "utf-8")
    part.replace(run / EVALUATED)


def noted_evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """What `note_evaluation` was given last, if that was at `step`."""
    try:
        counters = json.loads((run / EVALUATED).read_text("utf-8"))
        return counters if counters["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_evaluation(run: Path, after: int) -> None:
    """That of a step later than `after` belongs to a course which the run gives up."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((run / EVALUATED).read_text("utf-8"))["step"] > after:
            (run / EVALUATED).unlink()


def note_start(run: Path, resume: str) -> None:
    """Remembers that this launch has found the checkpoint that `resume` names."""
    if launch := os.environ.get("TORCHELASTIC_RUN_ID"):
        with suppress(OSError):
            (run / ".launch").write_text(f"{launch} {resume}", "utf-8")


def is_restart(run: Path, resume: str) -> bool:
    """Whether an earlier attempt of the same launch has found the checkpoint that `resume` names,
    and this one is to go on where that one ended."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    with suppress(OSError):
        return (run / ".launch").read_text(
            "utf-8"
        ) == f"{os.environ['TORCHELASTIC_RUN_ID']} {resume}"
    return False


def set_aside(run: Path, start: Path, step: int) -> None:
    """Renames the checkpoints of a run that starts again from `start`, at `step`, but are not of
    that course: all later ones, and others of the same step.

    They would be taken for the newest otherwise, and the new ones for old.
    """
    for folder in checkpoints_of(run):
        if step_of(folder) < step or (folder.exists() and folder.samefile(start)):
            continue
        aside = folder.with_name(f"abandoned_{folder.name}_{int(time.time())}")
        folder.rename(aside)
        notify(f"note: {folder.name} is not of the course of {start}, it is now {aside.name}")
    forget_evaluation(run, step if start.parent.resolve() == run.resolve() else -1)


def prune(run: Path, keep: int | None, spare: Container[int] = ()) -> None:
    """Removes all but the newest `keep` checkpoints and the steps in `spare`.

    Each is renamed first, so that a crash leaves no half-removed checkpoint.
    """
    if keep is None:
        return
    for folder in checkpoints_of(run)[:-keep]:
        if step_of(folder) not in spare:
            doomed = folder.with_name(f".{folder.name}.pruned")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def link_best(run: Path, step: int | None) -> None:
    """Points `best` in the run's folder to the checkpoint of `step`, or removes it for None."""
    link, part = run / "best", run / ".best.part"
    try:
        if step is not None and step_folder(run, step).is_dir():
            part.unlink(missing_ok=True)
            part.symlink_to(step_folder(run, step).name)
            part.replace(link)
        elif link.is_symlink():
            link.unlink()
    except OSError as error:  # not every storage knows links; the run itself needs none
        notify(f"note: {link} could not be made ({error.strerror or error})")


def recover(run: Path) -> None:
    """Clears what a crash left: half-written folders go, one that was being replaced comes back."""
    for left in sorted(run.glob(".step_*.*")):
        place = run / left.stem.removeprefix(".")
        if left.suffix == ".old" and not place.exists():
            left.rename(place)
        else:
            shutil.rmtree(left, ignore_errors=True)


class Checkpoint:
    """A checkpoint folder, opened for reading. Raises UserError where it is not whole."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            below = sorted(path.parent.parent for path in self.folder.glob(f"*/step_*/{MANIFEST}"))
            advice = ", ".join(dict.fromkeys(map(str, below))) or "name a run or a step_<n> in one"
            raise UserError(
                f"{self.folder} is not a checkpoint: it has no {MANIFEST}; "
                + (f"runs below it: {advice}" if below else advice)
            )
        try:
            self.files: dict[str, str] = json.loads(manifest.read_text("utf-8"))
        except ValueError:
            raise UserError(
                f"checkpoint {self.folder} is damaged: {MANIFEST} cannot be read; go on from an "
                "older step_<n> with resume=<folder>"
            ) from None

    def verify(self) -> None:
        """Compares every file with the manifest."""
        for name, digest in self.files.items():
            path = self.folder / name
            if not path.is_file() or sha256(path) != digest:
                raise UserError(
                    f"checkpoint {self.folder} is damaged: {name} is not what was saved; go on "
                    "from an older step_<n> with resume=<folder>"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def tensors(self, stem: str) -> Any:
        return torch.load(self.folder / f"{stem}.pt", map_location="cpu", weights_only=True)

    def all_tensors(self) -> dict[str, Tensor]:
        """Every tensor in it, by its path: model/<name>, optimizer/0/state/<name>/exp_avg, …"""
        stems = [name.removesuffix(".pt") for name in self.files if name.endswith(".pt")]
        return {k: v for stem in stems for k, v in _leaves(self.tensors(stem), stem).items()}

    def text(self, name: str) -> str:
        return (self.folder / name).read_text("utf-8")

    def json(self, name: str) -> Any:
        return json.loads(self.text(name))

    def carry(self, slots: range, only: str = "") -> dict[str, Tensor] | None:
        """Return the held rows of a range of slots, wherever ranks stored them; None if not saved.

        only: the one of their tensors to return; all where it is empty.
        """
        parts = []
        for name in sorted(n for n in self.files if re.fullmatch(r"carry_\d+\.pt", n)):
            path = self.folder / name
            mapped = has_utf8_name(path)  # torch maps no other
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
    """The newest checkpoint of a run that is what was saved; None if there never was one.

    A damaged one is reported and renamed (unless the run belongs to another process), and the one
    before it taken. UserError if all are, or were found to be by an earlier start.
    """
    found = [p for p in run.glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()]
    for folder in sorted(found, key=step_of, reverse=True):
        try:
            opened = Checkpoint(folder)
            opened.verify()
            return opened
        except OSError as error:  # storage may answer again: nothing is renamed
            notify(f"note: {folder} cannot be read ({error.strerror or error})")
        except UserError as error:
            told = f"note: {error.args[0].partition(';')[0]}"
            if rename and folder.is_dir():
                aside = folder.with_name(f"damaged_{folder.name}_{int(time.time())}")
                folder.rename(aside)
                told += f"; it is now {aside.name}"
            notify(told)
    damaged = sorted(p.name for p in run.glob("damaged_step_*"))
    if found or damaged:
        raise UserError(
            f"all checkpoints in {run} are damaged or cannot be read; look at "
            f"{', '.join(damaged) or 'them'} there; to start over choose another run_name, or "
            "resume=none"
        )
    return None


def load_weights(path: str | Path, which: str) -> tuple[dict[str, Tensor], Checkpoint | None]:
    """Weights of a checkpoint folder, a run folder (its newest), or a single file as TRM's.

    which: `ema` takes the averages where there are any, `raw` the weights as trained. Names are
    those of the model without its loss head.
    """
    path = Path(path)
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception:  # of pickle, zip or torch, in paragraphs
            state = None
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            whole = (path.parent / MANIFEST).is_file()
            advice = f"name its folder, {path.parent}" if whole else "name a run, a step_<n> in one"
            raise UserError(
                f"{path} is not a file of weights (tensors by name, saved by torch); {advice}, or "
                "a file of TRM's"
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
    """TRM saves the compiled loss head: `_orig_mod.model.inner…`; ours, `model.inner…`."""
    return name.removeprefix("_orig_mod.").removeprefix("model.")
