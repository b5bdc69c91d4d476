"""Build a model, and load weights into it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dataset.common import BLANK_IDENTIFIER, DatasetMetadata
from models.block_checks import describe_unused
from models.losses import ACTLossHead, create_terms
from models.source_code import changed_plugins
from utils.backend.state import load_model_state
from utils.checkpoint.format import Checkpoint
from utils.config.schema import ArchConfig
from utils.core.errors import UserError
from utils.core.functions import load_class


def create_model(
    arch: ArchConfig,
    metadata: DatasetMetadata,
    *,
    batch_size: int,
    seed: int = 0,
    highest: Mapping[str, int] | None = None,
    device: str | torch.device = "cpu",
) -> ACTLossHead:
    """Build an architecture with its loss head, initialised from `seed` on the CPU.

    highest: the highest value of each additional per-token array of the corpora; None: nothing is
    trained, so loss terms are not checked. device: "meta" to count a model without allocating it.

    Raises UserError if the options do not fit each other or the corpus.
    """
    sizes = dict(
        batch_size=batch_size,
        seq_len=metadata.seq_len,
        vocab_size=metadata.vocab_size,
        num_puzzle_identifiers=metadata.num_puzzle_identifiers,
    )
    architecture = load_class(arch.name)
    options = _with_terms_options(arch, architecture)
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = architecture(options | sizes)
    except ValidationError as error:
        messages = "; ".join(fault["msg"] for fault in error.errors())
        raise UserError(f"arch does not fit the corpus: {messages}") from None
    for note in describe_unused(model):
        warnings.warn(note, stacklevel=2)
    head = load_class(arch.loss.name)(model, **arch.loss.options)
    if highest is None:
        return head
    for term in head.terms:
        if lacking := sorted(term.needs_data - highest.keys()):
            raise UserError(
                f"arch.loss.terms.{term.name} needs {', '.join(f'{n}.npy' for n in lacking)} "
                f"in the corpus; add it or set arch.loss.terms.{term.name}=null"
            )
        term.check(model.config, highest)
    return head


def _with_terms_options(arch: ArchConfig, architecture: Any) -> dict[str, Any]:
    """Return the options of the architecture, including those required by the loss terms."""
    options = arch.options
    for term in create_terms(arch.loss.options.get("terms") or {}):
        for name, value in term.arch_options.items():
            if name not in architecture.Config.model_fields:
                raise UserError(
                    f"arch.loss.terms.{term.name} needs the option {name}, which {arch.name} does "
                    f"not have; set arch.loss.terms.{term.name}=null"
                )
            if options.get(name, "auto") not in ("auto", value):
                raise UserError(
                    f"arch.loss.terms.{term.name} needs arch.{name}={value}, but it is "
                    f"{options[name]}: use auto"
                )
            options[name] = value
    return options


def load_into(
    model: nn.Module, weights: dict[str, Tensor], opened: Checkpoint | None = None
) -> None:
    """Load weights by name. Raises UserError with the names and shapes that do not match.

    opened: the checkpoint that they come from; plug-ins that differ from its copies are named in
    a warning.
    """
    changed = [] if opened is None else changed_plugins(opened.folder, model)
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not part of this architecture" for name in weights if name not in own]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if faults[4:] else "")
        raise UserError(
            f"the checkpoint has another architecture: {shown}. Set the arch options that it "
            "was trained with (its config.yaml has them)"
            + "".join(f"; or {file} has changed: its copy is {copy}" for file, copy in changed)
        )
    for file, copy in changed:
        warnings.warn(
            f"{file} differs from the copy that the checkpoint was written with, {copy}",
            stacklevel=2,
        )
    load_model_state(model, weights)


def match_identifiers(
    weights: dict[str, Tensor], old: Sequence[str] | None, new: Sequence[str]
) -> None:
    """Reorder identifier embeddings by name; identifiers without an old row get the mean of all
    rows.

    old, new: names by row. Without old names (TRM's files) rows are kept if their number matches;
    otherwise all are set to the mean.
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
