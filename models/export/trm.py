"""Write a weights file that TRM's own code can load."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.recursive_reasoning.athena_trm import AthenaTRM
from utils.checkpoint.writer import save_tensors
from utils.core.atomic import write_result
from utils.core.errors import UserError

# The options with which TRM's code computes the same results from the same weights.
_TRM = {
    "causal": False,
    "document_mask": False,
    "norm_type": "post",
    "tie_embeddings": False,
    "post_refinement_steps": 0,
}
_NAMED = (
    "hidden_size num_heads expansion L_layers H_cycles L_cycles mlp_t pos_encodings "
    "puzzle_emb_ndim puzzle_emb_len halt_max_steps forward_dtype"
).split()
_UNNAMED = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}  # TRM's presets leave them out


def write_file(model: nn.Module, file: Path) -> None:
    """Write weights in float32 and the initial states in the forward dtype, named as in the
    compiled loss head. Raises UserError if TRM has no such network."""
    config: Any = model.config
    _check(model)
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith("inner.reasoning_head."):
            dtype = config.dtype if name in ("inner.H_init", "inner.L_init") else torch.float32
            state[f"_orig_mod.model.{name}"] = value.to(dtype)
    with write_result(file, f"output={file}") as part:
        save_tensors(state, part)


def options(config: Any) -> str:
    """Return the command-line options that give the same network in TRM."""
    values = {name: getattr(config, name) for name in _NAMED}
    values["puzzle_emb_len"] = config.prefix_len
    said = [f"arch.{name}={value}" for name, value in values.items()]
    said += [
        f"+arch.{k}={getattr(config, k)}" for k, v in _UNNAMED.items() if getattr(config, k) != v
    ]
    return " ".join(["arch=trm", *said])


def _check(model: nn.Module) -> None:
    if type(model) is not AthenaTRM:
        raise UserError(
            f"format=trm: TRM's code has no {type(model).__name__}; only a model with arch=trm "
            "can be exported to TRM"
        )
    config: Any = model.config
    wanted = _TRM | {"num_key_value_heads": config.num_heads}
    found = config.model_dump() | {"num_key_value_heads": config.key_value_heads}
    clashes = [f"arch.{k}={found[k]} (TRM: {v})" for k, v in wanted.items() if found[k] != v]
    if clashes:
        raise UserError(
            f"format=trm: TRM's code computes other results from these weights, because of "
            f"{', '.join(clashes)}; only models trained with arch=trm can be exported"
        )
