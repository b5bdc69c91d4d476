"""Build a run: model, optimizers, stream, logs and saver, restored if there is a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataset.tokens.tokenization import TextTokenizer
from evaluators.interface import Evaluator
from evaluators.loop import create_evaluators
from models.build import create_model, load_into
from models.inference.loading import base_loader, fitting_weights, open_tokenizer
from models.losses import ACTLossHead, create_terms
from sequence_dataset import TrainStream
from utils.backend import Backend
from utils.backend.memory import explain_out_of_memory, ran_out_of_memory
from utils.backend.tracing import Untraceable
from utils.checkpoint.format import Checkpoint
from utils.config.saved import config_yaml, dump_config
from utils.config.schema import PretrainConfig
from utils.core.atomic import write_result
from utils.core.clock import Clock
from utils.core.console import notify
from utils.core.errors import UserError
from utils.corpus.data import Data
from utils.monitoring.loggers import Loggers
from utils.monitoring.profiling import StepProfiler
from utils.monitoring.watchdog import Watchdog
from utils.training.log import TrainingLog
from utils.training.lr_finder import Sweep
from utils.training.plan import MemoryPlan, count_present_bytes
from utils.training.resume import prepare_resume, restore
from utils.training.save import Saver
from utils.training.schedule import Schedule
from utils.training.state import TrainState, choose_kernels, create_train_state


@dataclass
class Run:
    """One replica of a run: the training state and everything that it needs to train.

    Args:
        state: everything that training changes and a checkpoint stores.
        rows_at_once: rows of a micro-batch of this replica.
        tokenizer: loaded at startup; its file may be deleted while the run is in progress.
        clock: seconds of training, without evaluation and saving.
        received: numbers of the signals that ask the run to stop.
    """

    config: PretrainConfig
    backend: Backend
    data: Data
    folder: Path
    state: TrainState
    stream: TrainStream
    rows_at_once: int
    schedule: Schedule
    evaluators: list[Evaluator]
    tokenizer: TextTokenizer | None
    loggers: Loggers
    log: TrainingLog
    saver: Saver
    clock: Clock
    watchdog: Watchdog
    profiler: StepProfiler
    received: Sequence[int] = ()

    def close(self) -> None:
        """Wait for the checkpoint in progress, then close threads and loggers."""
        self.saver.writer.close()
        self.stream.close()
        self.loggers.close()


@explain_out_of_memory(
    "while building the run; choose a smaller model (a preset of arch, arch.hidden_size), "
    "ema=false, or parallel=fsdp on several GPUs, and check for other programs on the device"
)
def build_run(config: PretrainConfig, backend: Backend, data: Data, folder: Path) -> Run:
    """Build everything the run needs, restoring the latest checkpoint if there is one.

    A collective. folder: the run's directory, which must exist.
    """
    resumed = prepare_resume(config, folder, backend)
    model, counters = build_model(config, backend, data, resumed)
    rows = config.rows_per_rank(backend.world_size)
    micro_rows, plan = choose_micro_batch_rows(config, backend, model, data, resumed)
    model.to(backend.device)
    state = create_train_state(config, model, backend=backend)
    tries = backend.tries_sizes and config.parallel != "fsdp" and not config.eval_only
    if plan is not None and tries:
        micro_rows = try_rows(plan, state, backend, micro_rows)
    micro_batches = rows // micro_rows
    stream = create_stream(config, model, data, backend, micro_batches)
    for note in model.model.notes() if data.test is not None else ():
        backend.report(f"note: {note}")
    if resumed is not None:
        restore(config, state, stream, backend, resumed, folder, micro_batches)
    elif config.eval_only:
        state.step, state.progress = counters.get("step", 0), counters.get("progress", 1.0)
    evaluators = create_evaluators(config.evaluators, data)
    check_early_stopping(config, data, evaluators)
    schedule = (Sweep if config.lr_find else Schedule)(config, stream)
    names = config.logger if backend.is_main else []
    start = None if config.eval_only else state.step
    loggers = Loggers(names, folder, dump_config(config), start)
    dtype = model.model.config.dtype
    log = TrainingLog(config, data.train.metadata, dtype, backend, stream, loggers)
    saver = Saver(config, state, stream, backend, folder, data.train, data.tokenizer)
    clock = Clock(state.seconds)
    file, metadata = data.tokenizer, data.train.metadata
    tokenizer = None if file is None else open_tokenizer(file, metadata)
    watchdog = Watchdog(backend, clock, config.slow_step_factor, config.step_timeout)
    if backend.is_main:
        write_config(config, folder)
    return Run(
        config=config,
        backend=backend,
        data=data,
        folder=folder,
        state=state,
        stream=stream,
        rows_at_once=micro_rows,
        schedule=schedule,
        evaluators=evaluators,
        tokenizer=tokenizer,
        loggers=loggers,
        log=log,
        saver=saver,
        clock=clock,
        watchdog=watchdog,
        profiler=StepProfiler(folder if config.profile else None, backend, state.step),
    )


def build_model(
    config: PretrainConfig, backend: Backend, data: Data, resumed: Checkpoint | None
) -> tuple[ACTLossHead, dict[str, Any]]:
    """Build the model on the host, with the initial weights of a new run.

    Returns the model, and the counters of the run that those weights come from, {} if unknown.
    `restore` loads the weights of a resumed run later.
    """
    terms = create_terms(config.arch.loss.options.get("terms") or {})
    highest = data.highest_values({name for term in terms for name in term.needs_data})
    with backend.one_rank_at_a_time():
        model = create_model(
            config.arch,
            data.train.metadata,
            batch_size=config.rows_per_rank(backend.world_size),
            seed=config.seed,
            highest=highest,
        )
        if not config.eval_only:
            model.prepare(base_loader(data, backend))
    choose_kernels(config, model, backend)
    if not config.load_checkpoint or resumed is not None:
        return model, {}
    weights, opened = fitting_weights(
        "load_checkpoint",
        config.load_checkpoint,
        config.load_weights,
        data.train.identifiers,
        data.tokenizer,
    )
    load_into(model.model, weights, opened)
    source = f"weights of {config.load_checkpoint}"
    if opened is not None:
        averaged = config.load_weights == "ema" and "ema.pt" in opened
        source = f"{'averaged' if averaged else 'raw'} weights of {opened.folder}"
    backend.report(f"starting from the {source}")
    return model, {} if opened is None else opened.state["counters"]


def create_stream(
    config: PretrainConfig, model: ACTLossHead, data: Data, backend: Backend, micro_batches: int
) -> TrainStream:
    """Create the stream of training batches of this replica.

    Raises UserError if the architecture does not support the configured budgets.
    """
    architecture = model.model
    least, most = config.min_iterations, architecture.max_steps
    name = config.arch.name
    if least is not None and least > most > 1:
        raise UserError(f"min_iterations={least} exceeds the {most} steps of {name}: lower it")
    if config.iteration_curriculum is not None and most == 1 and not config.lr_find:
        raise UserError(
            f"iteration_curriculum increases budgets of ACT steps, but {name} takes only one step: "
            "use null"
        )
    return TrainStream.from_config(
        data.train,
        config,
        architecture.max_steps,
        least_iterations=architecture.min_steps,
        row_options=architecture.row_options,
        rank=backend.rank,
        world_size=backend.world_size,
        micro_batches=micro_batches,
    )


def write_config(config: PretrainConfig, folder: Path) -> None:
    """Write config.yaml, unless the run only evaluates, which keeps that of the training."""
    path = folder / "config.yaml"
    if config.eval_only and path.exists():
        return
    with write_result(path, f"checkpoint_path={folder}: config.yaml") as part:
        part.write_text(config_yaml(config), encoding="utf-8")


def check_early_stopping(
    config: PretrainConfig, data: Data, evaluators: Sequence[Evaluator]
) -> None:
    """Raise UserError if early stopping watches a metric that is never evaluated."""
    if config.early_stopping is not None and data.test is None and not evaluators:
        raise UserError(
            f"early_stopping.metric={config.early_stopping.metric} is never evaluated, because the "
            "corpora have no test split; set data_paths_test, or remove early_stopping"
        )


def choose_micro_batch_rows(
    config: PretrainConfig,
    backend: Backend,
    model: ACTLossHead,
    data: Data,
    resumed: Checkpoint | None,
) -> tuple[int, MemoryPlan | None]:
    """Return the number of rows that a rank processes at once: as configured, as before the resume,
    or as many as fit in the memory of every rank. A collective.

    Also returns the memory plan if the number is based on it.
    """
    ranks, device = backend.world_size, backend.device.type
    rows = config.rows_per_rank(ranks)
    # as before, so that a resumed run is exact even if less memory is free now
    before = resumed.state.get("micro_rows") if resumed is not None else None
    if before is not None and rows % before != 0:  # saved with another world size
        before = None
    known = config.micro_rows(ranks) or backend.broadcast_object(before)
    if known is not None:
        return known, None
    with backend.one_rank_at_a_time():
        plan = MemoryPlan(
            config,
            data.train.metadata,
            ranks=ranks,
            device=device,
            kernel=getattr(model.model.inner, "masked_attention", None),
            reasoning_width=data.train.reasoning_width,
        )
        # the plan includes the memory that is already in use
        free = backend.available_memory() + count_present_bytes(model, device)
        try:
            own = plan.fitting_rows(free)
        except Untraceable as error:
            backend.report(
                f"note: micro_batch_size=auto processes all {rows} rows of a rank at once, because "
                f"{error}; give micro_batch_size=<rows> if memory runs out"
            )
            return rows, None
    return min(backend.gather_objects(own)), plan  # each divides the rows of a rank


def try_rows(plan: MemoryPlan, state: TrainState, backend: Backend, planned: int) -> int:
    """Return the largest number of rows at once, at most `planned`, with which every rank can take
    a step. A collective.

    Runs a forward and a backward pass without collectives while as much memory as in a run is
    allocated; only the compilation cache changes. Raises UserError if even one row does not fit in
    memory.
    """
    own = planned
    while own and not _fits(plan, state, backend, own):
        smaller = max((n for n in range(1, own // 2 + 1) if plan.rows % n == 0), default=0)
        if smaller:
            where = f"rank {backend.rank}" if backend.world_size > 1 else "this device"
            notify(
                f"note: {where} ran out of memory in a trial of {own} rows; trying {smaller} "
                f"instead (micro_batch_size={smaller} would skip the trial)"
            )
        own = smaller
    if not (least := min(backend.gather_objects(own))):
        raise MemoryError  # explained by `build_run`
    return least


def _fits(plan: MemoryPlan, state: TrainState, backend: Backend, rows: int) -> bool:
    """Return whether a forward and a backward pass with this many rows fit in memory."""
    model, parts = state.model, plan.parts(rows)
    present = count_present_bytes(model, backend.device.type)
    present += sum(part.nbytes for part in state.ema.shadow.values()) if state.ema else 0
    lasting = sum(parts.values()) - parts["activations"] - parts["gradients"] - present

    def run() -> None:
        kept = torch.empty(max(0, lasting), dtype=torch.uint8, device=backend.device)
        if plan.ranks == 1 and rows < plan.rows:  # gradients of earlier micro-batches exist
            for parameter in state.parameters:
                parameter.grad = torch.zeros_like(parameter)
        batch = backend.to_device(plan.make_batch(rows))
        carry = model.initial_carry(batch)
        _, loss, *_ = model(return_keys=(), carry=carry, batch=batch, **plan.largest_options)
        if loss.requires_grad:
            loss.backward()
        backend.to_host(loss.detach())  # waits for the device
        del kept

    on_cuda = [backend.device] if backend.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=on_cuda):
            run()
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return False
    finally:
        state.drop_gradients()
        backend.release_memory()
    return True
