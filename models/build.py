"""Build a model, and load weights into it."""

from collections.abc import Sequence

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dataset.common import BLANK_IDENTIFIER, DatasetMetadata
from models.losses import ACTLossHead
from utils.backend.state import (
    load_model_state,
)
from utils.config.schema import ArchConfig
from utils.core.errors import UserError
from utils.core.functions import load_class


def create_model(
    arch: ArchConfig,
    metadata: DatasetMetadata,
    *,
    batch_size: int,
    seed: int = 0,
    reasoning_ids: int = 0,
    device: str | torch.device = "cpu",
) -> ACTLossHead:
    """Build an architecture inside its loss head, with weights drawn from `seed` on the CPU.

    `reasoning_ids` is the highest label of the corpus' reasoning stream + 1, 0 without one;
    `device` is "meta" to count a model without allocating it.
    """
    options, loss = arch.options, arch.loss
    architecture = load_class(arch.name)
    if "enable_reasoning_stream" in architecture.Config.model_fields:  # type: ignore[attr-defined]
        wanted = options.get("enable_reasoning_stream", "auto")
        used = bool(loss.options.get("reasoning_loss_weight")) and reasoning_ids > 0
        options["enable_reasoning_stream"] = used if wanted == "auto" else wanted
    if loss.options.get("reasoning_loss_weight") and device != "meta" and not reasoning_ids:
        raise UserError(
            f"arch.loss.reasoning_loss_weight={loss.options['reasoning_loss_weight']} needs "
            "reasoning_labels.npy beside the corpus' other arrays; add it or set the weight to 0"
        )
    sizes = dict(
        batch_size=batch_size,
        seq_len=metadata.seq_len,
        vocab_size=metadata.vocab_size,
        num_puzzle_identifiers=metadata.num_puzzle_identifiers,
    )
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = architecture(options | sizes)
    except ValidationError as error:
        messages = "; ".join(fault["msg"] for fault in error.errors())
        raise UserError(f"arch and the corpus do not fit: {messages}") from None
    known = getattr(model.config, "reasoning_vocab_size", 0)
    if options.get("enable_reasoning_stream") is True and reasoning_ids > known:
        raise UserError(
            f"reasoning_labels.npy holds the label {reasoning_ids - 1}, but "
            f"arch.reasoning_vocab_size is {known}; it must be at least {reasoning_ids}"
        )
    return load_class(loss.name)(model, **loss.options)


def load_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights by name. Raises UserError that names what does not fit."""
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not part of this architecture" for name in weights if name not in own]
    faults += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if faults[4:] else "")
        raise UserError(
            f"the checkpoint is of another architecture: {shown}. Give the arch options that it "
            "was trained with (its config.yaml has them)"
        )
    load_model_state(model, weights)


def match_identifiers(
    weights: dict[str, Tensor], old: Sequence[str] | None, new: Sequence[str]
) -> None:
    """Reorder identifier embeddings by name; identifiers without an old row get the mean row.

    old, new: names by row. Without old names (TRM's files) rows stay as they are if their number
    matches; otherwise all become the mean.
    """
    name = "inner.puzzle_emb.weights"
    if name not in weights:
        return
    table = weights[name]
    if old is None and len(table) == len(new):
        return
    index = {} if old is None else {identifier: i for i, identifier in enumerate(old)}
    rows = table.mean(0, keepdim=True).repeat(len(new), 1)
    for i, identifier in enumerate(new):
        if identifier in index:
            rows[i] = table[index[identifier]]
    if BLANK_IDENTIFIER in new and BLANK_IDENTIFIER not in index:
        rows[new.index(BLANK_IDENTIFIER)] = 0
    weights[name] = rows
