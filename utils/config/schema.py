"""The training configuration: every key, its type, its unit and its default.

Keys are declared here and nowhere else: Hydra composes from these defaults and `--help` prints
them. Options of the architecture, the loss and other plug-ins are declared by those classes
themselves (their `Config`) and are extra keys here.
"""

import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from utils.config.errors import to_float, to_int
from utils.core.console import LARGEST_SEED


def _to_text(value: Any) -> Any:
    """Convert a whole number to text, because a run may be called `7`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _null_is_none_word(value: Any) -> Any:
    return "none" if value is None else value


Int = Annotated[int, BeforeValidator(to_int)]
Float = Annotated[float, BeforeValidator(to_float), Field(allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(_to_text)]
# shells do not expand ~ within brackets, and few do after key=
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]


def _as_list(value: Any) -> Any:
    """Read one directory without brackets, or a list as text from key=value programs."""
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.strip("[]").split(",") if part.strip()]


Folders = Annotated[
    list[Annotated[PathText, AfterValidator(os.path.abspath)]], BeforeValidator(_as_list)
]
# logs show evaluation metrics below eval/
MetricName = Annotated[Text, AfterValidator(lambda name: name.removeprefix("eval/"))]

# Options that users do not set: sizes that the data determine, and values that a schedule takes
# from keys of the config. The config is checked before the data are opened, so these sizes are
# placeholders, large enough for the limits of any architecture.
PLACEHOLDERS = {
    "batch_size": 1,
    "seq_len": 65536,
    "vocab_size": 65536,
    "num_puzzle_identifiers": 1,
    "lr_min_ratio": 0.1,
}

PositiveInt = Annotated[Int, Field(ge=1)]
CountInt = Annotated[Int, Field(ge=0)]
Seed = Annotated[Int, Field(ge=0, le=LARGEST_SEED)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Ratio = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]  # decay of a running average; 1 would never change it


def key(default: Any, description: str, on_resume: Literal["any", "fixed"] | None = None) -> Any:
    """Declare a key of the training config.

    default: checked and converted like a user's value. on_resume: whether the key may differ when a
    run is resumed (`utils/config/saved.py`): "any" if it changes the training curve only by
    rounding, "fixed" if examples would be repeated or lost; None: only if `resume_allow` names the
    key.
    """
    extra: dict[str, Any] = {"on_resume": on_resume} if on_resume else {}
    return Field(default, description=description, json_schema_extra=extra, validate_default=True)


class Component(pydantic.BaseModel):
    """The name of a plug-in, `module@Class`, with the options that it declares itself."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    PREFIX: ClassVar[str]
    """The package that contains its module, with a dot at the end."""
    BARE: ClassVar[bool] = False
    """Whether the plug-in may be given as its bare name."""
    KIND: ClassVar[Literal["class", "function"]] = "class"
    NO_OPTIONS: ClassVar[type[pydantic.BaseModel] | None] = None
    """Default for plug-ins that do not declare options; None: the arguments of the constructor."""
    FIRST_ARGUMENTS: ClassVar[int] = 0
    """Number of leading constructor arguments that are not options."""
    NOUN: ClassVar[str] = ""
    """The name of this kind of class, with its article."""
    MEMBERS: ClassVar[tuple[str, ...]] = ()
    """Attributes that every class of this kind has."""

    name: str = Field(description="the class, as module@Class")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if cls.BARE and isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the named class, as given."""
        return dict(self.__pydantic_extra__ or {})


class LossConfig(Component):
    """A loss head in the package `models` and its options."""

    PREFIX = "models."
    FIRST_ARGUMENTS = 1
    NOUN, MEMBERS = "a loss head", ("initial_carry", "prepare")


class LossTermConfig(Component):
    """A loss term in the package `models.terms` and its options."""

    PREFIX = "models.terms."
    FIRST_ARGUMENTS = 1
    NOUN, MEMBERS = "a loss term (Term)", ("needs", "training_only", "prepare")


class ArchConfig(Component):
    """An architecture in the package `models` and its options."""

    PREFIX = "models."
    NOUN, MEMBERS = "an Architecture", ("Config", "initial_carry", "eval_depth")

    loss: LossConfig = Field(description="the loss head and its options")


class EvaluatorConfig(Component):
    """An evaluator in the package `evaluators` and its options."""

    PREFIX = "evaluators."
    BARE = True
    FIRST_ARGUMENTS = 2
    NOUN, MEMBERS = "an evaluator", ("begin_eval", "result")


class _SavedByName(Component):
    """A plug-in that is saved as its bare name if it has no options."""

    BARE = True

    @pydantic.model_serializer(mode="wrap")
    def _as_given(self, handler: Callable[[Any], dict[str, Any]]) -> str | dict[str, Any]:
        return handler(self) if self.options else self.name


class Strict(pydantic.BaseModel):
    """Base model that rejects unknown keys and does not convert types. It declares no options."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class ScheduleOptions(Strict):
    """Options of every learning-rate schedule; a subclass declares additional ones."""

    lr_min_ratio: float = Field(description="value of the key lr_min_ratio")


class OptimizerConfig(_SavedByName):
    """An optimizer in the package `utils.training.optimizers` and its options."""

    PREFIX = "utils.training.optimizers."
    NO_OPTIONS = Strict
    NOUN, MEMBERS = "an optimizer", ("build",)


class ScheduleConfig(_SavedByName):
    """A learning-rate schedule in the package `utils.training.lr_schedules` and its options."""

    PREFIX = "utils.training.lr_schedules."
    KIND = "function"
    NO_OPTIONS = ScheduleOptions


class LoggerConfig(_SavedByName):
    """A logger in the package `utils.monitoring.loggers` and its options."""

    PREFIX = "utils.monitoring.loggers."
    FIRST_ARGUMENTS = 3
    NOUN, MEMBERS = "a logger", ("log", "close")


class EarlyStoppingConfig(Strict):
    """The rule for ending a run that no longer improves."""

    metric: MetricName = Field(description="evaluation metric to watch, e.g. text/perplexity")
    patience: PositiveInt = Field(
        3, description="evaluations without improvement before the run ends"
    )
    min_delta: NonNegativeFloat = Field(
        0.0, description="minimum change that counts as an improvement"
    )
    mode: Literal["min", "max"] = Field("min", description="whether lower or higher is better")


class LRFindConfig(Strict):
    """The learning-rate sweep of `lr_find`."""

    low: PositiveFloat = Field(1e-6, description="learning rate of the first step")
    high: PositiveFloat = Field(1.0, description="learning rate of the last step")
    steps: Annotated[Int, Field(ge=10)] = Field(120, description="number of optimizer steps")


def _bare_flag(value: Any) -> Any:
    """Convert `lr_find=true` to the default sweep and `lr_find=false` to no sweep."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class IterationCurriculumConfig(Strict):
    """How iteration budgets grow over a run."""

    start: Annotated[Float, Field(gt=0, lt=1)] = Field(
        0.25, description="share of its budget that a row gets at the start"
    )
    until: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the run after which rows get their full budget"
    )


class PretrainConfig(Strict):
    """The whole configuration of a run, as `load_config` returns it."""

    plugins: Folders = key(
        [], "directories in which module@Class is looked up too; command line only", "any"
    )

    # Data
    data_paths: list[PathText] = key([], "corpus directories to train on", "any")
    data_paths_test: list[PathText] = key(
        [], "corpus directories to evaluate on; []: data_paths", "any"
    )
    domain_weights: dict[str, NonNegativeFloat] | None = key(
        None, "share of each domain in the mix, by name; null: as built, {}: by size", "fixed"
    )
    min_iterations: PositiveInt | None = key(
        None, "raise every lower iteration budget to this many ACT steps"
    )
    iteration_curriculum: IterationCurriculumConfig | None = key(
        None, "{start, until}: budgets grow from a share to the full; null: always full"
    )
    feed: Literal["consume", "present"] = key(
        "consume",
        "consume: freed slots take the next example; present: a new batch each step, as TRM",
        "fixed",
    )
    num_workers: CountInt = key(
        1, "threads that prefetch rows, in training and evaluation; 0: none", "any"
    )
    vocab_size: PositiveInt | None = key(
        None, "number of token ids, for a dry_run without a corpus", "any"
    )
    seq_len: PositiveInt | None = key(None, "tokens per row, for a dry_run without a corpus", "any")

    # Model
    arch: ArchConfig = Field(description="architecture and loss: a preset, and arch.<option>")
    seed: Seed = key(0, "seed of the weights, the order of examples and the exploration", "fixed")
    freeze_weights: bool = key(False, "train only the identifier embedding")

    # Length
    global_batch_size: PositiveInt = key(768, "rows (slots) over all ranks")
    micro_batch_size: PositiveInt | Literal["auto"] | None = key(
        "auto", "rows that a rank processes at once; auto: as many as memory allows", "any"
    )
    grad_accum_steps: PositiveInt = key(
        1, "micro-batches per optimizer step; 1: micro_batch_size decides", "any"
    )
    epochs: PositiveFloat | None = key(
        1.0, "passes over the corpus, may be a fraction; null: no limit"
    )
    max_steps: PositiveInt | None = key(None, "maximum number of optimizer steps")
    max_seconds: PositiveFloat | None = key(None, "maximum training time in seconds")

    # Optimizer
    optimizer: OptimizerConfig = key(
        "adam_atan2",
        "optimizer of all weights except the identifier embedding; or {name: ..., option: value}",
    )
    lr: NonNegativeFloat = key(8e-5, "peak learning rate")
    lr_schedule: ScheduleConfig = key(
        "cosine", "how lr falls after the warm-up; or {name: ..., option: value}"
    )
    lr_min_ratio: Ratio = key(0.1, "final learning rate, as a share of lr")
    lr_warmup_steps: CountInt = key(4000, "optimizer steps of linear warm-up")
    beta1: Decay = key(0.9, "decay of the gradient's mean per step")
    beta2: Decay = key(0.95, "decay of the squared gradient's mean per step")
    weight_decay: NonNegativeFloat = key(
        0.1, "decoupled weight decay, multiplied by the learning rate"
    )
    weight_decay_all: bool = key(False, "apply weight decay to norms and embeddings too")
    grad_clip_norm: PositiveFloat | None = key(1.0, "maximum gradient norm; null: no clipping")
    puzzle_emb_lr: NonNegativeFloat = key(2e-4, "learning rate of the identifier embedding")
    puzzle_emb_weight_decay: NonNegativeFloat = key(
        0.1, "weight decay of the identifier rows used in a step"
    )
    max_nonfinite: PositiveInt = key(
        10, "consecutive skipped non-finite updates before the run stops", "any"
    )
    ema: bool = key(True, "evaluate an exponential moving average of the weights")
    ema_rate: Decay = key(0.9995, "decay of that average per step")
    ema_warmup: bool = key(True, "start the average at a lower decay")

    # Evaluation
    evaluators: list[EvaluatorConfig] = key(
        ["text@PerplexityEvaluator"], "module@Class, or {name: module@Class, option: value}", "any"
    )
    eval_interval: PositiveFloat | None = key(
        None, "epochs between evaluations; null: once, at the end", "any"
    )
    min_eval_interval: NonNegativeFloat = key(0.0, "epochs before the first evaluation", "any")
    eval_batch_size: PositiveInt | None = key(
        None, "rows over all ranks; null: as in training, or fewer", "any"
    )
    eval_max_batches: PositiveInt | None = key(
        None,
        "maximum number of batches, of eval_batch_size or global_batch_size rows; null: all",
        "any",
    )
    eval_depths: list[PositiveInt] = key(
        [],
        "additional depths to report, in ACT steps or loops; may exceed the trained depth",
        "any",
    )
    eval_save_outputs: list[str] = key([], "predictions to write at each evaluation", "any")
    eval_only: bool = key(False, "evaluate a checkpoint without training", "any")
    early_stopping: EarlyStoppingConfig | None = key(
        None, "{metric, patience, min_delta, mode}; null: never", "any"
    )

    # Checkpoints
    project_name: Text = key("athena", "directory of checkpoints, and project of loggers", "any")
    run_name: Text | None = key(None, "name of the run; null: date, time and a random part", "any")
    checkpoint_path: PathText | None = key(
        None, "directory of the run; null: checkpoints/<project_name>/<run_name>", "any"
    )
    checkpoint_every_eval: bool = key(True, "save before every evaluation", "any")
    checkpoint_interval: PositiveInt | None = key(
        1000,
        "optimizer steps between checkpoints; null: only at evaluations and at the end",
        "any",
    )
    keep_checkpoints: PositiveInt | None = key(
        3, "number of recent checkpoints to keep (the best is always kept); null: all", "any"
    )
    best_metric: MetricName | None = key(
        None,
        "metric that decides the best checkpoint; null: early_stopping.metric, or the loss",
        "any",
    )
    best_mode: Literal["min", "max"] = key(
        "min", "whether a lower or a higher value of best_metric is better", "any"
    )
    checkpoint_carry: bool = key(True, "save the rows in progress, for an exact resume", "any")
    resume: Annotated[PathText, BeforeValidator(_null_is_none_word)] = key(
        "auto",
        "auto: the latest checkpoint of the run, if there is one; none; or a checkpoint",
        "any",
    )
    resume_allow: list[str] = key([], "keys that may differ when the run is resumed", "any")
    load_checkpoint: PathText | None = key(
        None, "start a new run from the weights of this checkpoint", "any"
    )
    load_weights: Literal["ema", "raw"] = key("ema", "which weights load_checkpoint reads", "any")

    # Machine
    device_type: Literal["auto", "cuda", "xla", "tpu", "mps", "cpu"] = key(
        "auto", "auto: TPU, else CUDA, else MPS, else CPU", "any"
    )
    parallel: Literal["ddp", "fsdp"] = key(
        "ddp", "how ranks share the work: replicas, or sharded weights", "any"
    )
    slow_step_factor: Annotated[Float, Field(gt=1)] = key(
        10.0, "warn when a step takes this many times the median", "any"
    )
    step_timeout: PositiveFloat | None = key(
        3600.0, "seconds without progress before the run exits, naming the rank; null: never", "any"
    )
    deterministic: bool = key(True, "on CUDA: resume bit for bit; false may be faster", "any")
    matmul_precision: Literal["highest", "high"] = key(
        "highest", "float32 products on CUDA; high: in TF32, faster and less precise", "any"
    )
    compile: bool | Literal["auto"] = key(
        "auto", "compile the model with torch.compile; auto: on CUDA, where Triton works", "any"
    )
    fast: bool | list[Literal["attention", "loss", "swiglu", "weights"]] = key(
        True,
        "fast paths of a step: true, false, or some of attention, loss, swiglu, weights",
        "any",
    )
    dry_run: bool = key(False, "build the model, print its cost and exit", "any")
    lr_find: Annotated[LRFindConfig | None, BeforeValidator(_bare_flag)] = key(
        None, "true, or {low, high, steps}: sweep the learning rate, plot it and exit", "any"
    )
    profile: bool = key(False, "trace steps 10 to 15 and list the most expensive operations", "any")

    # Logging
    logger: list[LoggerConfig] = key(
        ["jsonl"], "where metrics are written; or {name: ..., option: value}", "any"
    )
    log_interval: PositiveInt = key(10, "optimizer steps between log lines", "any")

    def rows_per_rank(self, world_size: int) -> int:
        """Return the number of rows of the global batch that each rank owns."""
        return self.global_batch_size // world_size

    def micro_rows(self, world_size: int) -> int | None:
        """Return the number of rows a rank processes at once; None: the memory estimate decides."""
        rows = self.rows_per_rank(world_size)
        if isinstance(self.micro_batch_size, int):
            return self.micro_batch_size
        if self.grad_accum_steps > 1 or self.micro_batch_size is None:
            return rows // self.grad_accum_steps
        return None
