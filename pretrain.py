"""Trains a recursive-reasoning language model: compose, check, launch, train, evaluate.

python pretrain.py data_paths="[data/quickstart]" arch=athena_trm_small
torchrun --nproc-per-node 4 pretrain.py data_paths="[data/athena_base]" +run_name=large
python pretrain.py --help
"""

import os
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dataset.common import UserError, warnings_as_notes
from evaluators.loop import create_evaluators, evaluate
from models import cost, persistence
from models.dry_run import dry_run
from models.persistence import resolved
from models.train_state import TrainState, create_model, create_train_state
from sequence_dataset import EvalStream, TrainStream
from utils import checkpoint
from utils.backend import Backend, Received, select_backend
from utils.config import (
    PretrainConfig,
    check_ranks,
    config_warnings,
    hydra_entry,
    load_config,
)
from utils.data import Data, open_data
from utils.feed_ahead import PresentAhead
from utils.functions import random_run_name
from utils.logging import Logger, create_loggers
from utils.metrics import added
from utils.reporting import Clock, evaluation_table, prefetched, ticking
from utils.schedule import Schedule
from utils.training_log import TrainingLog


class Run(NamedTuple):
    """What stays the same for a whole run on one replica."""

    config: PretrainConfig
    backend: Backend
    data: Data
    stream: TrainStream | PresentAhead
    folder: Path
    micro_batches: int
    schedule: Schedule
    loggers: list[Logger]
    log: TrainingLog


def launch(cfg: DictConfig) -> None:
    """Checks everything that can be checked, then runs on the device that was asked for."""
    config = load_config(cfg, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    if config.dry_run:
        return dry_run(config)
    backend, reason = select_backend(config.device_type)
    if config.compile and (reason_not := backend.cannot_compile()) is not None:
        config.compile = False
        if backend.is_main:
            print(f"note: compile=true has no effect: {reason_not}")
    with warnings_as_notes(shown=backend.is_main):
        status = backend.launch(train, config, reason)
    if status:  # a clean exit would end a multirun sweep after its first job
        sys.exit(status)


def create_stream(
    config: PretrainConfig, arch: Any, data: Data, backend: Backend, micro_batches: int
) -> TrainStream | PresentAhead:
    """`arch` is the model's own config, with its defaults."""
    steps = getattr(arch, "halt_max_steps", None)  # a plain decoder has no budgets to keep
    make = partial(
        TrainStream,
        data.train,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        epochs=config.epochs or 1e9,
        feed=config.feed,
        domain_weights=data.train.recorded_weights()
        if config.domain_weights is None
        else config.domain_weights,
        min_iterations=config.min_iterations,
        max_iterations=steps,
        rank=backend.rank,
        world_size=backend.world_size,
        micro_batches=micro_batches,
        explore_prob=getattr(arch, "halt_exploration_prob", 0.0),
        explore_max=steps or 1,
    )
    stream = make(num_workers=config.num_workers)
    if config.feed == "present" and backend.moved_ahead is not None:
        return PresentAhead(stream, make(num_workers=0), backend.moved_ahead)
    return stream


def open_run_folder(config: PretrainConfig, backend: Backend) -> Path:
    """Names the run alike on all ranks and gives its folder."""
    name = backend.broadcast_object(config.run_name or random_run_name())
    config.run_name = name
    path = config.checkpoint_path or Path("checkpoints") / config.project_name / name
    if backend.is_main:
        print(f"run: {name}, folder {path}")
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to the run's folder {path} ({error.strerror or error}); name "
                "another with checkpoint_path"
            ) from None
    return Path(path)


def announce(backend: Backend, config: PretrainConfig, reason: str) -> None:
    """Says which device was taken and why, and what of the config is rarely meant."""
    if backend.is_main:
        ranks = f", {backend.world_size} ranks" if backend.world_size > 1 else ""
        print(f"device: {backend.describe()} ({reason}){ranks}")
        for line in config_warnings(config):
            print(f"note: {line}")


def train(backend: Backend, config: PretrainConfig, reason: str = "as the caller asks") -> int:
    """One replica of a run; returns the exit status."""
    announce(backend, config, reason)
    check_ranks(config, backend.world_size)
    data = open_data(config)
    rows = config.rows_per_rank(backend.world_size)
    folder = open_run_folder(config, backend)
    resumed = persistence.find_resume(config, folder, backend)
    labels = data.reasoning_ids() if config.arch.loss.options.get("reasoning_loss_weight") else 0
    with backend.taking_turns():
        model = create_model(config, data.train.metadata, batch_size=rows, reasoning_ids=labels)
    micro_rows = config.micro_rows(backend.world_size) or backend.broadcast_object(
        persistence.saved_micro_rows(resumed, rows)
        or cost.fitting_rows(
            model.model,
            rows,
            backend.available_memory(),
            optimizer=config.optimizer,
            ema=config.ema,
        )
    )
    if config.load_checkpoint and resumed is None:
        persistence.load_pretrained(config, model, data.train.identifiers, data.tokenizer)
    model.to(backend.device)
    state = create_train_state(
        config,
        model,
        wrap=backend.wrap,
        all_gather=backend.all_gather,
        device_type=backend.device.type,
    )
    stream = create_stream(config, model.model.config, data, backend, rows // micro_rows)
    if resumed is not None:
        persistence.restore(config, state, stream, backend, resumed, rows // micro_rows)
    schedule = Schedule(config, stream)
    loggers: list[Logger] = []
    if backend.is_main:
        loggers = create_loggers(config.logger, folder, resolved(config))
    peak = backend.peak_flops(model.model.config.dtype)
    log = TrainingLog(
        loggers,
        backend,
        schedule,
        row_tokens=data.train.metadata.seq_len,
        rows=config.global_batch_size,
        flops_per_token=cost.measure(model.model).train_flops,
        peak_flops=None if peak is None else peak * backend.world_size,
    )
    run = Run(config, backend, data, stream, folder, rows // micro_rows, schedule, loggers, log)
    if backend.is_main and not config.eval_only:
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved(config), sort_keys=False))
    try:
        if config.eval_only:
            run_evaluation(run, state)
            return 0
        return train_loop(run, state)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with {micro_rows} rows at once; lower micro_batch_size (now "
            f"{micro_rows}), or global_batch_size, or set arch.use_gradient_checkpointing=true"
        ) from None
    finally:
        stream.close()
        for logger in run.loggers:
            logger.close()


def train_loop(run: Run, state: TrainState) -> int:
    """Steps until the stream, a limit, or a signal ends the run; returns the exit status."""
    config, clock = run.config, Clock(state.seconds)
    saved_at, evaluated_at = state.step or -1, -1  # what was resumed is saved already
    with run.backend.signals() as received, run.log.progress(state):
        while not run.schedule.over(state):
            batches = run.stream.next(state.step + 1, state.halted)
            if batches is None:
                break
            metrics, stop = train_batch(run, state, batches, clock, received)
            run.log.add(state, metrics)
            run.backend.end_step()
            if state.step % config.log_interval == 0 or state.step == 1:
                run.log.write(state)
            due = run.stream.epoch >= state.next_eval(config)
            every = config.checkpoint_interval
            asked = (every and state.step % every == 0) or (due and config.checkpoint_every_eval)
            if stop or asked:
                with clock.paused():
                    save(run, state)
                saved_at = state.step
            if stop:
                say(run, f"stopped by {signal.Signals(stop).name} after saving step {state.step}; "
                         f"go on with the same command and run_name={config.run_name}")  # fmt: skip
                return 128 + stop
            if due:
                with clock.paused():
                    results = run_evaluation(run, state)
                evaluated_at, state.evaluated_epoch = state.step, run.stream.epoch
                if state.stops_early(config.early_stopping, results):
                    say(run, "stopped early: the evaluations no longer improve")
                    saved_at = -1  # the next start must know
        run.log.write(state)
    if state.step < config.lr_warmup_steps:
        say(run, f"note: the run ended at step {state.step} of {config.lr_warmup_steps} in its "
                 "warm-up, below lr; lower lr_warmup_steps or train for longer")  # fmt: skip
    if saved_at != state.step:
        save(run, state)
    if evaluated_at != state.step:
        run_evaluation(run, state)
    return 0


def train_batch(
    run: Run,
    state: TrainState,
    batches: list[dict[str, Any]],
    clock: Clock,
    received: Received,
) -> tuple[dict[str, Tensor], int]:
    """One optimizer step over this replica's micro-batches.

    Returns the step's metrics (sums, on the device) and the number of a signal that any rank
    received, or 0. The host waits once, for the halted flags and whether all is finite.
    """
    config, backend = run.config, run.backend
    totals: dict[str, Tensor] = {}
    moved = [backend.to_device(batch) for batch in batches]
    if not state.carries:
        state.carries = [state.model.initial_carry(batch) for batch in moved]
        backend.end_step()  # to XLA they are data now, not constants: no program of their own
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
    state.step += 1
    all_finite, stop = share_flags(backend, state, finite, clock, received)
    if all_finite:
        apply_update(run, state)
    else:
        skip_update(run, state)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    totals["updates"] = torch.ones((), device=backend.device)
    return totals, stop


def share_flags(
    backend: Backend, state: TrainState, finite: Tensor, clock: Clock, received: Received
) -> tuple[bool, int]:
    """What all ranks must agree on: which slots have halted (in slot order) and rank 0's clock,
    both noted in `state`; whether all ranks are finite, and the largest signal number."""
    own = torch.cat([carry.halted for carry in state.carries]).long()
    host = [round(clock.seconds * 1000), received[0] if received else 0]
    flags = torch.cat((own, finite.long().view(1), torch.tensor(host, device=own.device)))
    table = backend.to_host(backend.all_gather(flags.unsqueeze(0)))
    state.halted = table[:, :-3].astype(bool).ravel()
    state.seconds = table[0, -2] / 1000
    return bool(table[:, -3].all()), int(table[:, -1].max())


def apply_update(run: Run, state: TrainState) -> None:
    factor = run.schedule.learning_rate_factor(state)
    for optimizer, base in zip(state.optimizers, state.base_lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * factor
        optimizer.step()
    if state.ema is not None:
        state.ema.update()
    state.nonfinite_in_a_row = 0


def skip_update(run: Run, state: TrainState) -> None:
    """Leaves the weights alone and frees the rows whose latents are no longer finite."""
    state.nonfinite += 1
    state.nonfinite_in_a_row += 1
    for carry in state.carries:
        z = carry.inner_carry
        broken = ~(z.z_H.isfinite().all(2).all(1) & z.z_L.isfinite().all(2).all(1))
        carry.halted = carry.halted | broken
    own = torch.cat([carry.halted for carry in state.carries])
    state.halted = run.backend.to_host(run.backend.all_gather(own.int())).astype(bool)
    say(run, f"step {state.step}: loss or gradient is not finite, update skipped")
    if state.nonfinite_in_a_row >= run.config.max_nonfinite:
        good = checkpoint.checkpoints_of(run.folder)
        place = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint"
        raise UserError(
            f"{state.nonfinite_in_a_row} updates in a row were not finite (max_nonfinite="
            f"{run.config.max_nonfinite}); {place}; lower lr (now {run.config.lr:g}) and resume"
        )


def run_evaluation(run: Run, state: TrainState) -> dict[str, Any]:
    """Evaluates the averaged weights on the test split, logs and prints what was found."""
    config, backend, arch = run.config, run.backend, state.model.model.config
    if run.data.test is None:
        say(run, "the corpora have no test split, or an empty one: evaluation is skipped")
        return {}
    whole, test_rows = backend.world_size, run.data.test.num_rows
    at_once = config.rows_per_rank(whole) // run.micro_batches
    if not config.compile:  # another shape would be compiled anew
        at_once = min(at_once, -(-test_rows // whole))
    rows = config.eval_batch_size or whole * at_once
    stream = EvalStream(
        run.data.test,
        global_batch_size=rows,
        rank=backend.rank,
        world_size=backend.world_size,
        max_batches=config.eval_max_batches,
        min_iterations=config.min_iterations,
        max_iterations=getattr(arch, "halt_max_steps", None),
    )
    if getattr(arch, "post_refinement_steps", 0) and not arch.post_refinement_train:
        say(run, "note: the refinement passes were never trained (post_refinement_train=false); "
                 "figures without them are under unrefined/")  # fmt: skip
    evaluators = create_evaluators(config.evaluators, run.data.test_paths, run.data.test.metadata)
    bar = tqdm(total=len(stream), desc="evaluate", unit="batch", leave=False,
               disable=not backend.is_main or not sys.stderr.isatty())  # fmt: skip
    with state.ema.swapped() if state.ema is not None else nullcontext():
        results = evaluate(
            state.model,
            ticking(prefetched(stream, config.num_workers), bar),
            evaluators,
            backend,
            save_outputs=config.eval_save_outputs,
            save_path=run.folder / f"evaluation_step_{state.step}",
        )
    bar.close()
    results = {f"eval/{name}": value for name, value in results.items()}
    for logger in run.loggers:
        logger.log(results, state.step)
    say(run, evaluation_table(results, state.step))
    return results


def save(run: Run, state: TrainState) -> None:
    persistence.save(
        run.config,
        state,
        run.stream,
        run.backend,
        run.folder,
        metadata=run.data.train.metadata,
        identifiers=run.data.train.identifiers,
        tokenizer=run.data.tokenizer,
    )


def say(run: Run, sentence: str) -> None:
    if run.backend.is_main:
        tqdm.write(sentence)


main = hydra_entry(launch)

if __name__ == "__main__":
    main()
