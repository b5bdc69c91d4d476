"""Train a recursive-reasoning language model: compose, check, launch, loop, evaluate.

python pretrain.py data_paths="[data/quickstart]" arch=athena_trm_small
torchrun --nproc-per-node 4 pretrain.py data_paths="[data/athena_base]" +run_name=large
python pretrain.py --help
"""

import math
import os
import signal
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from evaluators.guard import Interrupted
from models.sparse_embedding import SparseEmbeddingSignSGD
from utils.backend import Backend, select_backend
from utils.backend.determinism import explain_nondeterminism
from utils.backend.memory import explain_out_of_memory
from utils.checkpoint import format as checkpoint
from utils.checkpoint.run_config import apply_trained_config
from utils.checkpoint.run_folder import RunFolder
from utils.config.load import PretrainConfig, check_ranks, hydra_entry, load_config
from utils.core.console import warnings_as_notes
from utils.core.errors import UserError
from utils.core.plugins import use_plugins
from utils.corpus.data import open_data
from utils.corpus.order import STEP_OPTIONS, step_rng
from utils.monitoring.metrics import Metric, added
from utils.training import lr_finder, messages
from utils.training.build import Run, build_run
from utils.training.dry_run import dry_run
from utils.training.evaluation import run_evaluation

FAILED_IN_PART = 3  # exit status: the run is finished, but something failed, as a warning reports


class Flags(NamedTuple):
    """The flags that all ranks share after computing the gradients of a step.

    finite: loss and gradients are finite on all ranks. stop: number of a signal that a rank
    received, or 0. save_failed: a rank could not write its part of a checkpoint.
    """

    finite: bool
    stop: int
    save_failed: bool


def launch(cfg: DictConfig) -> None:
    """Check everything that needs no device, then train on the device that the config names."""
    with warnings_as_notes(shown=os.environ.get("RANK", "0") == "0"):
        config = load_config(
            apply_trained_config(cfg), world_size=int(os.environ.get("WORLD_SIZE", 1))
        )
        if config.lr_find:
            config = lr_finder.configure_sweep(config)
        if config.dry_run:
            return dry_run(config)
    backend, reason = select_backend(config.device_type)
    with warnings_as_notes(shown=backend.is_main):
        status = backend.launch(train, config, reason)
    if status:  # a clean exit would end a multirun sweep after its first job
        sys.exit(status)


def train(backend: Backend, config: PretrainConfig, reason: str = "as the caller asks") -> int:
    """Train one replica of a run, or evaluate it with eval_only=true; return the exit status."""
    use_plugins(config.plugins)  # a spawned process has not imported them yet
    messages.announce(backend, config, reason)
    check_ranks(config, backend.world_size)
    backend.set_deterministic(config.deterministic)
    backend.set_matmul_precision(config.matmul_precision)
    data = open_data(config)
    with RunFolder(config, backend) as folder:
        run = build_run(config, backend, data, folder.path)
        try:
            with (
                explain_out_of_memory(messages.advise_on_memory(run.rows_at_once)),
                explain_nondeterminism(backend.device),
                backend.signals() as run.received,
            ):
                return evaluate_only(run) if config.eval_only else run_training(run)
        except Interrupted as interrupted:  # only raised in an evaluation
            folder.failed = True
            return 128 + interrupted.signal
        finally:
            run.close()


def evaluate_only(run: Run) -> int:
    """Evaluate the weights that were loaded; return the exit status."""
    with run.watchdog:
        run_evaluation(run)
    return FAILED_IN_PART if run.state.failed_evaluations else 0


def run_training(run: Run) -> int:
    """Train, save and evaluate until a limit or a signal ends the run; return the exit status."""
    state, first_step = run.state, run.state.step
    state.progress = run.schedule.progress(state)  # limits may have changed since the checkpoint
    with run.log.progress(state), run.watchdog:
        try:
            with run.profiler:
                take_steps(run)
            if not state.updated and state.step > 0:
                raise UserError(messages.describe_never_finite(run.config, state.step))
            if run.config.lr_find:
                if run.backend.is_main:  # only rank 0 has the log
                    run.backend.report(lr_finder.conclude(run.folder, run.config.lr_find))
                return 0
            with run.clock.paused():
                patience = min(600, (run.config.step_timeout or math.inf) / 2)
                if not run.saver.finish(patience, run.received):
                    run.backend.report(f"error: step {state.step}, the last, could not be saved")
                    return FAILED_IN_PART
                if state.evaluated_step != state.step:
                    evaluate_and_save(run)
        except Interrupted as interrupted:
            return save_on_signal(run, interrupted.signal)
    last = checkpoint.step_folder(run.folder, state.step)
    run.backend.report(messages.describe_end(run.config, last, state, first_step))
    return FAILED_IN_PART if state.failed_evaluations else 0


def take_steps(run: Run) -> None:
    """Take optimizer steps until the stream or a limit ends the run.

    Raises Interrupted if a rank received a signal. Evaluations and checkpoints due after a step are
    done before the next step, so that a run resumed there does the same.
    """
    state = run.state
    evaluate_if_due(run)
    while not run.schedule.over(state):
        batches = run.stream.next(state.step + 1, state.halted, state.progress)
        if batches is None:
            break
        options = draw_step_options(run)
        metrics, flags = train_batch(run, batches, options)
        run.watchdog.beat(state.step)
        run.log.add(state, metrics, options)
        run.backend.end_step()
        run.profiler.step()
        if state.step % run.config.log_interval == 0 or state.step == 1:
            run.log.write(state)
        run.saver.check(flags.save_failed)
        if flags.stop:
            run.log.write(state)
            raise Interrupted(flags.stop)
        if run.saver.due():
            with run.clock.paused():
                run.saver.save()
        evaluate_if_due(run)
    run.log.write(state)
    if state.updated and state.step < (warmup := run.config.lr_warmup_steps):
        run.backend.report(f"note: the run ended at step {state.step} of {warmup} in its "
                   "warm-up, below lr; lower lr_warmup_steps or train for longer")  # fmt: skip


def train_batch(
    run: Run, batches: list[dict[str, Any]], options: dict[str, int]
) -> tuple[dict[str, Metric], Flags]:
    """Take one optimizer step over this replica's micro-batches, with the step's options.

    Returns the step's metrics (on the device) and the flags shared by all ranks. The host waits for
    the device once, in `share_flags`.
    """
    state, backend = run.state, run.backend
    moved = [backend.to_device(batch) for batch in batches]
    if not state.carries:
        state.carries = [state.model.initial_carry(batch) for batch in moved]
        backend.end_step()  # makes them data for XLA; as constants they would need another program
    if not state.rehearsed:
        with run.clock.paused():
            rehearse(run, moved[0])
    totals, finite = accumulate_gradients(run, moved, options)
    backend.reduce_gradients(state.optimizers)
    norm = state.clip_gradients(run.config.grad_clip_norm)
    if norm is not None:
        finite &= torch.isfinite(norm)
        totals["grad_norm"] = norm, torch.ones_like(norm)
    for optimizer in state.optimizers:
        if isinstance(optimizer, SparseEmbeddingSignSGD):  # not part of the norm
            finite &= optimizer.finite()
    state.step += 1
    flags = share_flags(run, finite)
    state.progress = run.schedule.progress(state)
    if flags.finite:
        state.update(run.schedule.learning_rate_factor(state))
    else:
        skip_update(run)
    state.drop_gradients()
    return totals, flags


def rehearse(run: Run, batch: dict[str, Tensor]) -> None:
    """Run once before the first step: a backward pass if the backend requires it, and every set of
    step options if the model is compiled, which takes a while.
    """
    state, backend = run.state, run.backend
    state.rehearsed = True
    sets = list(state.model.model.option_sets())
    compiled = backend.compiles(run.config.compile)
    if compiled or backend.needs_rehearsal(state.step_model):
        for options in sets if compiled else sets[:1]:
            state.rehearse(batch, dict(options), backend.backward)


def accumulate_gradients(
    run: Run, batches: list[dict[str, Tensor]], options: dict[str, int]
) -> tuple[dict[str, Metric], Tensor]:
    """Run every micro-batch forward and backward; return summed metrics and whether all losses are
    finite, both on the device.
    """
    state, backend = run.state, run.backend
    totals: dict[str, Metric] = {}
    finite = torch.ones((), dtype=torch.bool, device=backend.device)
    for i, batch in enumerate(batches):
        with backend.accumulating(state.step_model, last=i == len(batches) - 1):
            state.carries[i], loss, metrics, *_ = state.step_model(
                return_keys=(), carry=state.carries[i], batch=batch, **options
            )
            backend.backward(loss / run.config.global_batch_size)
        finite &= torch.isfinite(loss.detach())
        totals = added(totals, metrics)
    return totals, finite


def draw_step_options(run: Run) -> dict[str, int]:
    """Return the architecture's options for the next step, which are the same on every rank and
    when the step is repeated.
    """
    step = run.state.step + 1
    rng = step_rng(run.config.seed, step, STEP_OPTIONS)
    return run.state.model.model.step_options(run.state.progress, rng)


def share_flags(run: Run, finite: Tensor) -> Flags:
    """Combine the flags of all ranks; store the halted slots, in order, and rank 0's clock."""
    state = run.state
    own = torch.cat([carry.halted for carry in state.carries]).long()
    signal_number = run.received[0] if run.received else 0
    host = [round(run.clock.seconds * 1000), signal_number, int(run.saver.writer.failed)]
    moved = run.backend.to_device({"host": np.array(host)})["host"]
    flags = torch.cat((own, finite.long().view(1), moved))
    table = run.backend.to_host(run.backend.all_gather(flags.unsqueeze(0)))
    state.halted = table[:, :-4].astype(bool).ravel()
    state.seconds = table[0, -3] / 1000
    return Flags(bool(table[:, -4].all()), int(table[:, -2].max()), bool(table[:, -1].any()))


def skip_update(run: Run) -> None:
    """Keep the weights, and free the rows whose latents are no longer finite.

    Raises UserError after `max_nonfinite` skipped updates in succession.
    """
    state = run.state
    state.nonfinite += 1
    state.nonfinite_in_a_row += 1
    own = state.free_broken_rows()
    state.halted = run.backend.to_host(run.backend.all_gather(own.int())).astype(bool)
    untrained = "" if state.updated else ", although no weight has changed yet"
    run.backend.report(
        f"step {state.step}: loss or gradient is not finite, update skipped{untrained}"
    )
    if state.nonfinite_in_a_row >= run.config.max_nonfinite:
        if not state.updated:
            raise UserError(messages.describe_never_finite(run.config, state.step))
        run.saver.writer.wait()  # a checkpoint may be in progress
        saved = checkpoint.checkpoints_of(run.folder)
        raise UserError(messages.describe_nonfinite(run.config, state.nonfinite_in_a_row, saved))


def save_on_signal(run: Run, number: int) -> int:
    """Save the current state when signal `number` ends the run; return the exit status."""
    name, step = signal.Signals(number).name, run.state.step
    if run.config.lr_find:
        run.backend.report(f"stopped by {name}; a sweep saves no weights; start it again")
        return 128 + number
    again = f"resume it with the same command and run_name={run.config.run_name}"
    if not run.saver.finish(patience=5):
        run.backend.report(f"stopped by {name}, but step {step} could not be saved; {again}")
        return FAILED_IN_PART
    run.backend.report(f"stopped by {name} after saving step {step}; {again}")
    return 128 + number


def evaluate_if_due(run: Run) -> None:
    """Evaluate and save if the stream has reached the next evaluation's epoch."""
    if run.stream.epoch >= run.state.next_eval(run.config):
        with run.clock.paused():
            evaluate_and_save(run)


def evaluate_and_save(run: Run) -> None:
    """Save a checkpoint, evaluate it, and update the best checkpoint and early stopping.

    The checkpoint is saved first, because the evaluation may fail.
    """
    state = run.state
    if run.config.checkpoint_every_eval:
        run.saver.save()
    results = run_evaluation(run)
    state.evaluated_epoch, state.evaluated_step = run.stream.epoch, state.step
    if state.update_stopping(run.config.early_stopping, results):
        run.backend.report("stopped early: the evaluations no longer improve")
    run.saver.keep_best(results)
    run.saver.note_evaluation(results)


main = hydra_entry(launch)

if __name__ == "__main__":
    main()
