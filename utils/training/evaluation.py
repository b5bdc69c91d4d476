"""Evaluate a run's weights on the test split."""

from typing import Any

from evaluators.guard import FAILURES, Group
from evaluators.loop import evaluate
from models.inference.language_model import LanguageModel
from sequence_dataset import EvalStream
from utils.backend.memory import explain_out_of_memory
from utils.core.console import Progress
from utils.core.errors import UserError
from utils.core.iterators import call_after_each, prefetch
from utils.training.build import Run
from utils.training.messages import format_evaluation


def run_evaluation(run: Run) -> dict[str, Any]:
    """Evaluate the averaged weights; log, print and return the figures.

    Raises Interrupted if a rank received a signal.
    """
    config, state, backend = run.config, run.state, run.backend
    if run.data.test is None and not run.evaluators:
        if config.eval_only:
            raise UserError(
                f"nothing to evaluate: {', '.join(run.data.test_paths)} has no test "
                "split, or an empty one; choose another corpus with data_paths_test"
            )
        run.backend.report("the corpora have no test split, or an empty one: evaluation is skipped")
        return {}
    rows, depth = choose_rows(run), state.model.model.eval_depth(state.progress)

    def ask(group: Group) -> LanguageModel:
        def between() -> None:
            group.pause()
            run.watchdog.sign()

        return LanguageModel(
            state.model,
            run.data.train.metadata,
            run.data.train.identifiers,
            run.tokenizer,
            backend,
            rows=(config.eval_batch_size or rows) // backend.world_size,
            gather=group.gather_objects,
            between=between,
            depth=depth,
        )

    stream: EvalStream | list[Any] = []
    if run.data.test is not None:
        stream = EvalStream.from_config(
            run.data.test,
            config,
            state.model.model.max_steps,
            rows,
            rank=backend.rank,
            world_size=backend.world_size,
        )
    bar = Progress(len(stream), "evaluate, batch", "batch", shown=backend.is_main)
    advice = f"in an evaluation of {rows} rows at once; lower eval_batch_size (now {rows})"
    with explain_out_of_memory(advice), bar, state.use_averages():
        results = evaluate(
            state.model,
            call_after_each(prefetch(stream, config.num_workers), bar.update, run.watchdog.sign),
            run.evaluators,
            backend,
            received=run.received,
            save_outputs=config.eval_save_outputs,
            save_path=run.folder / f"evaluation_step_{state.step}",
            ask=ask,
            depth=depth,
            depths=config.eval_depths,
        )
    state.failed_evaluations += FAILURES in results
    results = {f"eval/{name}": value for name, value in results.items()}
    run.loggers.log(results, state.step)
    run.backend.report(format_evaluation(results, state.step))
    return results


def choose_rows(run: Run) -> int:
    """Return the number of rows of a batch over all ranks: as configured, or as in training."""
    config, backend, test = run.config, run.backend, run.data.test
    ranks = backend.world_size
    rows = config.eval_batch_size or ranks * run.rows_at_once
    if not backend.compiles(config.compile) and test is not None:
        rows = min(rows, ranks * -(-test.num_rows // ranks))  # more rows would only be padding
    return rows  # compiling another shape than in training takes long
