"""Trains a recursive-reasoning language model: compose, check, launch, train, evaluate.

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

from evaluators.guard import FAILURES, Interrupted
from evaluators.loop import evaluate, examined
from models.sparse_embedding import SparseEmbeddingSignSGD
from sequence_dataset import EvalStream
from utils.backend import Backend, select_backend
from utils.backend.determinism import explain_nondeterminism
from utils.backend.memory import explain_out_of_memory
from utils.checkpoint import format as checkpoint
from utils.checkpoint.run_config import as_trained
from utils.checkpoint.run_folder import RunFolder
from utils.config.load import PretrainConfig, check_ranks, hydra_entry, load_config
from utils.core.console import Progress, tell, warnings_as_notes
from utils.core.errors import UserError
from utils.core.iterators import prefetched, ticking
from utils.corpus.data import open_data
from utils.monitoring.metrics import added
from utils.training import lr_finder
from utils.training.build import Run, build, evaluation_rows
from utils.training.dry_run import dry_run
from utils.training.messages import announce, describe_end, describe_nonfinite, format_evaluation
from utils.training.state import TrainState


class Flags(NamedTuple):
    """What the ranks told each other in a step.

    finite: of all ranks. stop: the number of a signal that a rank received, or 0. save_failed:
    a rank could not write its part of a checkpoint.
    """

    finite: bool
    stop: int
    save_failed: bool


FAILED_IN_PART = 3  # exit status: the run is over, but a warning tells of something that failed


def launch(cfg: DictConfig) -> None:
    """Checks everything that can be checked, then runs on the device that was asked for."""
    with warnings_as_notes(shown=os.environ.get("RANK", "0") == "0"):
        config = load_config(as_trained(cfg), world_size=int(os.environ.get("WORLD_SIZE", 1)))
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
    """One replica of a run; returns the exit status."""
    announce(backend, config, reason)
    check_ranks(config, backend.world_size)
    backend.set_deterministic(config.deterministic)
    data = open_data(config)
    with RunFolder(config, backend) as folder:
        with explain_out_of_memory(
            "while the run is built; choose a smaller model (a preset of arch, arch.hidden_size), "
            "ema=false, or parallel=fsdp on several GPUs, and look for other programs on the device"
        ):
            run, state = build(folder.path, data, backend, config)
        rows = config.rows_per_rank(backend.world_size) // run.micro_batches
        advice = (
            f"with {rows} rows at once; lower micro_batch_size (now {rows}), or "
            "global_batch_size, or set arch.use_gradient_checkpointing=true"
        )
        try:
            with (
                explain_out_of_memory(advice),
                explain_nondeterminism(backend.device),
                backend.signals() as received,
            ):
                run = run._replace(received=received)
                if not config.eval_only:
                    return train_loop(run, state)
                with run.watchdog:
                    run_evaluation(run, state)
                return FAILED_IN_PART if state.failed_evaluations else 0
        except Interrupted as interrupted:  # in an evaluation alone
            folder.failed = True
            return 128 + interrupted.signal
        finally:
            run.saver.close()
            run.stream.close()
            run.loggers.close()


def train_loop(run: Run, state: TrainState) -> int:
    """Trains, saves and evaluates until the run is over or a signal ends it; the exit status."""
    began = state.step
    with run.log.progress(state), run.watchdog:
        try:
            with run.profiler:
                take_steps(run, state)
            if run.config.lr_find:
                if run.backend.is_main:
                    tell(lr_finder.conclude(run.folder, run.config.lr_find))
                return 0
            with run.clock.paused():
                patience = min(600, (run.config.step_timeout or math.inf) / 2)
                if not run.saver.finish(patience, run.received):
                    say(run, f"error: step {state.step}, the last, could not be saved")
                    return FAILED_IN_PART
                if state.evaluated_step != state.step:
                    evaluate_and_save(run, state)
        except Interrupted as interrupted:
            return leave(run, state, interrupted.signal)
    last = checkpoint.step_folder(run.folder, state.step)
    say(run, describe_end(run.config, last, state, began))
    return FAILED_IN_PART if state.failed_evaluations else 0


def take_steps(run: Run, state: TrainState) -> None:
    """Steps until the stream or a limit ends the run.

    Raises Interrupted where a rank received a signal. What is due at a step comes before the next
    one begins, so that a run which is resumed there does the same.
    """
    config = run.config
    while True:
        if run.stream.epoch >= state.next_eval(config):
            with run.clock.paused():
                evaluate_and_save(run, state)
        if run.schedule.over(state):
            break
        batches = run.stream.next(state.step + 1, state.halted)
        if batches is None:
            break
        metrics, flags = train_batch(run, state, batches)
        run.watchdog.beat(state.step)
        run.log.add(state, metrics)
        run.backend.end_step()
        run.profiler.step()
        if state.step % config.log_interval == 0 or state.step == 1:
            run.log.write(state)
        run.saver.check(flags.save_failed)
        if flags.stop:
            run.log.write(state)
            raise Interrupted(flags.stop)
        if run.saver.due():
            with run.clock.paused():
                run.saver.save()
    run.log.write(state)
    if state.step < config.lr_warmup_steps:
        say(run, f"note: the run ended at step {state.step} of {config.lr_warmup_steps} in its "
                 "warm-up, below lr; lower lr_warmup_steps or train for longer")  # fmt: skip


def leave(run: Run, state: TrainState, stop: int) -> int:
    """Saves on a signal; the exit status."""
    name = signal.Signals(stop).name
    if run.config.lr_find:
        say(run, f"stopped by {name}; a sweep keeps no weights, begin it again")
        return 128 + stop
    again = f"go on with the same command and run_name={run.config.run_name}"
    if not run.saver.finish(patience=5):
        say(run, f"stopped by {name}, but step {state.step} could not be saved; {again}")
        return FAILED_IN_PART
    say(run, f"stopped by {name} after saving step {state.step}; {again}")
    return 128 + stop


def train_batch(
    run: Run, state: TrainState, batches: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], Flags]:
    """One optimizer step over this replica's micro-batches.

    Returns the step's metrics (sums, on the device) and what the ranks told each other. The host
    waits once, for the halted flags and whether all is finite.
    """
    config, backend = run.config, run.backend
    totals: dict[str, Tensor] = {}
    moved = [backend.to_device(batch) for batch in batches]
    if not state.carries:
        state.carries = [state.model.initial_carry(batch) for batch in moved]
        backend.end_step()  # to XLA they are data now, not constants: no program of their own
    if backend.needs_rehearsal(state.step_model) and not state.rehearsed:
        state.rehearse(moved[0], backend.backward)
    finite = torch.ones((), dtype=torch.bool, device=backend.device)
    for i, batch in enumerate(moved):
        with backend.accumulating(state.step_model, last=i == len(moved) - 1):
            state.carries[i], loss, metrics, *_ = state.step_model(
                return_keys=(), carry=state.carries[i], batch=batch
            )
            backend.backward(loss / config.global_batch_size)
        finite &= torch.isfinite(loss.detach())
        totals = added(totals, metrics)
    backend.reduce_gradients(state.optimizers)
    norm = state.clip_gradients(config.grad_clip_norm)
    if norm is not None:
        finite &= torch.isfinite(norm)
        totals["grad_norm"] = norm
    for optimizer in state.optimizers:
        if isinstance(optimizer, SparseEmbeddingSignSGD):  # not part of the norm
            finite &= optimizer.finite()
    state.step += 1
    flags = share_flags(run, state, finite)
    if flags.finite:
        state.update(run.schedule.learning_rate_factor(state))
    else:
        skip_update(run, state)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    totals["updates"] = torch.ones((), device=backend.device)
    return totals, flags


def share_flags(run: Run, state: TrainState, finite: Tensor) -> Flags:
    """What all ranks must agree on. Which slots have halted (in slot order) and rank 0's clock are
    noted in `state`."""
    own = torch.cat([carry.halted for carry in state.carries]).long()
    signal_number = run.received[0] if run.received else 0
    host = [round(run.clock.seconds * 1000), signal_number, int(run.saver.failed)]
    moved = run.backend.to_device({"host": np.array(host)})["host"]
    flags = torch.cat((own, finite.long().view(1), moved))
    table = run.backend.to_host(run.backend.all_gather(flags.unsqueeze(0)))
    state.halted = table[:, :-4].astype(bool).ravel()
    state.seconds = table[0, -3] / 1000
    return Flags(bool(table[:, -4].all()), int(table[:, -2].max()), bool(table[:, -1].any()))


def skip_update(run: Run, state: TrainState) -> None:
    """Leaves the weights alone and frees the rows whose latents are no longer finite."""
    state.nonfinite += 1
    state.nonfinite_in_a_row += 1
    own = state.free_broken_rows()
    state.halted = run.backend.to_host(run.backend.all_gather(own.int())).astype(bool)
    say(run, f"step {state.step}: loss or gradient is not finite, update skipped")
    if state.nonfinite_in_a_row >= run.config.max_nonfinite:
        run.saver.writer.settle()  # one may just be in work
        saved = checkpoint.checkpoints_of(run.folder)
        raise UserError(describe_nonfinite(run.config, state.nonfinite_in_a_row, saved))


def evaluate_and_save(run: Run, state: TrainState) -> None:
    """A checkpoint first: the evaluation may fail, and its figures belong to one."""
    if run.config.checkpoint_every_eval:
        run.saver.save()
    results = run_evaluation(run, state)
    state.evaluated_epoch, state.evaluated_step = run.stream.epoch, state.step
    if state.stops_early(run.config.early_stopping, results):
        say(run, "stopped early: the evaluations no longer improve")
    run.saver.keep_best(results)
    run.saver.note_evaluation(results)


def run_evaluation(run: Run, state: TrainState) -> dict[str, Any]:
    """Evaluates the averaged weights on the test split, logs and prints what was found.

    Raises Interrupted where a rank received a signal.
    """
    config, backend = run.config, run.backend
    if run.data.test is None and not run.evaluators:
        if config.eval_only:
            raise UserError(
                f"there is nothing to evaluate: {', '.join(run.data.test_paths)} has no test "
                "split, or an empty one; name another corpus with data_paths_test"
            )
        say(run, "the corpora have no test split, or an empty one: evaluation is skipped")
        return {}
    rows = evaluation_rows(config, backend, run.micro_batches, run.data.test)
    stream: EvalStream | list[Any] = []
    if run.data.test is not None:
        ranks = dict(rank=backend.rank, world_size=backend.world_size)
        arch = state.model.model.config
        stream = EvalStream.from_config(run.data.test, config, arch, rows, **ranks)
    bar = Progress(len(stream), "evaluate, batch", "batch", shown=backend.is_main)
    advice = f"in an evaluation of {rows} rows at once; lower eval_batch_size (now {rows})"
    with explain_out_of_memory(advice), bar, state.averaged():
        results = evaluate(
            state.model,
            ticking(prefetched(stream, config.num_workers), bar.update, run.watchdog.sign),
            run.evaluators,
            backend,
            received=run.received,
            save_outputs=config.eval_save_outputs,
            save_path=run.folder / f"evaluation_step_{state.step}",
            ask=examined(
                state.model,
                run.data.train,
                run.tokenizer,
                backend,
                (config.eval_batch_size or rows) // backend.world_size,
                run.watchdog.sign,
            ),
        )
    state.failed_evaluations += FAILURES in results
    results = {f"eval/{name}": value for name, value in results.items()}
    run.loggers.log(results, state.step)
    say(run, format_evaluation(results, state.step))
    return results


def say(run: Run, sentence: str) -> None:
    if run.backend.is_main:
        tell(sentence)


main = hydra_entry(launch)

if __name__ == "__main__":
    main()
