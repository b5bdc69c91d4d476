"""Write a folder that `transformers` loads: weights, config, tokenizer, model card, and source."""

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
    """Write a model in `dtype`.

    It must have been loaded with `cast=False`. folder: created here; must not exist. weights:
    description of the weights for the model card.
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
    except SafetensorError as error:  # raised for a failed write
        raise OSError(f"model.safetensors: {error}") from error
    shutil.copymode(
        folder / "config.json", tensors
    )  # safetensors makes it readable by its owner only


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _tensors(model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors by Athena's names, which equal TRM's, without a tied output head."""
    return {
        name: value.to(dtype).contiguous()
        for name, value in model.model.state_dict().items()
        if not name.startswith("inner.reasoning_head.")
    }


def config_of(model: LanguageModel, dtype: torch.dtype) -> dict[str, Any]:
    arch = model.config.model_dump(mode="json")
    del arch["forward_dtype"]  # transformers computes in the dtype of the weights
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
        # the first token of generation without a prompt
        "bos_token_id": opening[0] if len(opening) == 1 else None,
        "suppress_tokens": model.never_written(),
    }


def tokenizer_of(model: LanguageModel) -> dict[str, Any]:
    """Return the tokenizer's settings, under which it adds no special tokens, as in the corpus."""
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
        "split_special_tokens": True,  # spelled-out special tokens are plain text, as in the corpus
        "model_input_names": ["input_ids", "attention_mask"],
    }


def card(model: LanguageModel, dtype: torch.dtype, weights: str) -> str:
    """Return the model card, the README.md of the folder."""
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
    """Describe the optimizer and its settings, as far as the run's config contains them."""
    settings = {
        "learning rate": "lr", "decay": "weight_decay", "beta1": "beta1", "beta2": "beta2",
    }  # fmt: skip
    known = [f"{name} {run[key]}" for name, key in settings.items() if key in run]
    return ", ".join([str(run.get("optimizer", "unknown")), *known])


def _steps(state: dict[str, Any]) -> str:
    """Describe the number of optimizer steps and of rows per step, also for a run whose
    global_batch_size changed: the checkpoint stores the number of earlier steps and the sum of
    their rows.
    """
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
license: unknown  # license of the weights: choose one before publishing them
---

# A recursive-reasoning language model

A language model that was pretrained with Athena. One small network is applied many times to two
latent streams before each prediction.

| | |
|---|---|
{rows}

## Use

Requires torch, transformers 5 and pydantic, and runs the Python files in this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
texts = tokenizer(["Once", "Twice upon"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**texts, max_new_tokens=50)))

write = pipeline("text-generation", model=folder, trust_remote_code=True)
print(write("Once upon", max_new_tokens=50))
```

- `steps=N`, for `generate` and for the model's forward pass: ACT steps per token (default {steps}).
- Softmax of the logits gives the probabilities of the loss that the model was trained with.
- Keys and values are kept for every pass of the recursion: {megabytes} MB for a text of the whole
  window. `generate` stops at the end of the window; a longer prompt is an error.
- The tokenizer treats `<|eos|>` and other special tokens in a text as plain characters, as in
  training, unless `split_special_tokens=False`. It pads on the left.
- With `labels` the loss is the mean nats per next token after the last step. You can fine-tune with
  it, but it is not the objective of pretraining.
{identifiers}
## Licence

The Python files: Apache-2.0. The weights: not yet chosen.
"""

_IDENTIFIERS = """- `puzzle_identifiers="name"` sets the kind of text, one of {names} (default
  `{default}`).
"""
