r"""Score multiple-choice tasks by the probability that the model assigns to each choice.

    evaluators=[{name: tasks@MultipleChoiceEvaluator, path: arc.jsonl, delimiter: "\nAnswer: "}]

The keys in the file determine the kind of task:

    question (or query), choices, answer (or gold)   which choice is most likely after the question
    context_options, continuation, answer            which context best predicts the continuation
    sentence_good, sentence_bad                      whether the good one is more likely (BLiMP)
    context, continuation                            whether each token is the top one (LAMBADA)
    text                                             the same for its last word
"""

import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from dataset.common import DatasetMetadata
from evaluators.examples import pick_evenly, read_json_lines
from evaluators.interface import Examiner
from models.inference.language_model import LanguageModel
from utils.config.schema import PositiveInt
from utils.core.errors import UserError

QUESTION = ("question", "query")
ANSWER = ("answer", "gold", "label", "answerKey")


class Item(NamedTuple):
    """One example: (context, continuation) of each choice, and the index of the right one.

    lengths: characters of each choice, without the delimiter.
    answer: None if there is one pair, which is right if each token of its continuation is the most
    likely one.
    """

    pairs: list[tuple[str, str]]
    lengths: list[int]
    answer: int | None
    group: str

    def solved(self) -> str:
        """Return the text with its right answer, for use as a solved example."""
        context, continuation = self.pairs[self.answer or 0]
        return context + continuation


class MultipleChoiceEvaluator(Examiner):
    """Figures of one file, over all ranks, below <prefix>/<task>/:

    accuracy            share of examples whose right choice has the largest log-probability
    accuracy_norm       the same with the log-probability per character of the choice, which is
                        `acc_norm` of lm-evaluation-harness
    stderr, stderr_norm their standard errors, sqrt(p(1 - p)/(n - 1))
    chance              accuracy of guessing
    perplexity          for tasks without choices: mean per continuation
    examples            number of examples; with `group_key`, also <group>/accuracy of each group

    If several choices are equally likely, the first counts as chosen.
    """

    class Config(BaseModel, extra="forbid"):
        path: str = Field(description="JSON lines, plain or compressed, local or remote")
        task: str | None = Field(
            None, description="name in the figures; null: the name of the file"
        )
        delimiter: str = Field(
            " ", description="text between question and answer; spaces are not doubled"
        )
        num_few_shot: int = Field(0, ge=0, description="solved examples before each question")
        few_shot_path: str | None = Field(
            None, description="file of solved examples; null: the others in `path`"
        )
        limit: PositiveInt | None = Field(
            None, description="maximum number of examples, spread evenly"
        )
        group_key: str | None = Field(None, description="key to group figures by, e.g. UID")
        identifier: str | None = Field(None, description="identifier embedding, by name")
        seed: int = Field(0, ge=0, description="seed for drawing solved examples")
        prefix: str = "tasks"

    reads_rows = False

    def __init__(self, data_path: str, eval_metadata: DatasetMetadata, **options: Any):
        self.config = config = self.Config(**options)
        name = config.task or Path(config.path).name.split(".")[0]
        self.prefix = f"{config.prefix}/{name}"
        records = read_json_lines(config.path)
        self.items = [read_item(where, record, config) for where, record in records]
        shots = self.items
        if config.few_shot_path is not None:
            found = read_json_lines(config.few_shot_path, "few_shot_path")
            shots = [read_item(where, record, config) for where, record in found]
        own = config.few_shot_path is None
        if config.num_few_shot > len(shots) - own:
            raise UserError(
                f"num_few_shot={config.num_few_shot}, but only {len(shots) - own} examples are "
                f"in {config.few_shot_path or config.path} available"
            )
        if config.num_few_shot and any(not context for context, _ in self.items[0].pairs):
            raise UserError(
                f"num_few_shot={config.num_few_shot} does not apply to {config.path}, whose texts "
                "have no question before them; remove it"
            )
        chosen = pick_evenly(len(self.items), config.limit)
        self.shots = [self._solved_before(i, shots, own) for i in chosen]
        self.items = [self.items[i] for i in chosen]
        self.begin_eval()

    def _solved_before(self, number: int, shots: Sequence[Item], own: bool) -> str:
        """Draw the solved examples that precede an item."""
        if not self.config.num_few_shot:
            return ""
        rng = np.random.default_rng((self.config.seed, number))
        others = np.delete(np.arange(len(shots)), [number] if own else [])
        drawn = rng.choice(others, self.config.num_few_shot, replace=False)
        return "".join(shots[i].solved() + "\n\n" for i in drawn)

    def examine(self, model: LanguageModel, group: Any) -> None:
        """Score every choice of every item."""
        requests = [
            model.encode_pair(shots + context, continuation)
            for shots, item in zip(self.shots, self.items, strict=True)
            for context, continuation in item.pairs
        ]
        scores = iter(model.score(requests, self.config.identifier))
        nats, greedy = [], []
        for item in self.items:
            found = [next(scores) for _ in item.pairs]
            nats.append(np.array([score.nats for score in found]))
            greedy.append(found[0].greedy)
        groups = sorted({item.group for item in self.items}) if self.config.group_key else []
        everything = np.arange(len(self.items))
        self.figures = self._figures(everything, nats, greedy)
        for name in groups:
            own = np.array([i for i in everything if self.items[i].group == name])
            self.figures |= {
                f"{name}/{key}": value
                for key, value in self._figures(own, nats, greedy).items()
                if key in ("accuracy", "accuracy_norm", "perplexity")
            }

    def _figures(
        self, chosen: np.ndarray, nats: list[np.ndarray], greedy: list[bool]
    ) -> dict[str, float]:
        items = [self.items[i] for i in chosen]
        if items[0].answer is None:
            right = np.array([greedy[i] for i in chosen])
            mean = float(np.mean([nats[i][0] for i in chosen]))
            return _accuracy("", right) | {
                "perplexity": math.exp(min(mean, 700.0)), "examples": len(items),
            }  # fmt: skip
        summed, by_length = [], []
        for i, item in zip(chosen, items, strict=True):
            summed.append(nats[i].argmin() == item.answer)
            by_length.append((nats[i] / item.lengths).argmin() == item.answer)
        return {
            **_accuracy("", np.array(summed)),
            **_accuracy("_norm", np.array(by_length)),
            "chance": float(np.mean([1 / len(item.pairs) for item in items])),
            "examples": len(items),
        }


def _accuracy(suffix: str, right: np.ndarray) -> dict[str, float]:
    p, n = float(right.mean()), len(right)
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
    return {f"accuracy{suffix}": p, f"stderr{suffix}": error}


# --- reading ---------------------------------------------------------------------------------


def read_item(where: str, record: dict[str, Any], config: MultipleChoiceEvaluator.Config) -> Item:
    """Parse one example of a file. Raises UserError if it is invalid."""
    try:
        pairs, choices, answer = _pairs(record, config.delimiter)
        if not all(choice.strip() for choice in choices):
            raise UserError("a choice or continuation is empty")
        group = "" if config.group_key is None else str(_value(record, config.group_key))
        group = group.replace("/", "_")  # it becomes part of a metric's name
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Item(pairs, [len(choice) for choice in choices], answer, group)


def _pairs(
    record: dict[str, Any], delimiter: str
) -> tuple[list[tuple[str, str]], list[str], int | None]:
    """Return an example's (context, continuation) pairs, the choice in each, and the index of the
    right pair.
    """
    if "sentence_good" in record and "sentence_bad" in record:
        good, bad = (_text(record, key) for key in ("sentence_good", "sentence_bad"))
        return [("", good), ("", bad)], [good, bad], 0
    if "context_options" in record:
        contexts = _texts(record, "context_options")
        continuation = _text(record, "continuation")
        pairs = [_joined(context, delimiter, continuation) for context in contexts]
        return pairs, [continuation] * len(pairs), _answer(record, contexts)
    if "choices" in record:
        choices = _texts(record, "choices")
        question = _text(record, next((key for key in QUESTION if key in record), QUESTION[0]))
        pairs = [_joined(question, delimiter, choice) for choice in choices]
        return pairs, choices, _answer(record, choices)
    if "context" in record and "continuation" in record:
        context, continuation = (_text(record, key) for key in ("context", "continuation"))
        return [_joined(context, delimiter, continuation)], [continuation], None
    if "text" in record:
        text = _text(record, "text").rstrip()
        begin = len(text) - len((text.split() or [""])[-1])
        begin -= text[:begin].endswith(" ")  # a space belongs to the word's token
        return [(text[:begin], text[begin:])], [text[begin:]], None
    raise UserError(
        f"no task format has the keys {', '.join(sorted(record)[:10]) or 'of an empty object'}; "
        "known formats: question, choices, answer; context_options, continuation, answer; "
        "sentence_good, sentence_bad; context, continuation; and text"
    )


def _joined(context: str, delimiter: str, continuation: str) -> tuple[str, str]:
    """Join two texts with the delimiter, without doubling spaces."""
    if continuation[:1].isspace() or (delimiter.isspace() and context[-1:].isspace()):
        delimiter = delimiter.rstrip(" \t")
    return context, delimiter + continuation


def _value(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise UserError(f"no key {key!r} (keys there: {', '.join(sorted(record)[:10])})")
    return record[key]


def _text(record: dict[str, Any], key: str) -> str:
    value = _value(record, key)
    if not isinstance(value, str):
        raise UserError(f"key {key!r} holds {value!r}, which is not a string")
    return value


def _texts(record: dict[str, Any], key: str) -> list[str]:
    value = _value(record, key)
    if isinstance(value, dict) and "text" in value:  # {"text": [...], "label": ["A", ...]}
        value = value["text"]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise UserError(f"key {key!r} holds {value!r}, which is not a list of two or more texts")
    return value


def _answer(record: dict[str, Any], choices: Sequence[str]) -> int:
    """Return the index of the right choice, given as an index, a label, a letter, or its text."""
    key = next((key for key in ANSWER if key in record), ANSWER[0])
    value = _value(record, key)
    labels = record["choices"].get("label") if isinstance(record.get("choices"), dict) else None
    if isinstance(value, str):
        for names in (labels, choices, string.ascii_uppercase[: len(choices)]):
            if names is not None and value in list(names):
                return list(names).index(value)
        value = int(value) if value.isdigit() else value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise UserError(
        f"key {key!r} holds {value!r}; give the right choice by its index (0 to "
        f"{len(choices) - 1}), its letter, its label or its text"
    )
