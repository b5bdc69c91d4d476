"""A trained model with its tokenizer, to score and continue texts.

Scripts, evaluators and lm-evaluation-harness use this interface.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata
from dataset.tokens.tokenization import TextTokenizer
from models import cost
from models.base import Architecture
from models.inference.generation import Decoder, Written, batches_of, write
from models.inference.key_value_cache import cache_bytes
from models.inference.sampling import Sampling
from models.losses import ACTLossHead
from utils.backend import Backend
from utils.backend.cpu import CPUBackend
from utils.backend.memory import explain_out_of_memory
from utils.checkpoint.format import Checkpoint
from utils.core.console import Progress
from utils.core.errors import UserError
from utils.core.functions import suggest


class Score(NamedTuple):
    """The score of a continuation.

    nats: negative sum of its log-probabilities. greedy: whether each token was the most likely one.
    """

    nats: float
    greedy: bool


class LanguageModel:
    """A model in its loss head, in evaluation mode, with its tokenizer and identifiers.

    `score`, `write_all` and `predict` are collectives: every rank passes the same requests,
    computes a share of the batches, and gets all results. `identifier` names a row of the
    identifier embedding; None: the only one, else the blank one.

    steps: ACT steps of every token. window: the maximum number of tokens that the model sees.
    """

    def __init__(
        self,
        head: ACTLossHead,
        metadata: DatasetMetadata,
        identifiers: Sequence[str],
        tokenizer: TextTokenizer | None,
        backend: Backend | None = None,
        *,
        rows: int = 16,
        identifier: str | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
        between: Callable[[], None] = lambda: None,
        checkpoint: Checkpoint | None = None,
        depth: int | None = None,
    ):
        """Wrap `head`.

        rows: texts of a whole window per batch. identifier: see `identifier_index`. gather:
        exchanges results between ranks; None: the backend's. between: called by all ranks before
        each round of batches. checkpoint: where the model was loaded from. depth: ACT steps or
        loops of every token; None: those of an evaluation at the end of training.
        """
        self.head, self.metadata, self.identifiers = head, metadata, list(identifiers)
        self._tokenizer, self.backend = tokenizer, backend or CPUBackend()
        self.rows, self.between, self.checkpoint = rows, between, checkpoint
        self.gather = gather or self.backend.gather_objects
        self.model: Any = head.model
        self.config: Any = head.model.config
        self.steps: int = self.model.eval_depth() if depth is None else depth
        self.window: int = self.config.seq_len
        self.identifier = identifier_index(self, identifier)

    @property
    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer. Raises UserError if the model cannot score or continue a text."""
        if self._tokenizer is None:
            raise UserError("the corpus has no tokenizer.json: its model was not trained on text")
        if not self.config.causal:
            raise UserError(
                "the model is not causal: it was trained to see the tokens after the one that it "
                "predicts, and can neither score nor continue a text"
            )
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos_id(self) -> int | None:
        return self.metadata.eos_id

    def flops_per_token(self, steps: int) -> float:
        """Return the FLOPs per token of `steps` ACT steps and the output head after the last."""
        return cost.evaluation_flops(self._untrained, steps)

    @cached_property
    def _untrained(self) -> Architecture:
        """A model with the same architecture on the meta device, for tracing."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return type(self.model)(self.config.model_dump())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.tokenizer.encode([text])[0].tolist() if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)

    def opening(self) -> list[int]:
        """Return the context used for a text without one: a line break.

        An eos would not work, because training never predicts the token after it.
        """
        return self.encode("\n") or [self.metadata.eos_id or 0]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context, never empty, and of its continuation.

        Both are tokenized together, and spaces at the end of the context are moved to the
        continuation, so that words get the tokens that they have in running text.
        """
        stripped = context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        before = self.encode(stripped)
        both = self.encode(stripped + continuation)
        after = both[len(before) :] if both[: len(before)] == before else self.encode(continuation)
        return before or self.opening(), after

    # --- scoring ------------------------------------------------------------------

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        identifier: str | None = None,
    ) -> list[Score]:
        """Score the continuation of each (context, continuation), ids of at least one token each.

        A context longer than the window is truncated on the left; a continuation longer than the
        window is scored in parts.
        """
        named = self._index(identifier)
        parts = [(n, *part) for n, pair in enumerate(pairs) for part in self._in_windows(*pair)]
        lengths = [
            self.window if self._one_shape else len(context) + len(after)
            for _, context, after in parts
        ]
        nats, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)

        def compute(batch: list[int]) -> list[tuple[float, bool]]:
            return self._score_batch([parts[i][1:] for i in batch], named)

        for i, (cost_of_part, all_best) in self._shared(lengths, compute):
            nats[parts[i][0]] += cost_of_part
            greedy[parts[i][0]] &= all_best
        return [Score(float(n), bool(g)) for n, g in zip(nats, greedy, strict=True)]

    def _in_windows(
        self, context: Sequence[int], after: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Split a pair into parts of at most one window that together score each token of `after`
        once; later parts have half a window of context.
        """
        if not context or not after:
            raise ValueError("a context and a continuation of at least one token each are needed")
        ids, begin = [*context, *after], len(context)
        while begin < len(ids):
            end = min(len(ids), begin + max(1, self.window // 2))
            if len(ids) - begin <= self.window:  # the rest fits, with one token before it
                end = len(ids)
            first = max(0, end - 1 - self.window)
            yield ids[first:begin], ids[begin:end]
            begin = end

    @torch.no_grad()
    def _score_batch(
        self, pairs: list[tuple[list[int], list[int]]], identifier: int
    ) -> list[tuple[float, bool]]:
        """Return (nats, greedy) of each pair; the last input token precedes the last scored one."""
        length = max(len(context) + len(after) - 1 for context, after in pairs)
        shape = (self.rows, self.window) if self._one_shape else (len(pairs), length)
        inputs = np.full(shape, self.metadata.pad_id, dtype=np.int32)
        labels = np.full(shape, IGNORE_LABEL_ID, dtype=np.int32)
        lengths = np.zeros(shape[0], dtype=np.int32)
        for i, (context, after) in enumerate(pairs):
            ids = [*context, *after]
            lengths[i] = len(ids) - 1
            inputs[i, : lengths[i]] = ids[:-1]
            labels[i, len(context) - 1 : lengths[i]] = after
        arrays = {
            "inputs": inputs,
            "labels": labels,
            "puzzle_identifiers": np.full(shape[0], identifier, dtype=np.int32),
            "lengths": lengths,
        }
        batch = self.backend.to_device(arrays)
        found = self._last_step(batch, ("token_nll", "preds"))
        nats = found["token_nll"].cpu().double().sum(-1).tolist()
        wrong = ((found["preds"] != batch["labels"]) & (batch["labels"] != IGNORE_LABEL_ID)).any(-1)
        return list(zip(nats, (~wrong).tolist(), strict=True))[: len(pairs)]

    @property
    def _one_shape(self) -> bool:
        """Whether all batches must have one shape, because XLA compiles each shape for minutes."""
        return self.device.type == "xla"

    def _last_step(self, batch: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        """Return the outputs of the loss head after the last ACT step."""
        carry = self.head.initial_carry(batch)
        options = {"depth": self.steps} if self.model.takes_depth else {}
        for _ in range(1 if self.model.takes_depth else self.steps):
            carry, _, _, found, _ = self.head(return_keys=keys, carry=carry, batch=batch, **options)
            self.backend.end_step()
        return found

    def predict(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the most likely ids (N, S) of rows, and the logit of the halting head (N,).

        batch: `inputs` (N, S), and the corpus' other arrays, (N, ...) each.
        """
        rows = len(batch["inputs"])
        nothing = np.zeros((rows, self.window), dtype=np.int32)
        arrays = {"labels": nothing} | dict(batch)

        @torch.no_grad()
        def compute(part: list[int]) -> list[tuple[np.ndarray, float]]:
            # all of one shape, so that a compiled model is compiled once
            padded = part + part[-1:] * (min(self.rows, rows) - len(part))
            moved = self.backend.to_device({name: array[padded] for name, array in arrays.items()})
            found = self._last_step(moved, ("preds", "q_halt_logits"))
            preds = found["preds"].cpu().numpy()
            sure = found.get("q_halt_logits", torch.zeros(len(padded))).float().cpu().tolist()
            return list(zip(preds, sure, strict=True))[: len(part)]

        preds, sure = np.zeros((rows, self.window), dtype=np.int64), np.zeros(rows)
        for i, (own, logit) in self._shared([self.window] * rows, compute, one_shape=True):
            preds[i], sure[i] = own, logit
        return preds, sure

    # --- generation --------------------------------------------------------------------------

    def never_written(self) -> list[int]:
        """Return the ids that never occur in a text: padding, and ids without a token."""
        tokenizer = self.tokenizer.tokenizer
        empty = [i for i in range(self.metadata.vocab_size) if tokenizer.id_to_token(i) is None]
        return [self.metadata.pad_id, *empty]

    def cache_bytes(self, rows: int, cycles: int | None = None) -> int:
        """Return the size of the keys and values of `rows` texts in bytes."""
        positions = self.config.prefix_len + self.window
        return cache_bytes(self.model.inner, rows, positions, self.steps, cycles)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        how: Sampling,
        *,
        identifier: str | None = None,
        cached: bool = True,
        cache_cycles: int | None = None,
        **options: Any,
    ) -> list[Written]:
        """Continue all prompts at once, on this rank. options: those of `generation.write`."""
        if self._one_shape:
            raise UserError(
                "text cannot be generated on XLA, which would compile a program for each length; "
                "generate it from a checkpoint with device_type=cpu or cuda"
            )
        named = self._index(identifier)
        identifiers = torch.full((len(prompts),), named, device=self.device)
        decoder = Decoder(
            self.head, identifiers, self.steps, cached=cached, cache_cycles=cache_cycles
        )
        with explain_out_of_memory(f"with {len(prompts)} texts at once; lower batch_size"):
            return write(
                decoder,
                prompts,
                self.tokenizer.tokenizer,
                how,
                eos_id=self.metadata.eos_id,
                never=self.never_written(),
                **options,
            )

    def write_all(
        self,
        prompts: Sequence[Sequence[int]],
        how: Sampling,
        stop: Sequence[str] = (),
        identifier: str | None = None,
    ) -> list[Written]:
        """Continue each prompt. A text depends on its place in the list, not on the batch size."""
        found: dict[int, Written] = {}

        def compute(batch: list[int]) -> list[Written]:
            texts = [prompts[i] for i in batch]
            return self.write(texts, how, identifier=identifier, stop=stop, rows=batch)

        # each text needs the memory of a whole window, even if it is short
        for i, written in self._shared([self.window] * len(prompts), compute):
            found[i] = written
        return [found[i] for i in range(len(prompts))]

    def _shared(
        self,
        lengths: Sequence[int],
        compute: Callable[[list[int]], Sequence[Any]],
        one_shape: bool = False,
    ) -> list[tuple[int, Any]]:
        """Return (number, result) of every item, the batches divided over the ranks.

        one_shape: all batches have the same shape, so that a compiled model may run compiled.
        """
        batches = list(batches_of(lengths, self.rows * self.window))
        own: list[tuple[int, Any]] = []
        world = self.backend.world_size
        advice = f"with {self.rows} texts at once; lower batch_size or eval_batch_size"
        # compiled blocks would be recompiled for every length
        stance = nullcontext() if one_shape else torch.compiler.set_stance("force_eager")
        with (
            stance,
            Progress(len(lengths), "ask the model, text", "text", self.backend.is_main) as bar,
        ):
            for begin in range(0, len(batches), world):
                self.between()
                for batch in batches[begin : begin + world][self.backend.rank :][:1]:
                    with explain_out_of_memory(advice):
                        own += zip(batch, compute(batch), strict=True)
                bar.update(sum(map(len, batches[begin : begin + world])))
        return [item for part in self.gather(own) for item in part]

    def _index(self, identifier: str | None) -> int:
        return self.identifier if identifier is None else identifier_index(self, identifier)


def identifier_index(language_model: LanguageModel, name: str | None) -> int:
    """Return the row of the identifier embedding called `name`; None: the only one, or the blank
    one if there are several.
    """
    names, blank = language_model.identifiers, language_model.metadata.blank_identifier_id
    if language_model.config.puzzle_emb_ndim == 0:
        if name is not None:
            raise UserError(f"identifier={name}, but this model has no identifier embedding")
        return blank
    others = [other for i, other in enumerate(names) if i != blank]
    if name is None:
        return names.index(others[0]) if len(others) == 1 else blank
    with suppress(ValueError):
        return names.index(name)
    raise UserError(f"identifier={name} is unknown to this model: {suggest(name, others)}")
