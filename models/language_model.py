"""A trained model and its tokenizer as one thing to ask: how likely is a text, what comes next.

What scripts, evaluators and lm-evaluation-harness ask goes through here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata, UserError
from dataset.tokenization import TextTokenizer
from models import cost
from models.generation import Decoder, Sampling, Written, batches_of, write
from models.key_value_cache import cache_bytes
from models.layers import CastedLinear
from models.losses import ACTLossHead
from models.train_state import create_model, load_into
from utils.backend import Backend
from utils.backend.cpu import CPUBackend
from utils.checkpoint import Checkpoint, load_weights
from utils.config import load_config
from utils.functions import load_class, nearest


class Score(NamedTuple):
    """Of a continuation: nats (the negative sum of its log-probabilities), and whether each of its
    tokens was the likeliest."""

    nats: float
    greedy: bool


class LanguageModel:
    """A model in its loss head, in evaluation mode, with what belongs to it.

    `score` and `write_all` are collectives: every rank gives the same requests, computes a share
    of the batches, and gets all results. `between` is called by all ranks before each round.
    """

    def __init__(
        self,
        head: ACTLossHead,
        metadata: DatasetMetadata,
        identifiers: Sequence[str],
        tokenizer: TextTokenizer,
        backend: Backend | None = None,
        *,
        rows: int = 16,
        identifier: str | None = None,
        between: Callable[[], None] = lambda: None,
    ):
        """rows: texts computed at once. identifier: see `identifier_index`."""
        self.head, self.metadata, self.identifiers = head, metadata, list(identifiers)
        self.tokenizer, self.backend = tokenizer, backend or CPUBackend()
        self.rows, self.between = rows, between
        self.model: Any = head.model
        self.config: Any = head.model.config
        self.steps: int = getattr(self.config, "max_eval_steps", 1)
        self.window: int = self.config.seq_len
        self.identifier = identifier_index(self, identifier)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos_id(self) -> int | None:
        return self.metadata.eos_id

    def flops_per_token(self) -> float:
        """Of one ACT step in evaluation, the output head included."""
        return cost.measure(self.model).forward_flops

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return self.tokenizer.encode([text])[0].tolist() if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)

    def opening(self) -> list[int]:
        """What stands before a text that has nothing before it: a line break.

        No label in training follows an eos, so the model has never learned what comes after one.
        """
        return self.encode("\n") or [self.metadata.eos_id or 0]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, never empty, and of what continues it.

        The whole is tokenized at once, and spaces at the context's end belong to what follows, so
        that words get the tokens which they have in running text.
        """
        stripped = context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        before = self.encode(stripped)
        both = self.encode(stripped + continuation)
        after = both[len(before) :] if both[: len(before)] == before else self.encode(continuation)
        return before or self.opening(), after

    # --- how likely is a text ------------------------------------------------------------------

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """For each (context, continuation), ids of at least one token each, how likely the model
        holds the continuation. Of what is longer than the window the last part counts as context;
        a continuation longer than it is scored in parts."""
        parts = [(n, *part) for n, pair in enumerate(pairs) for part in self._in_windows(*pair)]
        lengths = [len(context) + len(after) for _, context, after in parts]
        nats, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)

        def compute(batch: list[int]) -> list[tuple[float, bool]]:
            return self._score_batch([parts[i][1:] for i in batch])

        for i, (cost_of_part, all_best) in self._shared(lengths, compute):
            nats[parts[i][0]] += cost_of_part
            greedy[parts[i][0]] &= all_best
        return [Score(float(n), bool(g)) for n, g in zip(nats, greedy, strict=True)]

    def _in_windows(
        self, context: Sequence[int], after: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The pair cut into parts of at most the window, every token of `after` in one of them;
        later parts keep half a window as context."""
        if not context or not after:
            raise ValueError("a context and a continuation of at least one token each are needed")
        ids, begin = [*context, *after], len(context)
        while begin < len(ids):
            end = min(len(ids), begin + max(1, self.window // 2))
            if len(ids) - begin < self.window:  # what is left, and a token before it, fits
                end = len(ids)
            first = max(0, end - 1 - self.window)
            yield ids[first:begin], ids[begin:end]
            begin = end

    @torch.no_grad()
    def _score_batch(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The last input token is the one before the last scored one."""
        length = max(len(context) + len(after) - 1 for context, after in pairs)
        shape = (len(pairs), length)
        inputs = np.full(shape, self.metadata.pad_id, dtype=np.int32)
        labels = np.full(shape, IGNORE_LABEL_ID, dtype=np.int32)
        starts = np.full(shape, length, dtype=np.int32)
        for i, (context, after) in enumerate(pairs):
            ids = [*context, *after]
            inputs[i, : len(ids) - 1] = ids[:-1]
            labels[i, len(context) - 1 : len(ids) - 1] = after
            starts[i, : len(ids) - 1] = 0
        arrays = {
            "inputs": inputs,
            "labels": labels,
            "puzzle_identifiers": np.full(len(pairs), self.identifier, dtype=np.int32),
        }
        if self.config.document_mask:
            arrays["document_starts"] = starts
        batch = self.backend.to_device(arrays)
        carry = self.head.initial_carry(batch)
        for _ in range(self.steps):
            carry, _, _, found, _ = self.head(
                return_keys=("token_nll", "preds"), carry=carry, batch=batch
            )
            self.backend.end_step()
        nats = found["token_nll"].cpu().double().sum(-1).tolist()
        wrong = ((found["preds"] != batch["labels"]) & (batch["labels"] != IGNORE_LABEL_ID)).any(-1)
        return list(zip(nats, (~wrong).tolist(), strict=True))

    # --- what comes next -----------------------------------------------------------------------

    def never_written(self) -> list[int]:
        """Ids that no text holds: padding, and numbers to which the tokenizer gives no token."""
        tokenizer = self.tokenizer.tokenizer
        empty = [i for i in range(self.metadata.vocab_size) if tokenizer.id_to_token(i) is None]
        return [self.metadata.pad_id, *empty]

    def cache_bytes(self, rows: int, cycles: int | None = None) -> int:
        """Bytes that the keys and values of `rows` texts take."""
        positions = self.config.prefix_len + self.window
        return cache_bytes(self.config, rows, positions, self.steps, cycles)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        how: Sampling,
        *,
        cached: bool = True,
        cache_cycles: int | None = None,
        **options: Any,
    ) -> list[Written]:
        """Continues all prompts at once, on this rank; `options` go to `generation.write`."""
        identifiers = torch.full((len(prompts),), self.identifier, device=self.device)
        decoder = Decoder(
            self.head, identifiers, self.steps, cached=cached, cache_cycles=cache_cycles
        )
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
        self, prompts: Sequence[Sequence[int]], how: Sampling, stop: Sequence[str] = ()
    ) -> list[Written]:
        """Continues each prompt; their number and order have no influence on a text, whose draws
        are those of its place in the list."""
        found: dict[int, Written] = {}

        def compute(batch: list[int]) -> list[Written]:
            return self.write([prompts[i] for i in batch], how, stop=stop, rows=batch)

        for i, written in self._shared([len(prompt) for prompt in prompts], compute):
            found[i] = written
        return [found[i] for i in range(len(prompts))]

    def _shared(
        self, lengths: Sequence[int], compute: Callable[[list[int]], Sequence[Any]]
    ) -> list[tuple[int, Any]]:
        """(number, result) of every item, the batches divided over the ranks."""
        batches = list(batches_of(lengths, self.rows))
        own: list[tuple[int, Any]] = []
        world = self.backend.world_size
        for begin in range(0, len(batches), world):
            self.between()
            for batch in batches[begin : begin + world][self.backend.rank :][:1]:
                own += zip(batch, compute(batch), strict=True)
        return [item for part in self.backend.gather_objects(own) for item in part]


# --- from a checkpoint ---------------------------------------------------------------------------


def load_language_model(
    path: str | Path,
    weights: str = "ema",
    *,
    steps: int | None = None,
    refinement: int | None = None,
    backend: Backend | None = None,
    **options: Any,
) -> LanguageModel:
    """The model of a checkpoint folder, or of the newest in a run's folder.

    weights: ema or raw. steps: ACT steps of every token; None: as in evaluation. refinement: passes
    after them; None: as configured. `options` are those of `LanguageModel`.
    Raises UserError where there is no such model, or where it cannot continue a text.
    """
    if not Path(path).is_dir():
        raise UserError(f"checkpoint={path} is not a folder; name a checkpoint or a run")
    backend = backend or CPUBackend()
    values, opened = load_weights(path, weights)
    assert opened is not None
    head, metadata = build_model(opened, steps, refinement)
    if not head.model.config.causal:
        raise UserError(
            f"the model of {opened.folder} is not causal: it was trained to see the tokens after "
            "the one it predicts, and cannot continue a text"
        )
    if "tokenizer.json" not in opened:
        raise UserError(f"{opened.folder} has no tokenizer.json: it was not trained on text")
    # a head for z_L, where one was trained, is part of the model: see build_model
    load_into(head.model, values)
    cast_weights(head)
    head.to(backend.device).eval()
    tokenizer = open_tokenizer(opened.folder / "tokenizer.json", metadata)
    names = opened.json("identifiers.json")
    return LanguageModel(head, metadata, names, tokenizer, backend, **options)


def open_tokenizer(path: Path, metadata: DatasetMetadata) -> TextTokenizer:
    """The tokenizer of a corpus, with the corpus' eos and pad."""
    known = Tokenizer.from_file(str(path))
    eos = None if metadata.eos_id is None else known.id_to_token(metadata.eos_id)
    return TextTokenizer(path, eos, known.id_to_token(metadata.pad_id))


def cast_weights(head: ACTLossHead) -> None:
    """Keeps the weights of linear maps in the dtype that they are cast to in every forward.

    The numbers stay the same; a model that only reads need not cast them again for each token.
    """
    config: Any = head.model.config
    for name, module in head.model.named_modules():
        if isinstance(module, CastedLinear) and not name.endswith("q_head"):
            module.to(config.dtype)


def build_model(
    opened: Checkpoint,
    steps: int | None = None,
    refinement: int | None = None,
    device: str = "cpu",
) -> tuple[ACTLossHead, DatasetMetadata]:
    """The model that a checkpoint's own config and corpus describe, its weights not yet loaded.

    steps: ACT steps of every evaluation; None: as configured, and the most where the rows decide.
    refinement: passes after them; None: as configured.
    """
    raw = yaml.safe_load(opened.text("config.yaml"))
    # How the run divided its batch over ranks need not work for the one process here.
    raw |= {"micro_batch_size": "auto", "grad_accum_steps": 1}
    raw["arch"] |= _depth(raw["arch"], steps, refinement)
    metadata = DatasetMetadata.model_validate_json(opened.text("dataset.json"))
    loss = raw["arch"]["loss"]
    head = create_model(
        load_config(raw),
        metadata,
        batch_size=1,
        reasoning_ids=int(bool(loss.get("reasoning_loss_weight"))),
        device=device,
    )
    return head, metadata


def _depth(arch: dict[str, Any], steps: int | None, refinement: int | None) -> dict[str, Any]:
    """Options of the architecture that make every row and token run the same number of steps."""
    fields = load_class(arch["name"]).Config.model_fields  # type: ignore[attr-defined]
    if "eval_halting" not in fields:
        for name, value in (("steps", steps), ("refinement", refinement)):
            if value not in (None, 1 if name == "steps" else 0):
                raise UserError(f"{name}={value}, but {arch['name']} has one step: leave it out")
        return {}
    found: dict[str, Any] = {}
    if steps is not None:
        found = {"eval_halting": "fixed", "eval_steps": steps}
    elif arch.get("eval_halting") != "fixed":
        found = {"eval_halting": "max"}
    return found if refinement is None else found | {"post_refinement_steps": refinement}


def identifier_index(language_model: LanguageModel, name: str | None) -> int:
    """Row of the identifier embedding that `name` asks for; None: the only one, else the blank."""
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
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if others[5:] else "")
    near = nearest(name, names)
    advice = f"did you mean '{near}'?" if near else f"there are {shown or 'none'}"
    raise UserError(f"identifier={name} is unknown to this model: {advice}")
