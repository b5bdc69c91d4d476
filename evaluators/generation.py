"""Score generated texts against references, or with a user-defined function."""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from pydantic import Field

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata
from evaluators.examples import pick_evenly, read_json_lines
from evaluators.interface import Batch, Examiner
from models.inference.generation import Written
from models.inference.language_model import LanguageModel
from models.inference.sampling import Sampling
from utils.config.schema import PositiveInt
from utils.core.atomic import write_atomically
from utils.core.console import notify
from utils.core.errors import UserError

ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]


class GenerationEvaluator(Examiner):
    """Continue prompts and compare the texts with references, over all ranks, below <prefix>/:

    bleu, chrf              of the whole corpus of texts, by sacrebleu, 0 to 100
    rouge1, rouge2, rougeL  mean F-measure, by rouge-score, 0 to 1
    exact_match             share of texts equal to the reference after stripping; if
                            `answer_pattern` is given, only what it matches is compared
    ended                   share of texts that the model ended before the token limit
    <function>              mean of `score_function(prompts, texts, references) -> numbers`
    examples                number of examples

    Prompts and references come from a file, or from the rows of a prompt/response corpus, where
    only the response has labels. The texts are written to samples.jsonl in the run's evaluation
    folder.
    """

    class Config(Sampling):
        """Options: the sampling settings and the source of the prompts."""

        temperature: float = Field(0.0, ge=0, description="0: always the most likely token")
        path: str | None = Field(
            None, description="JSON lines: prompt, optional response; null: the test split"
        )
        limit: PositiveInt = Field(200, description="maximum number of examples, spread evenly")
        stop: list[str] = Field([], description="strings that end a continuation")
        answer_pattern: str | None = Field(
            None, description=r"regular expression of the answer in a text, e.g. '#### (\S+)'"
        )
        score_function: str | None = Field(
            None, description="package.module:function, on sys.path or in the working directory"
        )
        identifier: str | None = Field(None, description="identifier embedding, by name")
        prefix: str = "generation"

    def __init__(self, data_path: str, eval_metadata: DatasetMetadata, **options: Any):
        self.config = config = self.Config(**options)
        self.prefix = config.prefix
        self.reads_rows = config.path is None
        self.eos_id = eval_metadata.eos_id
        self.pattern = None
        if config.answer_pattern is not None:
            try:
                self.pattern = re.compile(config.answer_pattern)
            except re.error as error:
                raise UserError(
                    f"answer_pattern={config.answer_pattern!r} is not a regular expression: {error}"
                ) from None
        self.score = None if config.score_function is None else load_function(config.score_function)
        self.lines = [] if config.path is None else read_json_lines(config.path)
        self.references = self.reads_rows or all("response" in record for _, record in self.lines)
        for where, record in self.lines:
            if not isinstance(record.get("prompt"), str) or not record["prompt"]:
                raise UserError(f"{where}: the value of 'prompt' is missing or not a string")
            if self.references and not isinstance(record["response"], str):
                raise UserError(f"{where}: the value of 'response' is missing or not a string")
        if not self.references and self.score is None:
            notify(
                f"note: {config.path} has no responses: texts are written, but nothing is scored"
            )
        if self.references:
            load_metrics()
        self.begin_eval()

    def begin_eval(self) -> None:
        super().begin_eval()
        self.rows: list[tuple[list[int], list[int]]] = []
        self.samples: list[dict[str, str]] = []

    def update_batch(self, batch: Batch, preds: Batch) -> None:
        """Collect the prompt and response of each row of inputs and labels, (B, S) each."""
        if not self.reads_rows:
            return
        inputs, labels = (batch[name].cpu().numpy() for name in ("inputs", "labels"))
        for tokens, targets in zip(inputs, labels, strict=True):
            scored = np.flatnonzero(targets != IGNORE_LABEL_ID)
            if len(scored):
                prompt = tokens[: scored[0] + 1].tolist()
                self.rows.append((prompt, targets[scored].tolist()))

    def examine(self, model: LanguageModel, group: Any) -> None:
        """Generate a text for each prompt, and score the texts."""
        config, examples = self.config, self._examples(model, group)
        if not examples:
            return
        ids, references = zip(*examples, strict=True)
        how = Sampling(**{name: getattr(config, name) for name in Sampling.model_fields})
        written = model.write_all(ids, how, config.stop, config.identifier)
        prompts = list(map(model.decode, ids))
        self.figures = self._scores(prompts, written, list(references))
        self.samples = [
            {"evaluator": config.prefix, "prompt": prompt, "text": text.text}
            | ({"reference": reference} if self.references else {})
            for prompt, text, reference in zip(prompts, written, references, strict=True)
        ]

    def _examples(self, model: LanguageModel, group: Any) -> list[tuple[list[int], str]]:
        """Return the prompts' token ids and the references; a missing reference is ""."""
        if self.reads_rows:
            # sorted, so that the order does not depend on which rank read them
            rows = sorted(row for part in group.gather_objects(self.rows) for row in part)
            found = [
                (prompt, model.decode([i for i in response if i != self.eos_id]))
                for prompt, response in rows
            ]
        else:
            found = [
                (model.encode_pair(record["prompt"], "")[0], record.get("response", ""))
                for _, record in self.lines
            ]
        return [found[i] for i in pick_evenly(len(found), self.config.limit)]

    def _scores(
        self, prompts: Sequence[str], written: Sequence[Written], references: Sequence[str]
    ) -> dict[str, float]:
        texts = [one.text for one in written]
        figures: dict[str, float] = {"examples": len(texts)}
        figures["ended"] = float(np.mean([one.ended for one in written]))
        if self.references:
            figures |= compare(texts, references)
            pairs = zip(map(self._answer, texts), map(self._answer, references), strict=True)
            same = [own == right and right is not None for own, right in pairs]
            figures["exact_match"] = float(np.mean(same))
        if self.score is not None:
            name = str(self.config.score_function).rpartition(":")[2]
            values = np.asarray(self.score(prompts, texts, references), dtype=float)
            if values.shape != (len(texts),):
                raise UserError(
                    f"score_function={self.config.score_function} returned numbers of shape "
                    f"{values.shape} for {len(texts)} texts; it must return one number per text"
                )
            figures[name] = float(values.mean())
        return figures

    def _answer(self, text: str) -> str | None:
        """Return the last match of `answer_pattern`, which the exact match compares."""
        if self.pattern is None:
            return text.strip()
        found = list(self.pattern.finditer(text))
        return found[-1].group(min(1, self.pattern.groups)) if found else None

    def result(
        self, save_path: str | None, rank: int, world_size: int, group: Any = None
    ) -> dict[str, float] | None:
        """Write the texts; return the figures on rank 0, None elsewhere."""
        if rank == 0 and save_path is not None and self.samples:
            path = Path(save_path) / "samples.jsonl"
            try:
                before = path.read_bytes() if path.is_file() else b""  # of another evaluator
                with write_atomically(path) as part:
                    lines = [orjson.dumps(line) + b"\n" for line in self.samples]
                    part.write_bytes(before + b"".join(lines))
            except OSError as error:
                notify(f"warning: {path}: {error.strerror or error}")
        return super().result(save_path, rank, world_size, group)


def load_metrics() -> tuple[Any, Any]:
    """Return sacrebleu and rouge_score's scorer; raise UserError if they are not installed."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(
            f"generation@GenerationEvaluator needs the package {error.name}: "
            "pip install -r requirements-eval.txt"
        ) from None
    return sacrebleu, rouge_scorer


def compare(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return BLEU (Papineni et al. 2002), chrF (Popović 2015), and mean ROUGE (Lin 2004)."""
    sacrebleu, rouge_scorer = load_metrics()
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds)
    scores = [scorer.score(right, own) for own, right in zip(texts, references, strict=True)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(texts), [list(references)]).score,
        **{kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds},
    }


def load_function(name: str) -> ScoreFunction:
    """Import `package.module:function`. Raises UserError if that fails."""
    module_name, sign, function_name = name.partition(":")
    if not sign or not function_name:
        raise UserError(f"score_function={name}: write it as package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise UserError(f"score_function={name} cannot be imported: {error}") from None
    if not callable(found):
        raise UserError(f"score_function={name}: {module_name} has no function {function_name}")
    return found
