"""Complete the config of a run with values from the checkpoint that it starts from."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from utils.checkpoint.format import MANIFEST, checkpoint_in, missing_advice
from utils.checkpoint.run_folder import folder_of
from utils.config.plugins import checkpoint_options, use_configured_plugins
from utils.config.saved import check_plugins_given, is_valid, read_arch
from utils.config.values import literal, readable
from utils.core.errors import UserError

# Keys that are taken from the checkpoint unless the command line gives them: by an evaluation, and
# by a run that starts from its weights or resumes it. They include the keys of `recipe` presets,
# because the default recipe does not suit every architecture.
AS_TRAINED = (
    "arch", "data_paths", "data_paths_test", "min_iterations", "global_batch_size",
    "eval_batch_size", "evaluators", "feed", "seed",
)  # fmt: skip
RECIPE = ("global_batch_size", "lr", "lr_warmup_steps", "feed", "weight_decay_all", "ema_warmup")
TRAINED_FURTHER = ("arch", *RECIPE)


def apply_trained_config(cfg: DictConfig, overrides: Sequence[str] | None = None) -> DictConfig:
    """Return the config with the checkpoint's values for all keys that no override sets, directly
    or through a preset.

    With `eval_only=true` these are the keys AS_TRAINED of `load_checkpoint`, otherwise those of
    TRAINED_FURTHER. A run that has its own checkpoints, or names one with `resume`, takes them from
    those.

    overrides: those of the command line; None asks Hydra. If one chooses a preset of whole configs
    (experiment=, debug=), nothing is taken.
    """
    use_configured_plugins(cfg)
    if (source := _source(cfg)) is None:
        return cfg
    file = source / "config.yaml"
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    # scripts pass overrides as written; Hydra's list has full names
    overrides = [re.sub(r"^([+~]*)loss\.", r"\1arch.loss.", override) for override in overrides]
    named = {re.split("[/=]", override.lstrip("+~"))[0] for override in overrides}
    if not file.is_file() or named & {"experiment", "debug"}:
        return cfg
    if named & {"arch", "recipe"}:
        named |= {*RECIPE}
    trained = yaml.safe_load(file.read_text("utf-8"))
    taken = [key for key in (AS_TRAINED if cfg.get("eval_only") else TRAINED_FURTHER)
             if key not in named and key in trained]  # fmt: skip
    check_plugins_given(
        {key: trained[key] for key in (*taken, "plugins") if key in trained}, source
    )
    now: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    for key in taken:
        if key == "arch":
            now[key] = _architecture(trained["arch"], source)
        elif is_valid(key, trained[key]):
            now[key] = trained[key]
        else:
            _warn(f"{source} was trained with {key}={trained[key]}, which no longer exists")
    changed = OmegaConf.create(literal(now))
    single = [o for o in overrides if re.match(rf"\+*({'|'.join(AS_TRAINED)})\.", o)]
    for override in OverridesParser.create().parse_overrides(list(map(readable, single))):
        name = override.key_or_group
        # Only the given keys of a dict: in cfg the others are those of the default preset.
        given = override.value() if isinstance(override.value(), dict) else None
        value = _value_at(cfg, name) if given is None else given
        OmegaConf.update(changed, name, value, merge=True, force_add=True)
    return changed


def _architecture(saved: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a checkpoint's architecture with the options of this version."""
    arch, gone = read_arch(saved)
    if gone:
        _warn(f"{source} was trained with {', '.join(gone)}, which no longer exists")
    values = arch.model_dump(mode="json")
    for term, _ in checkpoint_options(
        values["loss"]
    ):  # such as a base, which is not part of the model
        values["loss"]["terms"].pop(term, None)
    return values


def _warn(sentence: str) -> None:
    warnings.warn(f"{sentence}: it is ignored", stacklevel=2)


def _value_at(cfg: DictConfig, name: str) -> Any:
    """Return the plain value of a key, which OmegaConf can store."""
    value = OmegaConf.select(cfg, name)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    return literal(value)


def _source(cfg: DictConfig) -> Path | None:
    """Return the checkpoint that a run resumes, else the one whose weights it starts from."""
    load, resume, own = (
        os.path.expanduser(str(cfg.get(key) or ""))
        for key in ("load_checkpoint", "resume", "checkpoint_path")
    )
    resume = resume or "auto"
    if not (cfg.get("eval_only") or cfg.get("lr_find")) and (load or resume != "auto"):
        run = folder_of(own or None, cfg.get("project_name"), cfg.get("run_name"))
        places = [Path(resume), run and run / resume] if resume != "auto" else [run]
        for place in places:
            if place is not None and (found := checkpoint_in(place) / MANIFEST).is_file():
                return found.parent
    if load and not (path := Path(load)).exists():
        raise UserError(f"load_checkpoint={load} does not exist; {missing_advice(path)}")
    return checkpoint_in(path) if load and path.is_dir() else None
