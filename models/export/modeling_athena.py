"""An Athena model for `transformers`: AutoModelForCausalLM, generate, pipeline.

The layers are Athena's own files; this one adapts them to the interface of `transformers`.
"""

import dataclasses
import inspect
import warnings
from typing import Any

import pydantic  # noqa: F401  the configs need it: transformers tells who lacks what is named here
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from models.export.configuration_athena import AthenaConfig
from models.layers import RotaryEmbedding, SequenceInfo
from models.recursive_reasoning.athena_trm import AthenaTRM as Architecture
from models.token_losses import LOSSES

# transformers renamed it in 5.24
_CACHE_FIELD = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)


class RecursionCache(DynamicCache):
    """Keys and values of earlier tokens, where every pass of the recursion is a separate layer.

    Each pass attends to the keys and values of the same pass, so the result is exact. The cache's
    length is that of the text; the identifier's prefix is stored separately.
    """

    def __init__(self, prefix: int, steps: int):
        super().__init__()
        self.prefix, self.steps, self.passes = prefix, steps, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(0, super().get_seq_length(layer_idx) - self.prefix)

    def begin(self) -> None:
        """Prepare for a forward pass. Call this before each one."""
        self.passes = 0

    def begin_cycle(self) -> None:
        """Do nothing: all cycles are kept."""

    def end_cycles(self) -> None:
        """Do nothing: see `begin_cycle`."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value (B, M, n, K) of new positions to the next pass; return all."""
        layer, self.passes = self.passes, self.passes + 1
        return self.update(key, value, layer)


class AthenaForCausalLM(PreTrainedModel, GenerationMixin):
    """See `forward`.

    The softmax of the logits gives the model's probabilities, whatever loss it was trained with.
    Activations take the dtype of `from_pretrained(..., dtype=...)`.
    """

    config_class = AthenaConfig
    base_model_prefix = "inner"
    main_input_name = "input_ids"
    config: Any
    _supports_sdpa = True
    _no_split_modules = ["ReasoningModule", "Block"]  # noqa: RUF012

    def __init__(self, config: AthenaConfig):
        super().__init__(config)
        dtype = str(config.dtype or torch.get_default_dtype()).removeprefix("torch.")
        model = Architecture(config.arch | {"forward_dtype": dtype})
        # also casts the weights, which Athena keeps in float32; but not the rotary factors
        self.inner: Any = model.inner.to(getattr(torch, dtype))
        if hasattr(self.inner, "rotary_emb"):
            self.inner.rotary_emb = self.inner.make_rotary()
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Restore buffers that no file contains: constructors set them, but `from_pretrained` drops
        them.
        """
        if isinstance(module, RotaryEmbedding):
            with torch.device(module.cos_cached.device):
                fresh = self.inner.make_rotary()
            module.cos_cached.copy_(fresh.cos_cached)
            module.sin_cached.copy_(fresh.sin_cached)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `forward` creates the cache, not `generate`."""
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return getattr(self.inner, "lm_head", self.inner.embed_tokens)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the vocabulary of an exported Athena model cannot be resized")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: RecursionCache | None = None,
        use_cache: bool | None = None,
        puzzle_identifiers: Tensor | str | int | None = None,
        steps: int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: RecursionCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Run input_ids (B, S), without the tokens that are already in the cache.

        attention_mask (B, tokens in the cache + S): 0 on padding, on either side; each row's text
        begins at the first position. labels (B, S): usually input_ids; the loss is the mean nats
        per next token, except where the label is -100, after the last ACT step. puzzle_identifiers:
        a row of the identifier embedding, its name, or (B,) rows; None: the config's. steps: ACT
        steps; None: the config's. logits_to_keep: return the logits of only this many last
        positions; 0: all. cache: another name for past_key_values, used by `generate` since
        transformers 5.24. Raises ValueError for a text longer than the model's window, and
        TypeError for any unknown argument that is not None or False.
        """
        # early 5.x versions of transformers pass it; later ones warn if it is a parameter
        places_given = kwargs.pop("cache_position", None)
        # ignoring them would silently change the result; None and False have no effect
        if unknown := [k for k, v in kwargs.items() if v is not None and v is not False]:
            raise TypeError(
                f"AthenaForCausalLM.forward has no argument {', '.join(unknown)}; it takes "
                f"{', '.join(_ARGUMENTS)}"
            )
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are the same argument: pass one of them")
        inner, steps = self.inner, steps or self.config.steps
        cache = self._cache(past_key_values if cache is None else cache, use_cache, steps)
        past = 0 if cache is None else cache.get_seq_length()
        real = self._real(attention_mask, input_ids, past)
        length = input_ids.shape[1]
        if places_given is not None and places_given.tolist() != [*range(past, past + length)]:
            raise ValueError(
                f"cache_position={places_given.tolist()}, but input_ids are the {length} tokens "
                f"after the {past} that the cache holds"
            )
        if real is None:
            places = torch.arange(past, past + length, device=input_ids.device).unsqueeze(0)
            longest = past + length
        else:
            places = (real.cumsum(-1) - 1).clamp_min(0)[:, past:]
            longest = int(places.max()) + 1
        self._check_window(longest)
        prefix = inner.config.prefix_len
        positions = prefix + places
        x = inner.embed_tokens(input_ids)
        identifiers = self._identifiers(puzzle_identifiers, input_ids)
        if prefix and past == 0:
            x = inner.add_prefix(x, identifiers)
            inner.puzzle_emb.used.clear()  # only an optimizer reads these
            before = torch.arange(prefix, device=input_ids.device).expand(len(positions), -1)
            positions = torch.cat((before, positions), dim=1)
        mask = self._mask(real, past, x.shape[1], x.device)
        cos, sin = inner.rotation(positions)
        info = SequenceInfo(cos, sin, mask, causal=mask is None and past == 0, cache=cache)
        z = inner.answer(inner.add_positions(x, positions), info, steps)[:, -length:]
        logits = LOSSES[self.config.loss_type].softmax_logits(
            inner.predict(z[:, -logits_to_keep:] if logits_to_keep else z)
        )
        loss = None if labels is None else _loss(logits, labels, real, num_items_in_batch)
        named: dict[str, Any] = {_CACHE_FIELD: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
        return output.to_tuple() if return_dict is False else output

    def _cache(self, given: Any, use_cache: bool | None, steps: int) -> RecursionCache | None:
        if given is None:
            cache = RecursionCache(self.inner.config.prefix_len, steps) if use_cache else None
        elif isinstance(given, RecursionCache):
            cache = given
        else:
            raise ValueError(
                f"the cache is a {type(given).__name__}, but every pass of the recursion "
                "has its own keys: pass use_cache=True, and reuse the returned cache"
            )
        if cache is not None:
            if cache.steps != steps:
                raise ValueError(f"steps={steps}, but the cache was computed with {cache.steps}")
            cache.begin()
        return cache

    @staticmethod
    def _real(mask: Tensor | None, input_ids: Tensor, past: int) -> Tensor | None:
        """Return (B, past + S) bool, False on padding; None if there is no padding."""
        if mask is None:
            return None
        expected = (len(input_ids), past + input_ids.shape[1])
        if mask.shape != expected:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)}, but input_ids and the cache have "
                f"{expected}: give one entry per token"
            )
        real = mask.bool()
        return None if real.all() else real

    def _check_window(self, tokens: int) -> None:
        window = self.config.max_position_embeddings
        if tokens > window:
            raise ValueError(
                f"the text has {tokens} tokens, but the model's window is {window} "
                "(config.max_position_embeddings); shorten the text, or ask for fewer new tokens"
            )

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, *args: Any
    ) -> None:
        """Stop generation at the end of the window, where `forward` would raise an error."""
        window = self.config.max_position_embeddings
        self._check_window(input_ids_length + 1)
        if generation_config.max_length > window:
            warnings.warn(
                f"the prompt has {input_ids_length} tokens and the window is {window}: the text "
                f"ends after {window - input_ids_length} new tokens or fewer",
                stacklevel=2,
            )
            generation_config.max_length = window
        super()._validate_generated_length(  # type: ignore[misc]
            generation_config, input_ids_length, *args
        )

    def _identifiers(self, given: Tensor | str | int | None, input_ids: Tensor) -> Tensor:
        """Return rows of the identifier embedding, (B,)."""
        names = self.config.identifiers
        if given is not None and not self.inner.config.prefix_len:
            raise ValueError(
                f"puzzle_identifiers={given!r}, but this model has no identifier embedding"
            )
        if isinstance(given, str):
            if given not in names:
                raise ValueError(f"puzzle_identifiers={given!r} is unknown; choose one of {names}")
            given = names.index(given)
        rows = torch.as_tensor(
            self.config.default_identifier if given is None else given, device=input_ids.device
        )
        return rows.expand(len(input_ids))

    def _mask(
        self, real: Tensor | None, past: int, length: int, device: torch.device
    ) -> Tensor | None:
        """Return (B or 1, 1, length, positions so far) bool, True where one of the last `length`
        positions may attend; None if each attends to all positions before it.
        """
        if real is None and (past == 0 or length == 1):
            return None
        prefix = self.inner.config.prefix_len
        if real is None:
            total = prefix + past + length
            seen = torch.ones(1, total, dtype=torch.bool, device=device)
        else:
            seen = F.pad(real, (prefix, 0), value=True)
        keys = torch.arange(seen.shape[1], device=device)
        queries = keys[-length:].unsqueeze(1)
        # padding attends to itself, because an empty softmax is NaN in some kernels
        return ((keys <= queries) & seen[:, None] | (keys == queries)).unsqueeze(1)


_ARGUMENTS = [
    name for name in inspect.signature(AthenaForCausalLM.forward).parameters
    if name not in ("self", "kwargs")
]  # fmt: skip


def _loss(
    logits: Tensor, labels: Tensor, real: Tensor | None, items: Tensor | int | None
) -> Tensor:
    """Return the mean nats of each token after a real one. items: divisor to use instead of the
    number of tokens.
    """
    following = labels[:, 1:].to(logits.device)
    if real is not None:
        following = following.masked_fill(~real[:, -labels.shape[1] : -1], -100)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / ((following != -100).sum().clamp_min(1) if items is None else items)
