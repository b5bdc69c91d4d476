r"""EleutherAI's lm-evaluation-harness with Athena's models: its own command, which knows them too.

    pip install -r requirements-eval.txt
    python scripts/lm_eval_athena.py --model athena \
        --model_args checkpoint=checkpoints/athena/mine --tasks lambada_openai --batch_size 16

All arguments are lm_eval's. --model_args takes checkpoint (a checkpoint, or a run's folder: its
newest), weights (ema | raw), steps (ACT steps per token), post_refinement_steps, identifier, and
max_gen_toks (tokens of a continuation where the task does not say). Probabilities are those of the
model's own loss. Before a text that has nothing before it stands a line break, because no label in
training follows an end-of-document token.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.common import UserError, run_cli
from models.language_model import LanguageModel
from models.loading import load_language_model
from utils.backend import select_backend
from utils.functions import nearest
from utils.sampling import Sampling

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

KEYS = ("checkpoint", "weights", "steps", "post_refinement_steps", "identifier", "max_gen_toks")
PASSED_ON = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


@register_model("athena")
class AthenaLM(LM):
    """A language model as the harness asks it; requests and results are its own."""

    def __init__(
        self,
        checkpoint: str | None = None,
        weights: str = "ema",
        steps: int | None = None,
        post_refinement_steps: int | None = None,
        identifier: str | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 16,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        for key in unknown:
            near = nearest(key, list(KEYS))
            advice = f"did you mean '{near}'?" if near else f"there are {', '.join(KEYS)}"
            raise UserError(f"--model_args: unknown key '{key}': {advice}")
        if checkpoint is None:
            raise UserError("--model_args needs checkpoint=<a checkpoint, or a run's folder>")
        if weights not in ("ema", "raw"):
            raise UserError(f"--model_args: weights={weights}: choose ema or raw")
        kind = (device or "auto").partition(":")[0]
        if kind == "cuda" and not torch.cuda.is_available():
            kind = "auto"  # the harness says cuda:0 where its user says nothing
        backend, _ = select_backend(kind)
        rows = int(batch_size) if str(batch_size).isdigit() else 16  # auto
        self.max_gen_toks, self.checkpoint = int(max_gen_toks), checkpoint
        self.model: LanguageModel = load_language_model(
            checkpoint,
            weights,
            steps=steps,
            refinement=post_refinement_steps,
            backend=backend,
            identifier=identifier,
            rows=rows,
        )

    @property
    def tokenizer_name(self) -> str:
        return f"{self.checkpoint}/tokenizer.json"

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model."""
        model = self.model.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": self.model.config.forward_dtype,
            "act_steps": self.model.steps,
            "window": self.model.window,
        }

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise UserError("Athena's models have no chat template: leave --apply_chat_template out")

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the likeliest) of each request."""
        texts = [request.args for request in requests]
        scores = self.model.score([self.model.encode_pair(*pair) for pair in texts])
        found = [(-score.nats, score.greedy) for score in scores]
        for pair, result in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in the windows that the harness prescribes: one
        after the other, each with a token before it."""
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
        """A continuation of each request's text, which ends before its stop strings."""
        found = [""] * len(requests)
        for options, numbers in _alike(requests):
            kwargs = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            stop = [text for text in kwargs.pop("until") if text]
            how = _sampling(kwargs)
            prompts = [
                self.model.encode(requests[i].args[0]) or self.model.opening() for i in numbers
            ]
            for i, written in zip(numbers, self.model.write_all(prompts, how, stop), strict=True):
                found[i] = written.text
                self.cache_hook.add_partial("generate_until", requests[i].args, written.text)
        return found


def _alike(requests: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Numbers of the requests that share their options."""

    def options(number: int) -> str:
        return repr(sorted(requests[number].args[1].items()))

    for _, group in groupby(sorted(range(len(requests)), key=options), key=options):
        numbers = list(group)
        yield requests[numbers[0]].args[1], numbers


def _sampling(kwargs: dict[str, Any]) -> Sampling:
    """The harness' options of a continuation as ours; UserError for what is not known here."""
    sample = kwargs.pop("do_sample", False)
    chosen = {key: kwargs.pop(key) for key in PASSED_ON if key in kwargs}
    new = kwargs.pop("max_gen_toks")
    if kwargs:
        raise UserError(
            f"generation_kwargs: {', '.join(sorted(kwargs))} is unknown here; there are until, "
            f"max_gen_toks, do_sample, {', '.join(PASSED_ON)}"
        )
    if not sample:
        chosen["temperature"] = 0.0
    return Sampling(max_new_tokens=new, **{"temperature": 1.0} | chosen)


def main(argv: Sequence[str] | None = None, evaluate: Callable[[], None] = cli_evaluate) -> None:
    """The command; see the top of this file."""
    if argv is not None:
        sys.argv[1:] = argv
    run_cli(evaluate)


if __name__ == "__main__":
    main()
