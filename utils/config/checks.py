"""Check values that are valid individually but conflict with each other.

Each check declares the keys that it reads and is skipped if one of them is invalid, so that no
message mentions a value that the user did not set.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from utils.config.errors import did_you_mean, show
from utils.config.schema import PretrainConfig


@dataclass
class Context:
    """The input of the checks.

    arch: options of the architecture with their defaults; empty if they are invalid.
    optimizer: the class that the config names; None if it does not exist.
    """

    config: PretrainConfig
    world_size: int
    arch: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None


Check = Callable[[Context], Iterator[str]]
_CHECKS: list[tuple[tuple[str, ...], Check]] = []


def _reads(*keys: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        unknown = [key for key in keys if key not in PretrainConfig.model_fields]
        assert not unknown, unknown
        _CHECKS.append((keys, check))
        return check

    return register


def clashes(context: Context, faulty: set[str]) -> list[str]:
    """Return one sentence for each conflict. faulty: the invalid top-level keys."""
    return [
        line for keys, check in _CHECKS if not faulty.intersection(keys) for line in check(context)
    ]


# --- the batch and the ranks ------------------------------------------------------------


def _nearby(rows: int, divisor: int) -> str:
    """Return the multiples of `divisor` around `rows`, for a message."""
    below = rows // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


@_reads("global_batch_size", "grad_accum_steps", "micro_batch_size")
def _global_batch(c: Context) -> Iterator[str]:
    rows, accumulation = c.config.global_batch_size, c.config.grad_accum_steps
    micro = c.config.micro_batch_size
    given = isinstance(micro, int)
    parts = c.world_size * (micro if isinstance(micro, int) else accumulation)
    if rows % parts:
        divisor = f"micro_batch_size {micro}" if given else f"grad_accum_steps {accumulation}"
        yield (
            f"global_batch_size {rows} is not a multiple of {c.world_size} rank(s) x {divisor}: "
            f"use {_nearby(rows, parts)}" + (", or another micro_batch_size" if given else "")
        )
    elif given and accumulation not in (1, rows // parts):
        yield (
            f"micro_batch_size {micro} makes {rows // parts} micro-batches per step of "
            f"global_batch_size {rows} on {c.world_size} rank(s), but grad_accum_steps is "
            f"{accumulation}: give one of the two"
        )


@_reads("eval_batch_size", "global_batch_size")
def _eval_batch(c: Context) -> Iterator[str]:
    rows = c.config.eval_batch_size
    if rows is not None and rows % c.world_size:
        yield (
            f"eval_batch_size {rows} is not a multiple of {c.world_size} rank(s): "
            f"use {_nearby(rows, c.world_size)}"
        )


@_reads("parallel", "device_type", "optimizer")
def _parallel(c: Context) -> Iterator[str]:
    if c.config.parallel == "fsdp" and not getattr(c.optimizer, "takes_shards", True):
        yield (
            f"parallel=fsdp shards every matrix, but optimizer={c.config.optimizer.name} needs "
            "whole ones: use parallel=ddp, or adam_atan2 or adamw"
        )
    if c.config.parallel == "fsdp" and c.config.device_type in ("xla", "tpu", "mps"):
        yield (
            f"parallel=fsdp does not run on device_type={c.config.device_type}: use parallel=ddp, "
            "or device_type=cuda or cpu"
        )


def divided_by_ranks(context: Context) -> list[str]:
    """Return the conflicts that depend on the number of ranks."""
    return [*_global_batch(context), *_eval_batch(context)]


# --- data -------------------------------------------------------------------------------


@_reads("data_paths", "data_paths_test", "dry_run", "eval_only", "vocab_size", "seq_len")
def _data(c: Context) -> Iterator[str]:
    config = c.config
    if config.data_paths:
        return
    if not config.dry_run:
        yield "data_paths is empty: name at least one corpus directory, data_paths=[data/my_corpus]"
        return
    lacking = [key for key in ("vocab_size", "seq_len") if getattr(config, key) is None]
    if lacking:
        yield (
            f"dry_run without data_paths also needs {' and '.join(lacking)}, "
            "e.g. vocab_size=32000 seq_len=2048"
        )


@_reads("data_paths", "data_paths_test")
def _paths_once(c: Context) -> Iterator[str]:
    for key in ("data_paths", "data_paths_test"):
        paths = getattr(c.config, key)
        if any(not path.strip() for path in paths):
            yield f"{key} contains an empty path: remove it"
        once: dict[str, str] = {}
        for path in paths:
            place = path if "://" in path else os.path.realpath(path)
            if place not in once:
                once[place] = path
                continue
            also = "" if once[place] == path else f", once as '{once[place]}'"
            yield f"{key} names '{path}' twice{also}: to weigh a corpus, use domain_weights"


@_reads("iteration_curriculum", "epochs", "max_steps", "max_seconds", "lr_find")
def _iteration_curriculum(c: Context) -> Iterator[str]:
    if c.config.iteration_curriculum is None or c.config.lr_find:
        return
    if c.config.epochs is None and c.config.max_steps is None:
        yield (
            "iteration_curriculum follows epochs or max_steps, but both are null (with "
            "max_seconds, no two runs would be equal): set one of the two"
        )
    if c.config.max_seconds is not None:
        yield (
            "iteration_curriculum does not follow max_seconds, which may end the run while budgets "
            "are small: give max_seconds=null with epochs or max_steps"
        )


# --- the length of the run and its evaluations --------------------------------------------


@_reads("epochs", "max_steps", "max_seconds", "dry_run", "eval_only", "lr_find")
def _length(c: Context) -> Iterator[str]:
    config = c.config
    limits = (config.epochs, config.max_steps, config.max_seconds)
    if limits == (None, None, None) and not (config.dry_run or config.eval_only or config.lr_find):
        yield "epochs, max_steps and max_seconds are all null: the run would never end; set one"


@_reads("epochs", "eval_interval", "min_eval_interval")
def _evaluations(c: Context) -> Iterator[str]:
    epochs = c.config.epochs
    for key, other in (
        ("eval_interval", ", or null for one at the end"),
        ("min_eval_interval", ""),
    ):
        value = getattr(c.config, key)
        if epochs is not None and value is not None and value > epochs:
            yield (
                f"{key} {value:g} is more than epochs {epochs:g}, so no evaluation would run: "
                f"use at most {epochs:g}{other}"
            )


@_reads("early_stopping", "eval_interval", "epochs")
def _early_stopping(c: Context) -> Iterator[str]:
    if c.config.early_stopping is not None and c.config.eval_interval is None:
        yield (
            "early_stopping needs evaluations during the run, but eval_interval is null: "
            "set it in epochs, e.g. eval_interval=0.1"
        )


@_reads("lr_find", "profile", "lr", "dry_run", "eval_only", "resume", "freeze_weights")
def _lr_find(c: Context) -> Iterator[str]:
    config = c.config
    for key in ("lr_find", "profile"):
        if getattr(config, key) and (config.eval_only or config.dry_run):
            other = "eval_only" if config.eval_only else "dry_run"
            yield f"{key} needs training, but {other}=true does not train: set only one of the two"
    if (rule := config.lr_find) is None:
        return
    if rule.low >= rule.high:
        yield f"lr_find.low {rule.low:g} must be below lr_find.high {rule.high:g}"
    if config.resume not in ("auto", "none"):
        yield (
            f"lr_find starts a new run, but resume='{config.resume}' resumes one: use "
            "load_checkpoint to start from its weights"
        )
    if config.lr == 0 or config.freeze_weights:
        yield (
            f"lr_find sweeps lr, but nothing is trained with it (lr={config.lr:g}, "
            f"freeze_weights={show(config.freeze_weights)}): give lr above 0 and "
            "freeze_weights=false"
        )


# --- checkpoints ------------------------------------------------------------------------


@_reads("load_checkpoint", "checkpoint_path")
def _paths_given(c: Context) -> Iterator[str]:
    for key in ("load_checkpoint", "checkpoint_path"):  # such as an unset variable
        if (path := getattr(c.config, key)) is not None and not path.strip():
            yield f"{key} is empty: give a path, or null for none"


@_reads("resume", "load_checkpoint")
def _resume(c: Context) -> Iterator[str]:
    resume, load = c.config.resume, c.config.load_checkpoint
    if resume not in ("auto", "none") and load is not None:
        yield (
            f"resume='{resume}' continues a run and load_checkpoint='{load}' starts a new one "
            "from weights: set only one of the two"
        )
    if not resume.strip():
        yield "resume is empty: use auto, none or the path of a checkpoint"


@_reads("eval_only", "dry_run", "resume", "load_checkpoint", "run_name", "checkpoint_path")
def _eval_only(c: Context) -> Iterator[str]:
    config = c.config
    if not config.eval_only:
        return
    if config.dry_run:
        yield "eval_only=true and dry_run=true cannot be combined: set only one of the two"
    known_run = config.run_name is not None or config.checkpoint_path is not None
    resumes = config.resume != "none" and (config.resume != "auto" or known_run)
    if config.load_checkpoint is None and not resumes:
        yield (
            "eval_only needs weights: give load_checkpoint=<path>, resume=<path>, "
            "or the run_name of the run"
        )


@_reads("run_name", "project_name")
def _folder_names(c: Context) -> Iterator[str]:
    for key in ("project_name", "run_name"):
        name = getattr(c.config, key)
        if name is not None and not re.fullmatch(r"[^\s./\\][^/\\\0\n]*", name):
            yield f"{key}={name!r} cannot name a directory: use letters, digits, '-', '_' and '.'"


@_reads("resume_allow")
def _resume_allow(c: Context) -> Iterator[str]:
    keys = list(PretrainConfig.model_fields)
    for name in c.config.resume_allow:
        if name.split(".")[0] not in keys:
            yield f"resume_allow names the unknown key '{name}': {did_you_mean(name, keys, keys)}"


# --- the model ----------------------------------------------------------------------------


@_reads("freeze_weights", "arch")
def _freeze_weights(c: Context) -> Iterator[str]:
    if c.config.freeze_weights and c.arch and not c.arch.get("puzzle_emb_ndim"):
        yield (
            "freeze_weights=true trains the identifier embedding only, but "
            f"arch.puzzle_emb_ndim is {c.arch.get('puzzle_emb_ndim', 0)}: "
            "use freeze_weights=false, or give arch.puzzle_emb_ndim"
        )


def config_warnings(config: PretrainConfig) -> list[str]:
    """Return warnings about values that are valid but rarely intended, for the caller to print."""
    lines = []
    if config.max_steps is not None and 0 < config.max_steps <= config.lr_warmup_steps:
        lines.append(
            f"lr_warmup_steps {config.lr_warmup_steps} is not below max_steps {config.max_steps}: "
            f"the learning rate never reaches lr {config.lr:g}"
        )
    if config.checkpoint_interval is None and not config.checkpoint_every_eval:
        lines.append(
            "checkpoint_interval is null and checkpoint_every_eval is false: "
            "a crash loses the whole run"
        )
    return lines
