"""Saving and restoring a run: what goes into a checkpoint, and what may change on the way back."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from dataset.common import DatasetMetadata
from evaluators.guard import FAILURES
from models import cost
from models.build import create_model, load_into
from models.inference.loading import fitting_weights, settle_anchor, usable_dtype
from models.losses import ACTLossHead
from models.source_code import source_files
from utils.backend import Backend
from utils.checkpoint import format as checkpoint
from utils.checkpoint.format import Checkpoint
from utils.checkpoint.writer import CheckpointWriter, Contents
from utils.config.saved import changed_keys, dump_config, is_fixed, read_config
from utils.config.schema import OptimizerConfig, PretrainConfig
from utils.core.console import tell
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora, did_you_mean
from utils.training.optimizers import share_moments
from utils.training.state import TrainState, carry_rows

FORMAT = 3  # of a checkpoint's files; 3: latents and memory of held rows have names
READABLE = (2, 3)


class Resumable(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], *, restart_held: bool = False) -> None: ...


class Saver:
    """Saves one run: in the background, and again where the disk refuses. Methods are collectives.

    saved_at: the last step whose checkpoint is whole or in work.
    """

    RETRY_SECONDS = 60  # of training, until a checkpoint that failed is tried again

    def __init__(
        self,
        config: PretrainConfig,
        state: TrainState,
        stream: Resumable,
        backend: Backend,
        run: Path,
        corpora: Corpora,
        tokenizer: Path | None,
    ):
        self.config, self.state, self.stream, self.backend = config, state, stream, backend
        self.run = run
        self.writer = CheckpointWriter(run, backend, config.keep_checkpoints)
        texts = {
            "config.yaml": yaml.safe_dump(dump_config(config), sort_keys=False),
            "dataset.json": corpora.metadata.model_dump_json(),
            "identifiers.json": json.dumps(corpora.identifiers),
        }
        # As they are now: in the days of a run they may change, or go.
        self.files = {name: text.encode() for name, text in texts.items()}
        for name, path in source_files(state.model.modules()).items():
            self.files[f"source/{name}"] = path.read_bytes()
        if tokenizer is not None:
            self.files[tokenizer.name] = tokenizer.read_bytes()
        # rank 0's word, because network storage may show ranks different things
        there = backend.broadcast_object(checkpoint.step_folder(run, state.step).is_dir())
        self.saved_at = state.step if there else -1  # what was resumed is saved already
        self.retry_at: float | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not write; `check` wants to know it of any rank."""
        return self.writer.failed

    def check(self, failed: bool) -> None:
        """Gives up a checkpoint that some rank failed to write, and plans the next attempt."""
        if failed and not self.writer.settle():
            self._plan_retry()

    def due(self) -> bool:
        every = self.config.checkpoint_interval
        again = self.retry_at is not None and self.state.seconds >= self.retry_at
        return again or bool(every and self.state.step % every == 0)

    def save(self) -> None:
        """Starts a checkpoint of the present state, unless there is one."""
        if self.saved_at == self.state.step:
            return
        spare = () if self.state.best_step is None else (self.state.best_step,)
        if not self.writer.begin(self.state.step, self._contents(), spare):
            return self._plan_retry()
        self.saved_at, self.retry_at = self.state.step, None

    def finish(self, patience: float, received: Sequence[int] = ()) -> bool:
        """Returns when the present state is saved; False if that failed for `patience` seconds.

        received: a list that a signal may fill, which ends the waiting too.
        """
        begun, pause = time.monotonic(), min(10.0, patience)
        while True:
            self.save()
            if self.writer.settle() and self.saved_at == self.state.step:
                return True
            self._plan_retry()
            waited = time.monotonic() - begun
            if self.backend.broadcast_object(waited >= patience or bool(received)):
                return False
            if self.backend.is_main:
                left = patience - waited
                tell(f"trying again every {pause:.0f} s for {left:.0f} s: make room")
            time.sleep(pause)

    def keep_best(self, results: dict[str, Any]) -> None:
        """Keeps the checkpoint of this step besides the newest, if its evaluation is the best."""
        state = self.state
        name, mode = self._rule(results)
        figure = self._figure(results, name, mode)
        if state.best_rule not in (None, f"{mode} {name}"):  # figures of another kind
            state.best_step = state.best_figure = None
        state.best_rule = f"{mode} {name}"
        best = state.best_figure
        if figure is None or math.isnan(figure) or (best is not None and figure <= best):
            return
        former = state.best_step, state.best_figure
        state.best_step, state.best_figure = state.step, figure
        self.save()
        if not self.writer.settle() or self.saved_at != state.step:
            state.best_step, state.best_figure = former
            return self._plan_retry()
        if self.backend.is_main:
            checkpoint.link_best(self.run, state.best_step)

    def note_evaluation(self, results: dict[str, Any]) -> None:
        """Has a run that goes on at this step not evaluate it again, unless an evaluator failed."""
        if self.backend.is_main and FAILURES not in {key.removeprefix("eval/") for key in results}:
            try:
                checkpoint.note_evaluation(self.run, self.state.counters())
            except OSError as error:  # the worst is that it is evaluated once more
                tell(f"warning: {self.run / checkpoint.EVALUATED}: {error.strerror or error}")

    def _rule(self, results: dict[str, Any]) -> tuple[str, str]:
        """The metric that decides which checkpoint is best, and whether `min` or `max` of it."""
        config, rule = self.config, self.config.early_stopping
        name, mode = config.best_metric, config.best_mode
        if name is None and rule is not None:
            name, mode = rule.metric, rule.mode
        if name is None:
            losses = [key for key in results if key.endswith("/lm_loss") and "/step_" not in key]
            name = (losses[0] if losses else "eval/lm_loss").removeprefix("eval/")
        return name, mode

    def _figure(self, results: dict[str, Any], name: str, mode: str) -> float | None:
        """That metric's value, larger is better; None without one."""
        value = results.get(f"eval/{name}")
        if not isinstance(value, int | float):
            if results and self.backend.is_main:
                names = [key.removeprefix("eval/") for key in results]
                tell(
                    f"warning: best_metric={name} was not evaluated; no checkpoint counts as best; "
                    + did_you_mean(name, names)
                )
            return None
        return value if mode == "max" else -value

    def close(self) -> None:
        self.writer.close()

    def _plan_retry(self) -> None:
        self.saved_at, self.retry_at = -1, self.state.seconds + self.RETRY_SECONDS

    def _contents(self) -> Contents:
        """All that the checkpoint needs, copied to the host: the loop may go on."""
        config, state = self.config, self.state
        shard = None
        if config.checkpoint_carry and state.carries:
            share = len(state.halted) // self.backend.world_size
            slots = [self.backend.rank * share, (self.backend.rank + 1) * share]
            shard = {"slots": slots, "carry": carry_rows(state.carries)}
        position = self.stream.state_dict()
        if shard is None and config.feed == "consume":
            # held rows start again, but those that have halted are done
            places = zip(position["held_places"], state.halted.tolist(), strict=True)
            position["held_places"] = [-1 if halted else place for place, halted in places]
        tensors = state.tensors(keep=self.backend.is_main)
        if not self.backend.is_main:
            return Contents({}, {}, shard)
        saved = {
            "format": FORMAT,
            "counters": state.counters(),
            "stream": position,
            "micro_rows": len(state.carries[0].halted) if state.carries else None,
        }
        return Contents(tensors, self.files | {"state.json": json.dumps(saved).encode()}, shard)


def find_resume(config: PretrainConfig, run: Path, backend: Backend) -> Checkpoint | None:
    """The checkpoint to go on from, checked; None for a new run. Settles what it stays near."""
    folder = backend.from_main(lambda: folder_to_resume(config, run))
    if folder is None:
        choose_dtype(config, backend, None)
        settle_anchor(config, backend, None)
        if backend.is_main and not config.eval_only:
            checkpoint.forget_evaluation(run, after=-1)
        return None
    if backend.is_main:
        print(f"resuming from {folder}", flush=True)
    opened = Checkpoint(folder)
    if opened.json("state.json").get("format") not in READABLE:
        raise UserError(
            f"{folder} was written by an incompatible version of Athena and cannot be resumed; "
            f"start a new run from its weights with load_checkpoint={folder}"
        )
    saved = yaml.safe_load(opened.text("config.yaml"))
    choose_dtype(config, backend, saved["arch"])
    settle_anchor(config, backend, saved["arch"]["loss"].get("kl_to"))
    check_unchanged(config, saved, opened)
    if backend.is_main and not config.eval_only:
        checkpoint.set_aside(run, folder, opened.json("state.json")["counters"]["step"])
        checkpoint.note_start(run, config.resume)
    backend.barrier()
    return opened


def choose_dtype(config: PretrainConfig, backend: Backend, saved: dict[str, Any] | None) -> None:
    """Set activations to float32 on a device without bfloat16. A collective.

    saved: architecture of the run that is resumed; it keeps its dtype.
    """
    options = config.arch.options | {"name": config.arch.name}
    chosen = set(backend.gather_objects(usable_dtype(options, backend)))
    if (lacks := chosen - {options.get("forward_dtype", "bfloat16")}) == set():
        return
    usable = lacks.pop()
    if saved is None or saved.get("forward_dtype") == usable:
        config.arch.forward_dtype = usable  # type: ignore[attr-defined]
        told = f"this device has no bfloat16: the run uses arch.forward_dtype={usable}"
    else:
        told = "the run is resumed in bfloat16, which this device does not have: it will be slow"
    if backend.is_main:
        print(f"note: {told}", flush=True)


def folder_to_resume(config: PretrainConfig, run: Path) -> Path | None:
    """The checkpoint that `resume` names or finds, compared with its manifest."""
    own = not config.eval_only
    there = [folder.name for folder in checkpoint.checkpoints_of(run)]
    if config.resume == "none":
        if own and there:
            raise UserError(
                f"resume=none starts a new run, but {run} holds {there[-1]} of an old one; "
                "choose another run_name, or move the folder away"
            )
        return None
    if own:
        checkpoint.recover(run)
    # A launcher that restarts its ranks gives them the same command, which has been obeyed once.
    if config.resume == "auto" or (own and checkpoint.is_restart(run, config.resume)):
        found = checkpoint.newest_whole(run, rename=own)
        return None if found is None else found.folder
    named = next((p for p in (Path(config.resume), run / config.resume) if p.is_dir()), None)
    if named is not None:
        named = named.resolve()  # `best` is a link
        if (named / checkpoint.MANIFEST).is_file():
            Checkpoint(named).verify()
            return named
        own = own and named == run.resolve()  # others may be at work on theirs
        if (found := checkpoint.newest_whole(named, rename=own)) is not None:
            return found.folder
    held = f"which holds {', '.join(there)}" if there else "which holds none"
    raise UserError(
        f"resume={config.resume} is neither a checkpoint, nor a run that has one, nor the name of "
        f"one in {run}, {held}"
    )


def check_unchanged(config: PretrainConfig, saved: dict[str, Any], opened: Checkpoint) -> None:
    """Raise UserError that lists the keys which changed and would change the result.

    It offers resume_allow for those alone with which the run can be resumed.
    """
    changed, gone = changed_keys(config, saved)
    if gone:
        tell(f"note: the run's config has {', '.join(gone)}, which no longer exists: it is ignored")
    if not changed:
        return
    fixed = [key for key in changed if is_fixed(config, key)]
    arch = [key for key in changed if key.startswith("arch.") and key not in fixed]
    if not arch or weights_fit(config, opened):
        arch = []
    advice = ["Take them back"]
    if possible := [key for key in changed if key not in (*fixed, *arch)]:
        together = ",".join([*config.resume_allow, *possible])
        advice.append(f"allow {', '.join(possible)} with resume_allow=[{together}]")
    if arch:
        advice.append(f"train a new run, because the saved weights do not fit {', '.join(arch)}")
    else:
        advice.append(
            f"start a new run from these weights with load_checkpoint={opened.folder} and another "
            "run_name"
        )
    listed = "; ".join(f"{key} (was {old}, is {new})" for key, (old, new) in changed.items())
    raise UserError(
        f"resuming with changed keys would change the result: {listed}. "
        f"{', '.join(advice[:-1])}, or {advice[-1]}"
    )


def weights_fit(config: PretrainConfig, opened: Checkpoint) -> bool:
    """Return whether a checkpoint's weights are those of the model that `config` describes."""
    metadata = DatasetMetadata.model_validate_json(opened.text("dataset.json"))
    weighed = bool(config.arch.loss.options.get("reasoning_loss_weight"))
    try:
        model = create_model(
            config.arch,
            metadata,
            batch_size=1,
            reasoning_ids=int(weighed),
            device="meta",
        )
    except UserError:
        return False
    own, saved = model.state_dict(), opened.tensors("model")
    return {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in saved.items()
    }


def micro_batch_rows(
    config: PretrainConfig, backend: Backend, model: ACTLossHead, resumed: Checkpoint | None
) -> int:
    """Rows that a rank computes at once: as configured, as before, or what the memory of every rank
    allows. A collective."""
    rows, ranks, device = (
        config.rows_per_rank(backend.world_size),
        backend.world_size,
        backend.device,
    )
    known = config.micro_rows(ranks) or backend.broadcast_object(saved_micro_rows(resumed, rows))
    if known is not None:
        return known
    # the plan counts these too
    free = backend.available_memory() + cost.count_present_bytes(model, device.type)
    own = cost.fitting_rows(model.model, config, free, ranks=ranks, device=device.type)
    return min(backend.gather_objects(own))  # each divides the rows of a rank


def evaluation_rows(
    config: PretrainConfig, backend: Backend, micro_batches: int, test: Corpora | None
) -> int:
    """Return the rows of an evaluation batch, over all ranks: as configured, or as in training."""
    ranks = backend.world_size
    at_once = config.rows_per_rank(ranks) // micro_batches
    rows = config.eval_batch_size or ranks * at_once
    if not backend.compiles(config.compile) and test is not None:
        rows = min(rows, ranks * -(-test.num_rows // ranks))  # more would be padding alone
    return rows  # another shape than in training, if compiled, takes long


def saved_micro_rows(resumed: Checkpoint | None, rows: int) -> int | None:
    """Rows of a micro-batch as before, so that a resumed run stays exact whatever is free today.

    None for a new run, or where they do not divide the `rows` of a rank (another world size).
    """
    saved = resumed.json("state.json").get("micro_rows") if resumed is not None else None
    return saved if saved is not None and rows % saved == 0 else None


def restore(
    config: PretrainConfig,
    state: TrainState,
    stream: Resumable,
    backend: Backend,
    opened: Checkpoint,
    run: Path,
    micro_batches: int,
) -> None:
    """Continues where `opened` was taken: weights, optimizers, averages, stream, held rows.

    And after the evaluation there, if that one was finished.
    """
    saved = opened.json("state.json")
    position, rows = saved["stream"], None
    size, before = config.global_batch_size, position["global_batch_size"]
    if config.checkpoint_carry and size == before:
        share = size // backend.world_size
        rows = opened.carry(range(backend.rank * share, (backend.rank + 1) * share))
    if rows is None and (flags := opened.carry(range(before), only="halted")) is not None:
        places = zip(position["held_places"], flags["halted"].tolist(), strict=True)
        position["held_places"] = [-1 if halted else place for place, halted in places]
    # First, because other corpora are the likeliest reason for weights of other shapes.
    stream.load_state_dict(position, restart_held=rows is None)
    before, _ = read_config(yaml.safe_load(opened.text("config.yaml")))
    kept = share_moments(config.optimizer, OptimizerConfig.model_validate(before["optimizer"]))
    if not state.load_tensors(opened, moments=kept) and backend.is_main:
        print("note: the checkpoint has no moments for this optimizer, they start from zero")
    state.load_counters(saved["counters"])
    done = None
    if backend.is_main and opened.folder.parent.resolve() == run.resolve():
        done = checkpoint.noted_evaluation(run, state.step)
    if (done := backend.broadcast_object(done)) is not None:
        state.load_counters(done)
        state.evaluated_step = state.step
    state.adopt_rule(config.early_stopping)
    if backend.is_main and not config.eval_only:
        checkpoint.link_best(run, state.best_step)
    if rows is None:
        reason = "held rows were not saved"
        if size != before:
            reason = f"global_batch_size is {size} and was {before}"
        if backend.is_main:
            print(f"note: {reason}, so rows that were held start again; the run is not exact")
        return
    state.load_carry(rows, micro_batches)
    own = torch.cat([carry.halted for carry in state.carries])
    state.halted = backend.all_gather(own.int()).cpu().numpy().astype(bool)


def load_pretrained(
    config: PretrainConfig, model: ACTLossHead, identifiers: list[str], tokenizer: Path | None
) -> tuple[str, int]:
    """Starts a new run from the weights that `load_checkpoint` names.

    Returns what they are, in words, and the step that they were saved at (0 if not known).
    """
    assert config.load_checkpoint is not None
    weights, opened = fitting_weights(
        "load_checkpoint", config.load_checkpoint, config.load_weights, identifiers, tokenizer
    )
    load_into(model.model, weights)
    if opened is None:
        return f"weights of {config.load_checkpoint}", 0
    averaged = config.load_weights == "ema" and "ema.pt" in opened
    told = f"{'averaged' if averaged else 'raw'} weights of {opened.folder}"
    return told, opened.json("state.json")["counters"]["step"]
