r"""Run EleutherAI's lm-evaluation-harness on Athena's models, with the harness' own command line.

    pip install -r requirements-eval.txt
    python scripts/lm_eval_athena.py --model athena \
        --model_args checkpoint=checkpoints/athena/mine --tasks lambada_openai --batch_size 16

All arguments are lm_eval's. --model_args takes checkpoint (a checkpoint, or a run's folder for its
newest one), weights (ema | raw), steps (ACT steps per token), post_refinement_steps, identifier,
max_gen_toks (tokens of a continuation, unless the task sets it), and plugins (directories of the
model's own classes, separated by colons). Probabilities are those of the model's own loss. The
context of a text without one is a line break, because in training no label follows an
end-of-document token. With --use_cache FILE an interrupted evaluation resumes.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from models.inference.sampling import Sampling
from utils.backend import BACKENDS, Backend, select_backend
from utils.config.key_values import CommandKeys, validate
from utils.config.schema import CountInt, PositiveInt, Text
from utils.core.console import run_cli
from utils.core.errors import UserError
from utils.core.plugins import use_plugins

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    print(f"error: the package {error.name} is missing: pip install -r requirements-eval.txt",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)


class ModelArguments(CommandKeys):
    """The options in --model_args."""

    checkpoint: Text
    weights: Literal["ema", "raw"] = "ema"
    steps: PositiveInt | None = None
    post_refinement_steps: CountInt | None = None
    identifier: Text | None = None
    max_gen_toks: PositiveInt = 256
    plugins: str | list[str] = ""


_ROUND = 32  # batches between two entries in the harness' cache


T = TypeVar("T")


@register_model("athena")
class AthenaLM(LM):
    """A language model with the harness' interface."""

    def __init__(
        self,
        batch_size: int | str = 16,
        device: str | None = None,
        max_batch_size: int | None = None,
        **arguments: Any,
    ):
        super().__init__()
        try:
            given = validate(ModelArguments, arguments)
        except UserError as error:
            raise UserError(f"--model_args: {error}") from None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("the harness uses one process: start it without torchrun")
        backend = _backend(device or "auto")
        rows = _rows(batch_size)
        self.max_gen_toks, self.round = given.max_gen_toks, _ROUND * rows
        folders = given.plugins
        folders = folders.split(os.pathsep) if isinstance(folders, str) else folders
        use_plugins([folder for folder in folders if folder])
        self.model: LanguageModel = load_language_model(
            given.checkpoint,
            given.weights,
            steps=given.steps,
            refinement=given.post_refinement_steps,
            backend=backend,
            identifier=given.identifier,
            rows=rows,
        )
        assert self.model.checkpoint is not None
        self.opened = self.model.checkpoint

    @property
    def tokenizer_name(self) -> str:
        return f"{self.opened.folder}/tokenizer.json"

    def get_model_info(self) -> dict[str, Any]:
        """Return the information about the model for the results file."""
        model = self.model.model
        state = self.opened.json("state.json")
        return {
            "checkpoint": str(self.opened.folder),
            "checkpoint_step": state["counters"]["step"],
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": self.model.config.forward_dtype,
            "act_steps": self.model.steps,
            "window": self.model.window,
        }

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise UserError("Athena's models have no chat template: remove --apply_chat_template")

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, whether it is the most likely one)."""
        found: list[tuple[float, bool]] = []
        for texts in _rounds([request.args for request in requests], self.round):
            for pair, score in zip(
                texts, self.model.score([self._pair(*pair) for pair in texts]), strict=True
            ):
                found.append((-score.nats, score.greedy))
                self.cache_hook.add_partial("loglikelihood", pair, found[-1])
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Move white space at a context's end to the continuation, as the harness does."""
        kept = context.rstrip() or context
        return self.model.encode_pair(kept, context[len(kept) :] + continuation)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in the harness' own windows: consecutive,
        each with one token of context.
        """
        parts: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.model.encode(request.args[0]),
                prefix_token=self.model.opening()[-1],
                max_seq_len=self.model.window,
                context_len=1,
            )
            for window in windows:
                parts.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self.model.score(parts), strict=True):
            totals[number] -= score.nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each request's text, up to its stop strings."""
        found = [""] * len(requests)
        for options, numbers in _alike(requests):
            stop, how = _sampling(options, self.max_gen_toks)
            for some in _rounds(numbers, self.round):
                asked = [requests[i].args[0] for i in some]
                prompts = [self.model.encode(text) or self.model.opening() for text in asked]
                for i, written in zip(some, self.model.write_all(prompts, how, stop), strict=True):
                    found[i] = written.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, written.text)
        return found


def _alike(requests: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield options, and the indices of the requests with these options."""

    def options(number: int) -> str:
        return repr(sorted(requests[number].args[1].items()))

    for _, group in groupby(sorted(range(len(requests)), key=options), key=options):
        numbers = list(group)
        yield requests[numbers[0]].args[1], numbers


def _rounds(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _backend(device: str) -> Backend:
    """Return the backend for the harness' --device: cuda, cuda:1, cpu, mps, xla."""
    kind, _, number = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        # the harness passes cuda:0 by default
        print(f"note: no CUDA device for {device}; using another device", file=sys.stderr)
        kind = "auto"
    elif kind == "cuda" and number:
        if not number.isdigit() or int(number) >= torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise UserError(f"--device {device}: choose one of cuda:0 .. cuda:{there - 1}")
        torch.cuda.set_device(int(number))
    if kind not in ("auto", *BACKENDS):
        raise UserError(f"--device {device} is unknown; choose one of {', '.join(BACKENDS)}")
    return select_backend(kind)[0]


def _rows(batch_size: int | str) -> int:
    """Return the rows for the harness' --batch_size, a number or auto."""
    if str(batch_size).partition(":")[0] == "auto":
        return 16
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"--batch_size {batch_size}: give a whole number from 1, or auto")
    return int(batch_size)


def _sampling(options: dict[str, Any], most_tokens: int) -> tuple[list[str], Sampling]:
    """Convert the harness' options to stop strings and sampling options. Raises UserError for
    unknown or invalid ones.
    """
    try:
        kwargs = dict(normalize_gen_kwargs(options, most_tokens))
        stop = kwargs.pop("until")
        if not all(isinstance(text, str) for text in stop):
            raise UserError(f"until={stop!r} must be strings")
        if kwargs.pop("num_beams", 1) != 1:
            raise UserError("num_beams must be 1: beam search is not supported")
        temperature = kwargs.get("temperature", 1.0) if kwargs.pop("do_sample", False) else 0.0
        kwargs |= {"temperature": temperature, "max_new_tokens": kwargs.pop("max_gen_toks")}
        return [text for text in stop if text], validate(Sampling, kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"generation_kwargs: {error}") from None


if __name__ == "__main__":
    run_cli(cli_evaluate)
