"""Generate texts token by token, with a cache of earlier tokens.

Rows are texts of any lengths, aligned left; a token sees only its own text. Every token is computed
with the same number of ACT steps.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dataset.common import is_byte_token
from models.inference.key_value_cache import KeyValueCache
from models.inference.sampling import Sampling
from models.layers import SequenceInfo
from models.losses import ACTLossHead
from utils.core.errors import UserError

REPLACEMENT = "\ufffd"


class Decoder:
    """Compute the next-token logits of several growing texts.

    The model sees at most its window of `seq_len` tokens. When a text fills it, only the last half
    is kept and recomputed, so a token sees at least half a window, and most tokens are computed
    once.
    """

    def __init__(
        self,
        head: ACTLossHead,
        identifiers: Tensor,
        steps: int,
        *,
        cached: bool = True,
        cache_cycles: int | None = None,
    ):
        """Prepare to continue B texts.

        identifiers: (B,) rows of the identifier embedding, on the model's device. cached: False
        recomputes the whole window for each new token. cache_cycles: see
        `models/inference/key_value_cache.py`.
        """
        self.head, self.inner, self.steps = head, head.model.inner, steps
        self.config: Any = head.model.config
        self.identifiers, self.device = identifiers, identifiers.device
        self.cached, self.cache_cycles = cached, cache_cycles
        self.cache: KeyValueCache | None = None
        self.texts: list[list[int]] = []
        self.first: list[int] = []
        """Index of each text's first token in the window."""

    @torch.no_grad()
    def begin(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Start with texts of at least one token each; return logits (B, V), whose softmax gives
        the probabilities.
        """
        self.texts = [list(text) for text in texts]
        self.first = [max(0, len(text) - self.config.seq_len) for text in texts]
        return self._read_windows()

    @torch.no_grad()
    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each text; return the logits (B, V) after it."""
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        full = False
        for i, text in enumerate(self.texts):
            if len(text) - self.first[i] > self.config.seq_len:
                self.first[i], full = len(text) - max(1, self.config.seq_len // 2), True
        if full or self.cache is None:
            return self._read_windows()
        prefix, inner = self.config.prefix_len, self.inner
        places = [len(text) - 1 - first for text, first in zip(self.texts, self.first, strict=True)]
        positions = prefix + torch.tensor(places, device=self.device)
        used = prefix + max(places) + 1
        mask = None
        if min(places) < max(places):
            seen = torch.arange(used, device=self.device) <= positions[:, None]
            mask = seen[:, None, None]
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        self.cache.begin(positions, used)
        cos, sin = inner.rotation(positions.unsqueeze(1))
        info = SequenceInfo(cos, sin, mask, causal=False, cache=self.cache)
        x = inner.add_positions(inner.embed_tokens(ids), positions.unsqueeze(1))
        return self._logits(inner.answer(x, info, self.steps)[:, 0])

    def _read_windows(self) -> Tensor:
        """Run the windows of all texts and fill the cache."""
        windows = [text[first:] for text, first in zip(self.texts, self.first, strict=True)]
        length, prefix = max(map(len, windows)), self.config.prefix_len
        inputs = np.zeros((len(windows), length), dtype=np.int64)
        for row, window in zip(inputs, windows, strict=True):
            row[: len(window)] = window  # tokens of the text do not see the padding after it
        batch = {
            "inputs": torch.from_numpy(inputs).to(self.device),
            "puzzle_identifiers": self.identifiers,
        }
        info = self.inner.sequence_info(batch)
        if self.cached:
            if self.cache is None:
                positions = prefix + self.config.seq_len
                self.cache = KeyValueCache(positions, self.cache_cycles)
            self.cache.begin(None, prefix + length)
            info = info._replace(cache=self.cache)
        z = self.inner.answer(self.inner.embed(batch), info, self.steps)
        last = torch.tensor([prefix + len(window) - 1 for window in windows], device=self.device)
        return self._logits(z[torch.arange(len(windows), device=self.device), last])

    def _logits(self, z: Tensor) -> Tensor:
        return self.head.loss_type.softmax_logits(self.inner.predict(z))


def draw(
    logits: Tensor,
    generator: torch.Generator,
    how: Sampling,
    *,
    text: Sequence[int] = (),
    never: Sequence[int] = (),
) -> int:
    """Sample one id from logits (V,) on the host; temperature 0 takes the most likely one.

    text: ids that the repetition penalty (Keskar et al. 2019, arXiv 1909.05858) makes less likely.
    never: ids to exclude.
    """
    logits = logits.clone()
    if how.repetition_penalty != 1 and text:
        seen = torch.tensor(sorted(set(text)))
        raw, penalty = logits[seen].double(), how.repetition_penalty
        most = torch.finfo(logits.dtype).max
        changed = torch.where(raw > 0, raw / penalty, raw * penalty)
        logits[seen] = changed.clamp(-most, most).to(logits.dtype)
    logits[list(never)] = -torch.inf
    if how.temperature == 0:
        return int(logits.argmax())
    best_logit = logits.max()
    if not best_logit.isfinite():
        raise UserError(
            "the model's logits are not finite, so no token can be sampled: training diverged, "
            "or the weights are damaged; use an earlier checkpoint"
        )
    # relative to the maximum, in float64, so that no temperature gives infinity
    logits = ((logits - best_logit).double() / how.temperature).float()
    if how.top_k is not None and how.top_k < len(logits):
        best = logits.topk(how.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(0, best.indices, best.values)
    probabilities = torch.softmax(logits, dim=-1)
    if how.top_p is not None:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # keep the most likely token, and all that are needed to reach top_p
        beyond = ordered.cumsum(0) - ordered >= how.top_p
        beyond[0] = False
        probabilities[ids[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


class Written(NamedTuple):
    """A finished continuation.

    ids: without eos. ended: whether it ended by eos or a stop string, not by the limit.
    """

    ids: list[int]
    text: str
    ended: bool


class Writer:
    """Decode one continuation id by id, in pieces that can be shown immediately.

    Joined, the pieces are what the continuation adds to the decoded prompt. Text that later ids may
    change is held back: the bytes of an incomplete character, a run of byte tokens (a decoder
    replaces all of it if one byte is wrong), and a possible start of a stop string. The text ends
    before its first stop string. Invalid bytes become U+FFFD. A character that starts in the last
    bytes of the prompt is part of the continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.text = ""
        self.shown = 0
        self.ended = False
        # Decoding begins before the first new id, because some tokenizers write a text's first word
        # without a space.
        self._recent = list(prompt)
        self._context = self._decode(self._recent)
        self._final = 0

    def add(self, token: int) -> str:
        """Add one id; return the text that can be shown now."""
        self.ids.append(token)
        self._recent.append(token)
        whole = self._decode(self._recent)
        self.text = self.text[: self._final] + self._new(whole)
        self._end_at_stop(len(self.text.rstrip(REPLACEMENT)))
        if self.ended:
            return self._show(len(self.text))
        name = self.tokenizer.id_to_token(token)
        if whole.endswith(REPLACEMENT) or (name is not None and is_byte_token(name)):
            return ""
        self._final = len(self.text)
        self._recent, self._context = [token], self._decode([token])
        return self._show(len(self.text) - self._doubtful())

    def finish(self) -> str:
        """Return the rest of the text after the last id."""
        self._end_at_stop(len(self.text))
        return self._show(len(self.text))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _new(self, whole: str) -> str:
        """Return the text that the recent ids, decoded to `whole`, add to their context."""
        if whole.startswith(self._context):
            return whole[len(self._context) :]
        pairs = zip(self._context, whole, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        changed = self._context[same:]
        # If invalid bytes follow the prompt's last bytes, those become U+FFFD, too; a character
        # that the prompt began is completed instead.
        return whole[same + (0 if REPLACEMENT in changed else len(changed.encode())) :]

    def _end_at_stop(self, until: int) -> None:
        places = [place for s in self.stop if (place := self.text.find(s, 0, until)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True

    def _doubtful(self) -> int:
        """Return how many characters at the end of the text may start a stop string."""
        lengths = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
        return max(lengths, default=0)

    def _show(self, until: int) -> str:
        new = self.text[self.shown : until]
        self.shown = max(self.shown, until)
        return new


@torch.no_grad()
def write(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    how: Sampling,
    *,
    eos_id: int | None,
    stop: Sequence[str] = (),
    never: Sequence[int] = (),
    rows: Sequence[int] | None = None,
    show: Callable[[int, str], None] = lambda row, piece: None,
) -> list[Written]:
    """Continue each prompt (ids, at least one) until eos, a stop string or the limit.

    The samples of a row depend only on `how.seed` and its number in `rows` (default: its index),
    not on other rows. show(row, piece) is called for every token with the new text, which may be
    empty.
    """
    writers = [Writer(tokenizer, prompt, stop) for prompt in prompts]
    generators = [_generator(how.seed, row) for row in rows or range(len(prompts))]
    logits = decoder.begin(prompts).float().cpu()  # all rows at once, because each transfer waits
    for n in range(how.max_new_tokens):
        tokens = []
        for row, writer in enumerate(writers):
            if writer.ended:
                tokens.append(0)  # a finished row is computed with the others, but ignored
                continue
            text = [*prompts[row], *writer.ids] if how.repetition_penalty != 1 else ()
            token = draw(logits[row], generators[row], how, text=text, never=never)
            tokens.append(token)
            if token == eos_id:
                writer.ended = True
                show(row, writer.finish())
            else:
                show(row, writer.add(token))
        if all(writer.ended for writer in writers) or n + 1 == how.max_new_tokens:
            break
        logits = decoder.extend(tokens).float().cpu()
    for row, writer in enumerate(writers):
        if rest := writer.finish():
            show(row, rest)
    return [Written(writer.ids, writer.text, writer.ended) for writer in writers]


def _generator(seed: int, row: int) -> torch.Generator:
    """Return the random generator of a row; that of row 0 is seeded with `seed` itself."""
    mixed = seed if row == 0 else int(np.random.SeedSequence((seed, row)).generate_state(1)[0])
    return torch.Generator().manual_seed(mixed)


def batches_of(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield batches of item indices, grouped by similar length. A batch has at most `tokens`
    tokens, including padding, or a single item.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
