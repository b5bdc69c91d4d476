"""The training configuration: every key, its type, its unit and its default.

This is the one home of these facts: `config/cfg_pretrain.yaml` and `--help` repeat them and
a test holds the yaml to them. Options of the architecture, the loss and the evaluators are
declared by those classes themselves (their `Config`) and are extra keys here.
"""

import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from utils.config.errors import to_float, to_int
from utils.core.console import LARGEST_SEED


def _to_text(value: Any) -> Any:
    """A run may be called `7`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _null_is_none_word(value: Any) -> Any:
    return "none" if value is None else value


Int = Annotated[int, BeforeValidator(to_int)]
Float = Annotated[float, BeforeValidator(to_float), Field(allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(_to_text)]
# no shell expands ~ within brackets, and few do behind key=
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
# logs show evaluation metrics below eval/
MetricName = Annotated[Text, AfterValidator(lambda name: name.removeprefix("eval/"))]

# Options of an architecture that the data decide. While the config is checked no data is open:
# large enough here that no bound of the architecture is met by accident.
# Also what a schedule is given from a key of its own.
PLACEHOLDERS = {
    "batch_size": 1,
    "seq_len": 65536,
    "vocab_size": 65536,
    "num_puzzle_identifiers": 1,
    "lr_min_ratio": 0.1,
}

# Whether a key may differ when a run is resumed (`utils/config/saved.py`): ANY where it leaves the
# training curve as it is, up to rounding; FIXED where examples would come twice or never. All other
# keys may differ where `resume_allow` names them.
ANY: dict[str, Any] = {"on_resume": "any"}
FIXED: dict[str, Any] = {"on_resume": "fixed"}

PositiveInt = Annotated[Int, Field(ge=1)]
CountInt = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, le=LARGEST_SEED)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Ratio = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]  # of a running average: 1 would never move


class Component(pydantic.BaseModel):
    """A plug-in named `module@Class` and the options that it declares itself."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    PREFIX: ClassVar[str]
    """The package that its module lies in, with a dot."""
    BARE: ClassVar[bool] = False
    """Whether its name alone may stand for it."""
    KIND: ClassVar[Literal["class", "function"]] = "class"
    NO_OPTIONS: ClassVar[type[pydantic.BaseModel] | None] = None
    """The options of one that declares none; None where its constructor says."""
    FIRST_ARGUMENTS: ClassVar[int] = 0
    """Arguments of the constructor that are no options."""

    name: str = Field(description="the class, as module@Class")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if cls.BARE and isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The options of the named class, as given."""
        return dict(self.__pydantic_extra__ or {})


class LossConfig(Component):
    """A loss head below `models.` and its options."""

    PREFIX = "models."
    FIRST_ARGUMENTS = 1


class ArchConfig(Component):
    """An architecture below `models.` and its options."""

    PREFIX = "models."

    loss: LossConfig = Field(description="the loss head and its options")


class EvaluatorConfig(Component):
    """An evaluator below `evaluators.` and its options."""

    PREFIX = "evaluators."
    BARE = True
    FIRST_ARGUMENTS = 2


class _SavedByName(Component):
    """A plug-in that is saved as its bare name where it has no options."""

    BARE = True

    @pydantic.model_serializer(mode="wrap")
    def _as_given(self, handler: Callable[[Any], dict[str, Any]]) -> str | dict[str, Any]:
        return handler(self) if self.options else self.name


class NoOptions(pydantic.BaseModel):
    """What a plug-in has that declares no options."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class ScheduleOptions(NoOptions):
    """What every learning-rate schedule is given; a subclass declares options besides."""

    lr_min_ratio: float = Field(description="value of that key")


class OptimizerConfig(_SavedByName):
    """An optimizer below `utils.training.optimizers.` and its options."""

    PREFIX = "utils.training.optimizers."
    NO_OPTIONS = NoOptions


class ScheduleConfig(_SavedByName):
    """A learning-rate schedule below `utils.training.lr_schedules.` and its options."""

    PREFIX = "utils.training.lr_schedules."
    KIND = "function"
    NO_OPTIONS = ScheduleOptions


class LoggerConfig(_SavedByName):
    """A logger below `utils.monitoring.loggers.` and its options."""

    PREFIX = "utils.monitoring.loggers."
    FIRST_ARGUMENTS = 3


class EarlyStoppingConfig(pydantic.BaseModel):
    """When to end a run that no longer improves."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    metric: MetricName = Field(description="evaluation metric to watch, e.g. text/perplexity")
    patience: PositiveInt = Field(3, description="evaluations without improvement before the end")
    min_delta: NonNegativeFloat = Field(0.0, description="least change that is an improvement")
    mode: Literal["min", "max"] = Field("min", description="whether less or more is better")


class LRFindConfig(pydantic.BaseModel):
    """The sweep of the learning rate that `lr_find` asks for."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    low: PositiveFloat = Field(1e-6, description="learning rate of the first step")
    high: PositiveFloat = Field(1.0, description="learning rate of the last step")
    steps: Annotated[Int, Field(ge=10)] = Field(120, description="optimizer steps between them")


def _bare_flag(value: Any) -> Any:
    """`lr_find=true` asks for the defaults of that sweep, `lr_find=false` for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class IterationCurriculumConfig(pydantic.BaseModel):
    """How iteration budgets grow over a run."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    start: Annotated[Float, Field(gt=0, lt=1)] = Field(
        0.25, description="share of its budget that a row gets at the beginning"
    )
    until: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the run from which budgets are whole"
    )


class PretrainConfig(pydantic.BaseModel):
    """The whole configuration of a run, as `load_config` returns it."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    # Data
    data_paths: list[PathText] = Field(
        [], description="corpus folders to train on", json_schema_extra=ANY
    )
    data_paths_test: list[PathText] = Field(
        [], description="corpus folders to evaluate on; [] is data_paths", json_schema_extra=ANY
    )
    domain_weights: dict[str, NonNegativeFloat] | None = Field(
        None,
        description="share of each domain in the mix, by name; null: as built, {}: by size",
        json_schema_extra=FIXED,
    )
    min_iterations: PositiveInt | None = Field(
        None, description="lifts every iteration budget below it, in ACT steps"
    )
    iteration_curriculum: IterationCurriculumConfig | None = Field(
        None, description="{start, until}: budgets grow from a share of them; null: whole always"
    )
    feed: Literal["consume", "present"] = Field(
        "consume",
        description="consume: freed slots take the next example; present: as TRM",
        json_schema_extra=FIXED,
    )
    num_workers: CountInt = Field(
        1,
        description="threads that read rows ahead, in training and evaluation; 0: none",
        json_schema_extra=ANY,
    )
    vocab_size: PositiveInt | None = Field(
        None, description="token ids, for a dry_run without a corpus", json_schema_extra=ANY
    )
    seq_len: PositiveInt | None = Field(
        None, description="tokens per row, for a dry_run without a corpus", json_schema_extra=ANY
    )

    # Model
    arch: ArchConfig = Field(description="architecture and loss: a preset, and arch.<option>")
    seed: Seed = Field(
        0, description="of the weights, the order and the exploration", json_schema_extra=FIXED
    )
    freeze_weights: bool = Field(False, description="train the identifier embedding only")

    # Length
    global_batch_size: PositiveInt = Field(768, description="rows (slots) over all ranks")
    micro_batch_size: PositiveInt | Literal["auto"] | None = Field(
        "auto",
        description="rows a rank computes at once; auto: what memory allows",
        json_schema_extra=ANY,
    )
    grad_accum_steps: PositiveInt = Field(
        1,
        description="micro-batches per optimizer step; 1 leaves it to micro_batch_size",
        json_schema_extra=ANY,
    )
    epochs: PositiveFloat | None = Field(
        1.0, description="passes over the corpus, may be a fraction; null: no limit"
    )
    max_steps: PositiveInt | None = Field(None, description="optimizer steps at most")
    max_seconds: PositiveFloat | None = Field(None, description="seconds of training at most")

    # Optimizer
    optimizer: OptimizerConfig = Field(
        "adam_atan2",  # read like a user's value
        validate_default=True,
        description="of all weights but the identifier embedding; or {name: ..., option: value}",
    )
    lr: NonNegativeFloat = Field(8e-5, description="peak learning rate")
    lr_schedule: ScheduleConfig = Field(
        "cosine",
        validate_default=True,
        description="how lr falls after the warm-up; or {name: ..., option: value}",
    )
    lr_min_ratio: Ratio = Field(0.1, description="last learning rate, as a share of lr")
    lr_warmup_steps: CountInt = Field(4000, description="optimizer steps of linear warm-up")
    beta1: Decay = Field(0.9, description="decay of the gradient's mean, per step")
    beta2: Decay = Field(0.95, description="decay of the squared gradient's mean, per step")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled, times the learning rate")
    weight_decay_all: bool = Field(False, description="decay norms and embeddings too")
    grad_clip_norm: PositiveFloat | None = Field(
        1.0, description="largest gradient norm; null: no clipping"
    )
    puzzle_emb_lr: NonNegativeFloat = Field(
        2e-4, description="learning rate of the identifier embedding"
    )
    puzzle_emb_weight_decay: NonNegativeFloat = Field(
        0.1, description="decay of the identifier rows used in a step"
    )
    max_nonfinite: PositiveInt = Field(
        10,
        description="skipped non-finite updates in a row before the run stops",
        json_schema_extra=ANY,
    )
    ema: bool = Field(True, description="evaluate a moving average of the weights")
    ema_rate: Decay = Field(0.9995, description="decay of that average, per step")
    ema_warmup: bool = Field(True, description="start the average at a lower decay")

    # Evaluation
    evaluators: list[EvaluatorConfig] = Field(
        ["text@PerplexityEvaluator"],  # read like a user's value
        validate_default=True,
        description="module@Class, or {name: module@Class, option: value}",
        json_schema_extra=ANY,
    )
    eval_interval: PositiveFloat | None = Field(
        None,
        description="epochs between evaluations; null: once, at the end",
        json_schema_extra=ANY,
    )
    min_eval_interval: NonNegativeFloat = Field(
        0.0, description="epochs before the first evaluation", json_schema_extra=ANY
    )
    eval_batch_size: PositiveInt | None = Field(
        None,
        description="rows over all ranks; null: as in training, or fewer",
        json_schema_extra=ANY,
    )
    eval_max_batches: PositiveInt | None = Field(
        None,
        description="batches of eval_batch_size or global_batch_size rows at most; null: all",
        json_schema_extra=ANY,
    )
    eval_save_outputs: list[str] = Field(
        [], description="predictions to write per evaluation", json_schema_extra=ANY
    )
    eval_only: bool = Field(
        False, description="evaluate a checkpoint, train nothing", json_schema_extra=ANY
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        None, description="{metric, patience, min_delta, mode}; null: never", json_schema_extra=ANY
    )

    # Checkpoints
    project_name: Text = Field(
        "athena", description="folder of checkpoints, project of loggers", json_schema_extra=ANY
    )
    run_name: Text | None = Field(
        None,
        description="name of the run; null: date, time and a random part",
        json_schema_extra=ANY,
    )
    checkpoint_path: PathText | None = Field(
        None,
        description="the run's own folder; null: checkpoints/<project_name>/<run_name>",
        json_schema_extra=ANY,
    )
    checkpoint_every_eval: bool = Field(
        True, description="save before every evaluation", json_schema_extra=ANY
    )
    checkpoint_interval: PositiveInt | None = Field(
        1000,
        description="optimizer steps between checkpoints; null: none between",
        json_schema_extra=ANY,
    )
    keep_checkpoints: PositiveInt | None = Field(
        3,
        description="checkpoints kept, the newest and besides them the best; null: all",
        json_schema_extra=ANY,
    )
    best_metric: MetricName | None = Field(
        None,
        description="evaluation metric of the best checkpoint; null: early_stopping's or loss",
        json_schema_extra=ANY,
    )
    best_mode: Literal["min", "max"] = Field(
        "min", description="whether less or more is better", json_schema_extra=ANY
    )
    checkpoint_carry: bool = Field(
        True, description="save held rows, for an exact resume", json_schema_extra=ANY
    )
    resume: Annotated[PathText, BeforeValidator(_null_is_none_word)] = Field(
        "auto",
        description="auto: go on where the run's folder ends; none; or a checkpoint",
        json_schema_extra=ANY,
    )
    resume_allow: list[str] = Field(
        [], description="keys that may differ when resuming", json_schema_extra=ANY
    )
    load_checkpoint: PathText | None = Field(
        None,
        description="start a new run from the weights of this checkpoint",
        json_schema_extra=ANY,
    )
    load_weights: Literal["ema", "raw"] = Field(
        "ema",
        description="which weights load_checkpoint and arch.loss.kl_to take",
        json_schema_extra=ANY,
    )

    # Machine
    device_type: Literal["auto", "cuda", "xla", "tpu", "mps", "cpu"] = Field(
        "auto", description="auto: TPU, else CUDA, else MPS, else CPU", json_schema_extra=ANY
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="how ranks share the work", json_schema_extra=ANY
    )
    slow_step_factor: Annotated[Float, Field(gt=1)] = Field(
        10.0,
        description="warn when a step takes this many times the median",
        json_schema_extra=ANY,
    )
    step_timeout: PositiveFloat | None = Field(
        3600.0,
        description="seconds without progress that end the run, naming the rank; null: never",
        json_schema_extra=ANY,
    )
    deterministic: bool = Field(
        True,
        description="on CUDA: the same bits whenever a run is resumed; false may be faster",
        json_schema_extra=ANY,
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the model; auto: on CUDA, where Triton works",
        json_schema_extra=ANY,
    )
    dry_run: bool = Field(
        False, description="build the model, print its cost, and end", json_schema_extra=ANY
    )
    lr_find: Annotated[LRFindConfig | None, BeforeValidator(_bare_flag)] = Field(
        None,
        description="true, or {low, high, steps}: sweep the learning rate, plot, and end",
        json_schema_extra=ANY,
    )
    profile: bool = Field(
        False, description="trace steps 10 to 15, and list what costs most", json_schema_extra=ANY
    )

    # Logging
    logger: list[LoggerConfig] = Field(
        ["jsonl"],
        validate_default=True,
        description="where metrics go; or {name: ..., option: value}",
        json_schema_extra=ANY,
    )
    log_interval: PositiveInt = Field(
        10, description="optimizer steps between log lines", json_schema_extra=ANY
    )

    def rows_per_rank(self, world_size: int) -> int:
        """Rows of the global batch that each rank owns."""
        return self.global_batch_size // world_size

    def micro_rows(self, world_size: int) -> int | None:
        """Rows that a rank computes at once, or None where the memory estimate decides."""
        rows = self.rows_per_rank(world_size)
        if isinstance(self.micro_batch_size, int):
            return self.micro_batch_size
        if self.grad_accum_steps > 1 or self.micro_batch_size is None:
            return rows // self.grad_accum_steps
        return None
