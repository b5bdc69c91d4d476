"""Building a run: everything that it needs, where its last checkpoint left it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dataset.tokens.tokenization import TextTokenizer
from evaluators.interface import Evaluator
from evaluators.loop import create_evaluators
from models import cost
from models.build import create_model, load_into
from models.inference.loading import fitting_weights, load_anchor, open_tokenizer
from models.losses import ACTLossHead
from sequence_dataset import TrainStream
from utils.backend import Backend
from utils.backend.feed_ahead import PresentAhead
from utils.checkpoint.format import Checkpoint
from utils.config.saved import dump_config
from utils.config.schema import PretrainConfig
from utils.core.atomic import write_result
from utils.core.clock import Clock
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.corpus.data import Data
from utils.monitoring.loggers import Loggers
from utils.monitoring.profiling import StepProfiler
from utils.monitoring.watchdog import Watchdog
from utils.training import lr_finder
from utils.training import resume as persistence
from utils.training.log import TrainingLog
from utils.training.save import Saver
from utils.training.schedule import Schedule
from utils.training.state import TrainState, choose_kernels, create_train_state


class Run(NamedTuple):
    """What stays the same for a whole run on one replica."""

    config: PretrainConfig
    backend: Backend
    data: Data
    stream: TrainStream | PresentAhead
    folder: Path
    micro_batches: int
    schedule: Schedule
    loggers: Loggers
    log: TrainingLog
    saver: Saver
    evaluators: list[Evaluator]
    tokenizer: TextTokenizer | None
    """Read at the start: in the days of a run its file may go."""
    clock: Clock
    watchdog: Watchdog
    profiler: StepProfiler
    received: Sequence[int] = ()
    """Numbers of the signals that ask the run to stop."""


def create_stream(
    config: PretrainConfig, arch: Any, data: Data, backend: Backend, micro_batches: int
) -> TrainStream | PresentAhead:
    """`arch` is the model's own config, with its defaults."""
    make = partial(
        TrainStream.from_config,
        data.train,
        config,
        arch,
        rank=backend.rank,
        world_size=backend.world_size,
        micro_batches=micro_batches,
    )
    stream = make(num_workers=config.num_workers)
    if config.feed == "present" and backend.moved_ahead is not None:
        return PresentAhead(stream, make(num_workers=0), backend.moved_ahead)
    return stream


def build(
    folder: Path, data: Data, backend: Backend, config: PretrainConfig
) -> tuple[Run, TrainState]:
    """Everything that a run needs, where its last checkpoint left it if it has one."""
    rows = config.rows_per_rank(backend.world_size)
    resumed = persistence.find_resume(config, folder, backend)
    labels = data.reasoning_ids() if config.arch.loss.options.get("reasoning_loss_weight") else 0
    with backend.taking_turns():
        anchor = load_anchor(config, data, backend)
        model = create_model(
            config.arch,
            data.train.metadata,
            batch_size=rows,
            seed=config.seed,
            reasoning_ids=labels,
        )
        model.anchor = anchor
    choose_kernels(config, model, backend)
    loaded_step = 0
    if config.load_checkpoint and resumed is None:
        loaded, loaded_step = load_pretrained(config, model, data.train.identifiers, data.tokenizer)
        if backend.is_main:
            print(f"starting from the {loaded}")
    micro_batches = rows // micro_batch_rows(config, backend, model, resumed)
    model.to(backend.device)
    state = create_train_state(config, model, backend=backend)
    stream = create_stream(config, model.model.config, data, backend, micro_batches)
    arch = model.model.config
    refines = getattr(arch, "post_refinement_steps", 0) and not arch.post_refinement_train
    if backend.is_main and refines and data.test is not None:
        print("note: the refinement passes are never trained (post_refinement_train=false); "
              "evaluations have figures without them under unrefined/")  # fmt: skip
    if resumed is not None:
        persistence.restore(config, state, stream, backend, resumed, folder, micro_batches)
    elif config.eval_only:
        state.step = loaded_step
    evaluators = create_evaluators(config.evaluators, data)
    if config.early_stopping is not None and data.test is None and not evaluators:
        raise UserError(
            f"early_stopping.metric={config.early_stopping.metric} is never evaluated, because the "
            "corpora have no test split; name one with data_paths_test, or leave early_stopping out"
        )
    schedule = (lr_finder.Sweep if config.lr_find else Schedule)(config, stream)
    names = config.logger if backend.is_main else []
    place = None if config.eval_only else state.step
    loggers = Loggers(names, folder, dump_config(config), place)
    peak = backend.peak_flops(model.model.config.dtype)
    log = TrainingLog(
        loggers,
        backend,
        schedule,
        row_tokens=data.train.metadata.seq_len,
        rows=config.global_batch_size,
        flops_per_token=cost.measure(model.model).train_flops
        + (cost.measure(anchor.model).forward_flops if anchor else 0),
        peak_flops=None if peak is None else peak * backend.world_size,
    )
    saver = Saver(config, state, stream, backend, folder, data.train, data.tokenizer)
    clock = Clock(state.seconds)
    metadata, file = data.train.metadata, data.tokenizer
    tokenizer = None if file is None else open_tokenizer(file, metadata)
    watchdog = Watchdog(backend, clock, config.slow_step_factor, config.step_timeout)
    told = folder / "config.yaml"
    if backend.is_main and not (config.eval_only and told.exists()):  # a training's own is kept
        with write_result(told, f"checkpoint_path={folder}: config.yaml") as part:
            part.write_text(yaml.safe_dump(dump_config(config), sort_keys=False), encoding="utf-8")
    run = Run(
        config, backend, data, stream, folder, micro_batches, schedule, loggers, log, saver,
        evaluators, tokenizer, clock, watchdog,
        StepProfiler(folder if config.profile else None, backend, state.step),
    )  # fmt: skip
    return run, state


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
