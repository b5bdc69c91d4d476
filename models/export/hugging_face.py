"""A folder that `transformers` loads: weights, config, tokenizer, model card, and the source."""

import json
import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml
from torch import Tensor

from models import cost
from models.export.source import MODEL, remote_code
from models.inference.language_model import LanguageModel
from utils.core.errors import UserError

_FILE = MODEL.rpartition(".")[2]


def write_folder(model: LanguageModel, folder: Path, dtype: torch.dtype, weights: str) -> None:
    """Write a model that was loaded with its weights as they are (`cast=False`), in `dtype`.

    folder: made here; it must not exist. weights: what these are, for the card.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(
            "exporting needs the package safetensors: pip install -r requirements-export.txt"
        ) from None
    texts = remote_code(type(model.model))
    texts["config.json"] = _json(config_of(model, dtype))
    texts["generation_config.json"] = _json(generation_config(model))
    texts["tokenizer.json"] = _json(tokenizer_of(model))
    texts["tokenizer_config.json"] = _json(tokenizer_config(model))
    texts["README.md"] = card(model, dtype, weights)
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    tensors = folder / "model.safetensors"
    try:
        save_file(_tensors(model, dtype), tensors, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a write that failed
        raise OSError(f"model.safetensors: {error}") from error
    shutil.copymode(folder / "config.json", tensors)  # it is made for its owner alone


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _tensors(model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors by Athena's names, which are TRM's; a tied output head is none of its own."""
    return {
        name: value.to(dtype).contiguous()
        for name, value in model.model.state_dict().items()
        if not name.startswith("inner.reasoning_head.")
    }


def config_of(model: LanguageModel, dtype: torch.dtype) -> dict[str, Any]:
    arch = model.config.model_dump(mode="json")
    del arch["forward_dtype"]  # that of the weights, as everywhere in transformers
    # for training alone
    arch |= {"batch_size": 1, "use_gradient_checkpointing": False}
    if "enable_reasoning_stream" in arch:
        arch["enable_reasoning_stream"] = False
    return {
        "model_type": "athena",
        "architectures": ["AthenaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_athena.AthenaConfig",
            "AutoModelForCausalLM": f"{_FILE}.AthenaForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "arch": arch,
        "loss_type": model.head.config.loss_type,
        "steps": model.steps,
        "identifiers": model.identifiers,
        "default_identifier": model.identifier,
        "tie_word_embeddings": model.config.tie_embeddings,
    }


def generation_config(model: LanguageModel) -> dict[str, Any]:
    opening = model.opening()
    return {
        "eos_token_id": model.eos_id,
        "pad_token_id": model.metadata.pad_id,
        # what generation without a prompt begins with
        "bos_token_id": opening[0] if len(opening) == 1 else None,
        "suppress_tokens": model.never_written(),
    }


def tokenizer_of(model: LanguageModel) -> dict[str, Any]:
    """Return the tokenizer as the corpus was built: it adds no special token to a text."""
    description = orjson.loads(model.tokenizer.tokenizer.to_str())
    if len(model.tokenizer.tokenizer.encode("a").ids) != len(model.encode("a")):
        description["post_processor"] = None
    return description


def tokenizer_config(model: LanguageModel) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": model.tokenizer.eos_token,
        "pad_token": model.tokenizer.pad_token,
        "model_max_length": model.window,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells one is text, as in the corpus
        "model_input_names": ["input_ids", "attention_mask"],
    }


def card(model: LanguageModel, dtype: torch.dtype, weights: str) -> str:
    """README.md of the folder."""
    opened = model.checkpoint
    assert opened is not None
    run = yaml.safe_load(opened.text("config.yaml"))
    counted = cost.count_parameters(model.model)
    corpora = ", ".join(Path(path).name for path in run.get("data_paths", ()))
    domains = ", ".join(model.metadata.domains)
    trained = {
        "parameters": f"{counted.total:,}, of which {counted.core:,} are neither embeddings "
        "nor the output head",
        "architecture": run["arch"]["name"],
        "ACT steps of a token": model.steps,
        "window": f"{model.window} tokens",
        "vocabulary": f"{model.metadata.vocab_size} tokens",
        "corpora": corpora + (f" ({domains})" if domains else ""),
        "optimizer steps": _steps(opened.json("state.json")),
        "optimizer": _optimizer(run),
        "loss": run["arch"]["loss"]["loss_type"],
        "weights": f"{weights}, {str(dtype).removeprefix('torch.')}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in trained.items())
    names = [name for i, name in enumerate(model.identifiers) if model.config.puzzle_emb_ndim]
    identifiers = ""
    if names:
        identifiers = _IDENTIFIERS.format(
            names=", ".join(f"`{name}`" for name in names[:20]),
            default=model.identifiers[model.identifier],
        )
    megabytes = model.cache_bytes(1) / 1e6
    return _CARD.format(
        rows=rows, identifiers=identifiers, steps=model.steps, megabytes=f"{megabytes:,.1f}"
    )


def _optimizer(run: dict[str, Any]) -> str:
    """Return the optimizer and its settings, as far as the config of the run has them."""
    settings = {
        "learning rate": "lr", "decay": "weight_decay", "beta1": "beta1", "beta2": "beta2",
    }  # fmt: skip
    known = [f"{name} {run[key]}" for name, key in settings.items() if key in run]
    return ", ".join([str(run.get("optimizer", "unknown")), *known])


def _steps(state: dict[str, Any]) -> str:
    """Return the optimizer steps of a checkpoint and their rows, for a run whose global_batch_size
    changed as well: of the earlier steps it has their number and the sum of their rows."""
    stream, step = state["stream"], state["counters"]["step"]
    earlier, rows = stream.get("other_sizes", (0, 0))
    if not earlier:
        return f"{step:,} of {stream['global_batch_size']} rows"
    return (
        f"{step:,}: the first {earlier:,} of {rows / earlier:.4g} rows on average, the last "
        f"{step - earlier:,} of {stream['global_batch_size']} rows"
    )


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: unknown  # of the weights: name one before you publish them
---

# A recursive-reasoning language model

A language model that was pretrained with Athena. One small network is applied many times to two
latent streams before each prediction.

| | |
|---|---|
{rows}

## Use

It needs torch and transformers 5 (with pydantic), and runs the Python files of this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
texts = tokenizer(["Once", "Twice upon"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**texts, max_new_tokens=50)))

write = pipeline("text-generation", model=folder, trust_remote_code=True)
print(write("Once upon", max_new_tokens=50))
```

- `steps=N`, to `generate` and to the model itself: ACT steps of a token, {steps} if not given.
- Softmax of the logits gives the probabilities of the loss that the model was trained with.
- Keys and values are kept for every pass of the recursion: {megabytes} MB for a text of the whole
  window. `generate` ends where the window does; a longer prompt is an error.
- The tokenizer reads `<|eos|>` and its like in a text as the characters that they are, as in
  training; `split_special_tokens=False` changes that. It pads on the left.
- With `labels` the loss is the mean nats of each next token after the last step. That trains the
  weights further, but not as they were trained before.
{identifiers}
## Licence

Of the Python files: Apache-2.0. Of the weights: not yet chosen.
"""

_IDENTIFIERS = """- `puzzle_identifiers="name"` tells the kind of text: {names}; if not given,
  `{default}`.
"""
