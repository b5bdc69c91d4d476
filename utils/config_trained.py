"""Evaluating a checkpoint: what it was trained as need not be said again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from utils.checkpoint import checkpoint_in

# What an evaluation takes from the checkpoint, unless the command line says otherwise.
AS_TRAINED = (
    "arch", "data_paths", "data_paths_test", "min_iterations", "global_batch_size",
    "eval_batch_size", "evaluators", "feed", "seed",
)  # fmt: skip


def as_trained(cfg: DictConfig, overrides: Sequence[str] | None = None) -> DictConfig:
    """For `eval_only=true load_checkpoint=FOLDER`, the config with the checkpoint's own values of
    AS_TRAINED where no override names the key; else the config as it is.

    overrides: those of the command line; None asks Hydra. One that chooses a preset of whole keys
    (experiment=, debug=) is taken as the whole config.
    """
    path = cfg.get("load_checkpoint")
    if not cfg.get("eval_only") or not path or not Path(str(path)).is_dir():
        return cfg
    file = checkpoint_in(Path(str(path))) / "config.yaml"
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    named = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if not file.is_file() or named & {"experiment", "debug"}:
        return cfg
    trained = yaml.safe_load(file.read_text("utf-8"))
    now: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    for key in AS_TRAINED:
        if key not in named and key in trained:
            now[key] = trained[key]
    changed = OmegaConf.create(now)
    for name in named:
        if "." in name and name.partition(".")[0] in AS_TRAINED:
            OmegaConf.update(changed, name, OmegaConf.select(cfg, name), force_add=True)
    return changed
