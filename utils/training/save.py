"""Save a run: the content of checkpoints, and when to write them."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluators.guard import FAILURES
from models.source_code import source_files
from sequence_dataset import TrainStream, drop_halted
from utils.backend import Backend
from utils.checkpoint import format as checkpoint
from utils.checkpoint.writer import CheckpointWriter
from utils.config.saved import config_yaml
from utils.config.schema import PretrainConfig
from utils.core.console import notify
from utils.core.functions import suggest
from utils.corpus.corpora import Corpora
from utils.training.state import TrainState


class Saver:
    """Save a run in the background, and retry after a failure. Methods are collectives.

    saved_at: the last step whose checkpoint is complete or in progress.
    """

    RETRY_SECONDS = 60  # training time before a failed checkpoint is retried

    def __init__(
        self,
        config: PretrainConfig,
        state: TrainState,
        stream: TrainStream,
        backend: Backend,
        folder: Path,
        corpora: Corpora,
        tokenizer: Path | None,
    ):
        self.config, self.state, self.stream, self.backend = config, state, stream, backend
        self.folder = folder
        self.writer = CheckpointWriter(folder, backend, config.keep_checkpoints)
        texts = {
            "config.yaml": config_yaml(config),
            "dataset.json": corpora.metadata.model_dump_json(),
            "identifiers.json": json.dumps(corpora.identifiers),
        }
        # Read now, because they may be changed or deleted while the run is in progress.
        self.files = {name: text.encode() for name, text in texts.items()}
        for name, path in source_files([*state.model.modules(), *state.model.terms]).items():
            self.files[f"source/{name}"] = path.read_bytes()
        if tokenizer is not None:
            self.files[tokenizer.name] = tokenizer.read_bytes()
        # rank 0 decides, because ranks may see different states of network storage
        exists = backend.broadcast_object(checkpoint.step_folder(folder, state.step).is_dir())
        self.saved_at = state.step if exists else -1  # a resumed checkpoint is saved already
        self.retry_at: float | None = None

    def check(self, failed: bool) -> None:
        """Drop the checkpoint in progress if it failed, and schedule a retry.

        failed: whether any rank failed to write it.
        """
        if failed and not self.writer.wait():
            self._plan_retry()

    def due(self) -> bool:
        """Return whether a checkpoint is due at this step, by interval or as a retry."""
        every = self.config.checkpoint_interval
        retry = self.retry_at is not None and self.state.seconds >= self.retry_at
        return retry or bool(every and self.state.step % every == 0)

    def save(self) -> None:
        """Start a checkpoint of the current state, unless it is saved or in progress."""
        if self.saved_at == self.state.step:
            return
        best = () if self.state.best.step is None else (self.state.best.step,)
        if not self.writer.begin(self.state.step, self._copy_files(), best):
            return self._plan_retry()
        self.saved_at, self.retry_at = self.state.step, None

    def finish(self, patience: float, received: Sequence[int] = ()) -> bool:
        """Save the current state and wait; return False if that failed for `patience` seconds.

        received: numbers of received signals; a signal also ends the attempts.
        """
        begun, pause = time.monotonic(), min(10.0, patience)
        while True:
            self.save()
            if self.writer.wait() and self.saved_at == self.state.step:
                return True
            self._plan_retry()
            waited = time.monotonic() - begun
            if self.backend.broadcast_object(waited >= patience or bool(received)):
                return False
            left = patience - waited
            self.backend.report(
                f"retrying every {pause:.0f} s for {left:.0f} s: free up disk space"
            )
            time.sleep(pause)

    def keep_best(self, results: dict[str, Any]) -> None:
        """Save this step's checkpoint, and keep it as the best, if its evaluation is the best so
        far.
        """
        state, (name, mode) = self.state, self._rule(results)
        state.best.follow(f"{mode} {name}")
        figure = results.get(f"eval/{name}")
        if not isinstance(figure, int | float):
            if results:
                names = [key.removeprefix("eval/") for key in results]
                self.backend.report(
                    f"warning: best_metric={name} was not evaluated: no checkpoint is the best; "
                    + suggest(name, names)
                )
            return
        former = replace(state.best)
        if not state.best.add(figure if mode == "max" else -figure, state.step):
            return
        self.save()
        if not self.writer.wait() or self.saved_at != state.step:
            state.best = former
            return self._plan_retry()
        if self.backend.is_main:
            checkpoint.link_best(self.folder, state.best.step)

    def note_evaluation(self, results: dict[str, Any]) -> None:
        """Record that this step was evaluated, so that a resumed run does not repeat it.

        Does nothing if an evaluator failed, so that the evaluation is repeated.
        """
        if self.backend.is_main and FAILURES not in {key.removeprefix("eval/") for key in results}:
            try:
                checkpoint.note_evaluation(self.folder, self.state.counters())
            except OSError as error:  # at worst the evaluation is repeated
                notify(f"warning: {self.folder / checkpoint.EVALUATED}: {error.strerror or error}")

    def _rule(self, results: dict[str, Any]) -> tuple[str, str]:
        """Return the metric that decides which checkpoint is best, and `min` or `max`."""
        config, rule = self.config, self.config.early_stopping
        name, mode = config.best_metric, config.best_mode
        if name is None and rule is not None:
            name, mode = rule.metric, rule.mode
        if name is None:
            losses = [key for key in results if key.endswith("/lm_loss") and "/step_" not in key]
            name = (losses[0] if losses else "eval/lm_loss").removeprefix("eval/")
        return name, mode

    def _plan_retry(self) -> None:
        self.saved_at, self.retry_at = -1, self.state.seconds + self.RETRY_SECONDS

    def _copy_files(self) -> dict[str, Any]:
        """Copy this rank's part of the checkpoint to the host, so that training can continue.

        Ranks other than 0 write only their rows in progress.
        """
        state, rank = self.state, self.backend.rank
        files: dict[str, Any] = {}
        position = self.stream.state_dict()
        if self.config.checkpoint_carry and state.carries:
            share = len(state.halted) // self.backend.world_size
            slots = [rank * share, (rank + 1) * share]
            files[f"carry_{rank}.pt"] = {"slots": slots, "carry": state.carry_rows()}
        else:  # rows in progress will restart
            position = drop_halted(position, state.halted.tolist())
        tensors = state.tensors(keep=self.backend.is_main)
        if not self.backend.is_main:
            return files
        saved = {
            "format": checkpoint.FORMAT,
            "counters": state.counters(),
            "stream": position,
            "micro_rows": len(state.carries[0].halted) if state.carries else None,
        }
        files |= {f"{stem}.pt": value for stem, value in tensors.items()}
        return files | self.files | {"state.json": json.dumps(saved).encode()}
