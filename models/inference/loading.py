"""Load language models and weights from checkpoints."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from dataset.common import DatasetMetadata, read_tokenizer
from dataset.tokens.tokenization import TextTokenizer
from models.build import create_model, load_into, match_identifiers
from models.inference.language_model import LanguageModel
from models.layers import CastedLinear
from models.losses import ACTLossHead
from models.terms.base import LoadBase
from utils.backend import Backend
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    checkpoint_in,
    load_weights,
    missing_advice,
)
from utils.config.plugins import checkpoint_options, gather_terms
from utils.config.saved import check_plugins_given, read_arch
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.core.functions import load_class
from utils.corpus.data import Data


def load_language_model(
    path: str | Path,
    weights: str = "ema",
    *,
    steps: int | None = None,
    refinement: int | None = None,
    forward_dtype: str | None = None,
    backend: Backend | None = None,
    cast: bool = True,
    **options: Any,
) -> LanguageModel:
    """Load the model of a checkpoint, or of the newest checkpoint of a run.

    path: directory of either. weights: ema or raw. steps: ACT steps of every token; None: as in
    evaluation. refinement: passes after them; None: as configured. forward_dtype: of activations;
    None: as trained, but float32 if the device does not support bfloat16. cast: see
    `cast_weights`. options: those of `LanguageModel`.
    Raises UserError if there is no such model, or if it cannot continue texts.
    """
    if Path(path).is_file():
        folder = Path(path).parent
        advice = str(folder) if (folder / MANIFEST).is_file() else "a run or a step_<n> in one"
        raise UserError(f"checkpoint={path} is a file, but a checkpoint is a folder; give {advice}")
    if not Path(path).is_dir():
        raise UserError(f"checkpoint={path} is not a folder; {missing_advice(Path(path))}")
    backend = backend or CPUBackend()
    values, opened = load_weights(path, weights)
    assert opened is not None
    forward_dtype = forward_dtype or usable_dtype(saved_arch(opened), backend)
    head, metadata = build_model(opened, steps, refinement, forward_dtype)
    if not head.model.config.causal:
        raise UserError(
            f"the model of {opened.folder} is not causal: it was trained to see the tokens after "
            "the one it predicts, and cannot continue a text; pretrain.py eval_only=true evaluates "
            "it, export_hf.py format=trm exports it"
        )
    if "tokenizer.json" not in opened:
        raise UserError(f"{opened.folder} has no tokenizer.json: it was not trained on text")
    # a trained head for z_L is part of the model: see build_model
    load_into(head.model, values, opened)
    if cast:
        cast_weights(head)
    head.to(backend.device).eval()
    # the kernel that exported models have, so that both compute the same
    head.model.inner.choose_attention(backend, trial=False, blocks=False)
    tokenizer = open_tokenizer(opened.folder / "tokenizer.json", metadata)
    names = opened.json("identifiers.json")
    progress = opened.json("state.json")["counters"].get("progress", 1.0)
    depth = steps or head.model.eval_depth(progress)
    return LanguageModel(
        head, metadata, names, tokenizer, backend, checkpoint=opened, depth=depth, **options
    )


def open_tokenizer(path: Path, metadata: DatasetMetadata) -> TextTokenizer:
    """Return the tokenizer of a corpus, with the corpus' eos and pad."""
    known, _ = read_tokenizer(path)
    eos = None if metadata.eos_id is None else known.id_to_token(metadata.eos_id)
    return TextTokenizer(path, eos, known.id_to_token(metadata.pad_id))


def cast_weights(head: ACTLossHead) -> None:
    """Convert the weights of linear layers to the dtype that every forward pass casts them to.

    The results are the same, but a model that is not trained need not cast for each token.
    """
    config: Any = head.model.config
    for name, module in head.model.named_modules():
        if isinstance(module, CastedLinear) and not name.endswith("q_head"):
            module.to(config.dtype)


def saved_arch(opened: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's options of the architecture, including its name and its loss, which are
    the only part of the config needed to use the model.

    Raises UserError, naming `plugins`, if a class is not found.
    """
    saved = yaml.safe_load(opened.text("config.yaml"))
    needed = {key: saved[key] for key in ("arch", "plugins") if key in saved}
    check_plugins_given(needed, opened.folder)
    return saved["arch"]


def build_model(
    opened: Checkpoint,
    steps: int | None = None,
    refinement: int | None = None,
    forward_dtype: str | None = None,
    device: str = "cpu",
    metadata: DatasetMetadata | None = None,
) -> tuple[ACTLossHead, DatasetMetadata]:
    """Build the model that a checkpoint describes, without loading its weights.

    Options that no longer exist are ignored with a warning; newer options get the values defined in
    `utils/config/saved.py`.

    steps: ACT steps of every evaluation; None: as configured, or the maximum if rows halt by
    themselves. refinement: passes after them; None: as configured. metadata: that of another corpus
    to use the model on.
    """
    saved = saved_arch(opened)
    changes = fix_depth(saved, steps, refinement)
    if refinement and not changes:
        raise UserError(
            f"refinement={refinement}, but {saved['name']} has no refinement passes: remove it"
        )
    saved |= changes
    if forward_dtype is not None:
        saved["forward_dtype"] = forward_dtype
    arch, gone = read_arch(saved)
    if gone:
        warnings.warn(
            f"{opened.folder} was trained with {', '.join(gone)}, which no longer exists and is "
            "ignored",
            stacklevel=2,
        )
    metadata = metadata or DatasetMetadata.model_validate_json(opened.text("dataset.json"))
    head = create_model(arch, metadata, batch_size=1, device=device)
    one = head.model.max_steps == head.model.eval_depth() == 1 and not head.model.takes_depth
    if one and steps not in (None, 1):
        raise UserError(f"steps={steps}, but {arch.name} takes one step: remove it")
    return head, metadata


def fitting_weights(
    key: str,
    path: str,
    which: str,
    identifiers: Sequence[str],
    tokenizer: Path | None,
) -> tuple[dict[str, Tensor], Checkpoint | None]:
    """Load weights as `checkpoint.load_weights` does, with a row for every corpus identifier.

    Raises UserError, naming `key` and `path`, if they were trained with another tokenizer.
    """
    weights, opened = load_weights(path, which)
    old = None
    if opened is not None:
        old = opened.json("identifiers.json")
        known = opened.text("tokenizer.json") if "tokenizer.json" in opened else None
        if tokenizer is not None and known is not None and known != tokenizer.read_text("utf-8"):
            raise UserError(
                f"{key}={path} was trained with another tokenizer than {tokenizer}; build the "
                "corpus with the checkpoint's tokenizer.json"
            )
    match_identifiers(weights, old, identifiers)
    return weights, opened


def settle_bases(config: PretrainConfig, backend: Backend, saved: Mapping[str, Any]) -> None:
    """Replace run directories and links in the checkpoint options of loss terms by the checkpoint
    itself, so that a resumed run keeps its base.

    A collective. saved: the loss of the run to resume, {} for a new one. Its base is kept if it
    still exists in the directory given by the config.
    """
    terms = config.arch.loss.options.get("terms") or {}
    before = gather_terms(saved).get("terms") or {}

    def find(key: str, named: str, old: str | None) -> str:
        path = Path(named)
        if old is not None and Path(old).is_dir():
            began, place = Path(old).resolve(), path.parent if path.is_symlink() else path
            if path.resolve() == began or place.resolve() == began.parent:
                return old
        if not path.is_dir() and not config.eval_only:  # evaluation does not use it
            raise UserError(f"{key}={path} is not a folder; {missing_advice(path)}")
        try:
            path = checkpoint_in(path)
        except UserError as error:
            raise UserError(f"{key}={named}: {error}") from None
        return str(path.resolve())

    for name, option in checkpoint_options(config.arch.loss.options):
        key, old = f"arch.loss.terms.{name}.{option}", (before.get(name) or {}).get(option)
        terms[name][option] = backend.from_main(partial(find, key, terms[name][option], old))


def base_loader(data: Data, backend: Backend) -> LoadBase:
    """Return the function that loads base models for loss terms, for the corpora of a run."""

    def load_base(key: str, path: str, which: str) -> ACTLossHead:
        weights, opened = fitting_weights(key, path, which, data.train.identifiers, data.tokenizer)
        assert opened is not None  # settle_bases checked that it is a directory
        head = build_base(opened, data.train.metadata, backend)
        try:
            load_into(head.model, weights, opened)
        except UserError as error:
            raise UserError(f"{key}={path} does not fit the corpora: {error}") from None
        cast_weights(head)
        head.model.inner.choose_attention(backend)
        return head.to(backend.device)

    return load_base


def build_base(
    opened: Checkpoint,
    metadata: DatasetMetadata,
    backend: Backend | None = None,
    *,
    device: str = "cpu",
) -> ACTLossHead:
    """Build the model of a checkpoint as a base for corpora with `metadata`, without loading its
    weights.
    """
    saved = saved_arch(opened)
    head, _ = build_model(
        opened,
        refinement=0,
        forward_dtype=None if backend is None else usable_dtype(saved, backend),
        device=device,
        metadata=metadata,
    )
    return head


def usable_dtype(arch: dict[str, Any], backend: Backend) -> str:
    """Return the forward dtype of these options, or its replacement on this device."""
    fields = load_class(arch["name"]).Config.model_fields  # type: ignore[attr-defined]
    return backend.usable_dtype(arch.get("forward_dtype", fields["forward_dtype"].default))


def fix_depth(arch: dict[str, Any], steps: int | None, refinement: int | None) -> dict[str, Any]:
    """Return `Architecture.fix_depth` for the options of an architecture, which include its
    name.
    """
    return load_class(arch["name"]).fix_depth(arch, steps, refinement)  # type: ignore[attr-defined]
