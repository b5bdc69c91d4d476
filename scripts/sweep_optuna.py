r"""Search for settings with Optuna: each trial is a training run, and poor ones are stopped early.

    pip install -r requirements-sweep.txt
    python scripts/sweep_optuna.py trials=20 data_paths="[data/my_corpus]" \
        arch=athena_trm_small max_seconds=600 eval_interval=0.1 \
        'lr=tag(log, interval(1e-4, 1e-2))' 'arch.L_layers=range(1, 4)' optimizer=adamw,muon

Keys are those of pretrain.py, and ranges are written as in Hydra: choices `a,b`,
`range(start, stop)`, `interval(low, high)`, `tag(log, interval(low, high))`. A trial is stopped if
its evaluation is worse than the median of earlier trials at that step (Optuna's MedianPruner), so
set eval_interval. The study is stored in folder=, and the same command continues it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from pydantic import Field

from evaluators.loop import create_evaluators
from utils.checkpoint.run_config import apply_trained_config
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.config.schema import PositiveInt
from utils.config.values import assignment, readable
from utils.core.atomic import write_result
from utils.core.errors import UserError
from utils.corpus.data import open_data
from utils.monitoring.run_log import METRICS, RunMetrics

try:
    import optuna
except ImportError as error:
    print(f"error: the package {error.name} is missing: pip install -r requirements-sweep.txt",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    trials: PositiveInt = Field(20, description="total number of trials, over all calls")
    folder: Path = Field(
        Path("checkpoints/sweeps/optuna"), description="folder of the study and its runs"
    )
    config_dir: Path | None = Field(
        None, description="directory of your own presets, in addition to config/"
    )
    metric: str | None = Field(
        None,
        description="metric of the last evaluation, e.g. eval/all/accuracy; null: bits per "
        "byte, exact accuracy or loss, whichever is logged",
    )
    direction: Literal["minimize", "maximize"] = Field("minimize", description="or maximize")
    launcher: str = Field(
        sys.executable, description="launcher of pretrain.py, e.g. 'torchrun --nproc-per-node 4'"
    )
    startup_trials: int = Field(5, ge=0, description="trials that are never stopped early")
    search_seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the search; seed= is that of the runs"
    )


PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain.py"
GIVEN_BY_TRIALS = ("run_name", "checkpoint_path")


def sweeps_and_fixed(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Return the keys that trials vary, and the other arguments unchanged."""
    try:
        texts = [readable(argument, sweep=True) for argument in arguments]
        overrides = OverridesParser.create().parse_overrides(texts)
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from None
    for override in overrides:
        if override.key_or_group in GIVEN_BY_TRIALS:
            raise UserError(f"{override.key_or_group} is set for each trial: use folder=")
    overrides = list(
        {o.key_or_group: o for o in overrides}.values()
    )  # the last override of a key wins
    varied = [override for override in overrides if override.is_sweep_override()]
    if not varied:
        raise UserError(
            "no key is varied: give a range for one, such as 'lr=tag(log, interval(1e-4, 1e-2))'"
        )
    return varied, [str(o.input_line) for o in overrides if not o.is_sweep_override()]


def suggest(trial: optuna.Trial, override: Override) -> str:
    """Return `key=value` with a value suggested by the study."""
    key, sweep = override.key_or_group, override.value()
    log = "log" in getattr(sweep, "tags", ())
    value: Any
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        choose: Any = trial.suggest_float
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            choose = trial.suggest_int
        value = choose(key, sweep.start, sweep.end, log=log)
    elif isinstance(sweep, RangeSweep) and all(
        isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)
    ):
        numbers = range(sweep.start, sweep.stop, sweep.step)  # type: ignore[arg-type]
        value = trial.suggest_int(key, numbers[0], numbers[-1], step=numbers.step)
    else:
        value = trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    return f"{key}={value}"


class Search:
    """Runs trials; Optuna calls `objective`."""

    def __init__(self, args: Options, overrides: Sequence[str]):
        self.folder: Path = args.folder
        self.metric: str | None = args.metric
        self.presets: list[str] = []
        self.higher = args.direction == "maximize"
        try:
            self.command = [*shlex.split(args.launcher), str(PRETRAIN)]
        except ValueError as error:
            raise UserError(f"launcher={args.launcher}: {error}") from None
        if shutil.which(self.command[0]) is None:
            raise UserError(f"launcher={args.launcher}: command not found")
        if args.config_dir is not None:
            self.presets = ["--config-dir", str(args.config_dir)]
        self.varied, self.fixed = sweeps_and_fixed(overrides)
        self.began = False
        """Whether any trial has logged metrics."""
        self.settings = {
            "keys": [str(o.input_line) for o in self.varied] + self.fixed,
            "metric": self.metric,
            "direction": args.direction,
        }
        self._check_evaluated()

    def _check_evaluated(self) -> None:
        """Raise UserError, before training, if trials would end without an evaluation."""
        config = self._plausible()
        for name in ("lr_find", "dry_run", "eval_only"):
            if getattr(config, name):
                raise UserError(f"{name} trains nothing; remove it")
        loggers = [logger.name for logger in config.logger]
        if "jsonl" not in loggers:
            raise UserError(
                f"logger=[{','.join(loggers)}] does not write {METRICS}, which the search reads: "
                "add jsonl"
            )
        data = open_data(config)
        if data.test is None and not create_evaluators(config.evaluators, data):
            raise UserError(
                f"data_paths={','.join(config.data_paths)} has no test split, or an empty one, so "
                "trials cannot be evaluated: set data_paths_test to corpora that have one"
            )

    def _plausible(self) -> PretrainConfig:
        """Return a config that a trial may get.

        Raises UserError if eight draws give no valid config. Single invalid combinations only fail
        their own trials.
        """
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        mistake = UserError("")
        for _ in range(8):
            ask, chosen = study.ask(), []
            for override in self.varied:
                try:
                    chosen.append(suggest(ask, override))
                except (ValueError, IndexError) as error:
                    sweep = override.input_line
                    raise UserError(f"{sweep} contains no value to try: {error}") from None
            try:
                return self._config(chosen)
            except UserError as error:
                mistake = error
        raise mistake

    def _config(self, chosen: list[str]) -> PretrainConfig:
        keys = [*self.fixed, *chosen]
        return load_config(apply_trained_config(compose_config([*self.presets, *keys]), keys))

    def objective(self, trial: optuna.Trial) -> float:
        run = self.folder / f"trial_{trial.number}"
        chosen = [suggest(trial, override) for override in self.varied]
        print(f"trial {trial.number}: {' '.join(chosen)}", flush=True)
        try:
            self._config(chosen)
        except UserError as error:  # the chosen values conflict
            print(f"  failed: {error}", flush=True)
            raise RuntimeError(str(error)) from None
        place = assignment("checkpoint_path", run)
        command = [*self.command, *self.presets, *self.fixed, *chosen, place]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"trial_{trial.number}.log").open("w", encoding="utf-8") as log:
            environment = os.environ | {"PYTHONIOENCODING": "utf-8:backslashreplace"}
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            figure, evaluated = None, False
            try:
                for step, figure in self._evaluations(process, run):
                    evaluated = True
                    if figure is None:
                        continue
                    trial.report(figure, step)
                    if process.poll() is None and trial.should_prune():
                        print(f"  step {step}: {figure:.4f}, stopped early", flush=True)
                        raise optuna.TrialPruned
            finally:
                status = _stop(process)
        self.began |= (run / METRICS).is_file() and (run / METRICS).stat().st_size > 0
        if status not in (0, 3) and not self.began:  # a mistake that would occur in every trial
            raise UserError(_last_line(log.name))
        if status == 0 and not evaluated:
            raise UserError(
                f"trial {trial.number} was never evaluated, see {log.name}; check eval_interval "
                "and max_steps"
            )
        if status not in (0, 3) or figure is None:
            diverged = evaluated and figure is None
            said = "the last evaluation is not finite" if diverged else _last_line(log.name)
            said += f" (full output in {log.name})"
            print(f"  failed: {said}", flush=True)
            raise RuntimeError(said)
        print(f"  {figure:.4f}", flush=True)
        return figure

    def _evaluations(
        self, process: subprocess.Popen[bytes], run: Path
    ) -> Iterator[tuple[int, float | None]]:
        """Yield (step, figure) of each evaluation as the run logs it; figure: None if not
        finite.
        """
        done = 0
        while True:
            running = process.poll() is None
            evaluated: list[dict[str, Any]] = []
            with suppress(UserError):  # the log does not exist yet
                metrics = RunMetrics(run)
                evaluated = [r for r in metrics.records if any(k.startswith("eval/") for k in r)]
            if evaluated and self.metric is None:
                self.metric = self._headline(metrics)
            for record in evaluated[done:]:
                if self.metric not in record:
                    known = ", ".join(sorted(k for k in record if k.startswith("eval/")))
                    raise UserError(f"metric={self.metric} was not evaluated; available: {known}")
                yield record["step"], record[self.metric]
            done = len(evaluated)
            if not running:
                return
            time.sleep(0.5)

    def _headline(self, metrics: RunMetrics) -> str:
        """Return the metric to search by if none is given. Raises UserError if `direction` is wrong
        for it.
        """
        assert metrics.headline is not None
        key, better = metrics.headline.key, metrics.headline.better
        if self.higher != (better == "higher"):
            direction = "maximize" if better == "higher" else "minimize"
            raise UserError(f"for {key}, {better} is better: use direction={direction}")
        return key


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Stop a trial that is still running; return its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _last_line(log: str) -> str:
    lines = Path(log).read_text("utf-8", "replace").split("\n")
    said = [line for line in lines if line.startswith("error: ")] or [s for s in lines if s.strip()]
    return said[-1].removeprefix("error: ") if said else "the run ended without a message"


def run(arguments: Sequence[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    words = [re.sub("^--seed\\b", "--search-seed", word) for word in arguments]  # its earlier name
    args, overrides = split_key_values(Options, words)
    search = Search(args, overrides)
    with _disk_faults(args.folder):
        args.folder.mkdir(parents=True, exist_ok=True)
        study = _optimize(search, args)
    print_trials(study, args)


def _optimize(search: Search, args: Options) -> optuna.Study:
    """Run the remaining trials, and write trials.jsonl."""
    study = optuna.create_study(
        study_name=args.folder.name,
        storage=f"sqlite:///{args.folder / 'study.db'}",
        direction=args.direction,
        sampler=optuna.samplers.TPESampler(seed=args.search_seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=args.startup_trials),
        load_if_exists=True,
    )
    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=over))
    before = study.user_attrs.get("search", search.settings)
    changed = [key for key in before if before[key] != search.settings[key]]
    if changed and (done or "direction" in changed):  # otherwise there is nothing to continue
        raise UserError(
            f"{args.folder} contains a search with other {' and '.join(changed)} "
            f"({'; '.join(str(before[key]) for key in changed)}): use those, or another folder="
        )
    study.set_user_attr("search", search.settings)
    if done:
        print(f"continuing {args.folder}: {done} of {args.trials} trials are done")
    try:
        study.optimize(search.objective, n_trials=max(0, args.trials - done), catch=(RuntimeError,))
    finally:
        write_trials(study, args)
    return study


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Convert errors in writing the study or a log to a UserError; Optuna wraps those of SQLite."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault: BaseException | None = error
        while fault is not None and not isinstance(fault, OSError | sqlite3.OperationalError):
            fault = fault.__cause__
        if fault is None:
            raise
        raise UserError(
            f"folder={folder} cannot be written: {getattr(fault, 'strerror', None) or fault}; "
            "free up space, then repeat the command to continue the search"
        ) from error


def best_first(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    trials = [t for t in study.get_trials() if t.state.is_finished()]
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(trials, key=lambda t: (t.state.name != "COMPLETE", sign * (t.value or 0)))


def write_trials(study: optuna.Study, args: Options) -> None:
    lines = [
        {"trial": t.number, "state": t.state.name, "value": t.value, **t.params}
        for t in best_first(study)
    ]
    with write_result(args.folder / "trials.jsonl", f"folder={args.folder}") as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def print_trials(study: optuna.Study, args: Options) -> None:
    """Print the trials, best first."""
    trials = best_first(study)
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    if not complete:
        raise UserError(f"no trial finished; their output is in {args.folder}/trial_*.log")
    for t in trials[:10]:
        value = f"{t.value:.4f}" if t.value is not None else t.state.name.lower()
        print(f"  trial {t.number:<4} {value:<10} {_keys(t)}")
    names = " ".join(str(args.folder / f"trial_{t.number}") for t in complete[:3])
    print(f"best: {_keys(complete[0])}\ncompare: python scripts/report.py {names}")


def _keys(trial: optuna.trial.FrozenTrial) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in trial.params.items())  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the trial, too
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
