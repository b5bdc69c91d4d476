"""The configuration as users meet it: the real presets, the real command line, real mistakes."""

import copy
import functools
import re
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from utils.config.load import (
    PretrainConfig,
    compose_config,
    config_warnings,
    load_config,
)
from utils.core.errors import UserError
from utils.core.functions import load_class

ROOT = Path(__file__).resolve().parents[3]
DATA = "data_paths=[data/x]"
PRESETS = {
    group: sorted(path.stem for path in (ROOT / "config" / group).glob("*.yaml"))
    for group in ("arch", "device", "debug", "experiment", "recipe")
}


_GRAMMAR = OverridesParser.create()


@functools.cache
def composed(*presets: str) -> DictConfig:
    return compose_config([DATA, *presets])


def load(*overrides: str, world_size: int = 1) -> PretrainConfig:
    """Return the config of these overrides, of athena_trm_large where they name no architecture.

    Composing takes Hydra 0.1 s, so presets are kept.
    """
    presets = [o for o in overrides if o.lstrip("+").partition("=")[0] in PRESETS]
    named = any(preset.lstrip("+").startswith(("arch=", "experiment=")) for preset in presets)
    cfg = copy.deepcopy(composed(*([] if named else ["arch=athena_trm_large"]), *presets))
    for parsed in _GRAMMAR.parse_overrides([o for o in overrides if o not in presets]):
        OmegaConf.update(cfg, parsed.key_or_group, parsed.value(), merge=True, force_add=True)
    return load_config(cfg, world_size)


def complaint(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as error:
        load(*overrides, world_size=world_size)
    return str(error.value)


# --- presets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset", [f"{group}={name}" for group, names in PRESETS.items() for name in names]
)
def test_every_preset_is_a_valid_config(preset):
    config = load(preset)
    assert config.data_paths == ["data/x"]


def test_large_preset_has_the_published_values():
    arch = load("arch=athena_trm_large").arch.options
    published = dict(
        hidden_size=2304, num_heads=36, expansion=4.5, H_cycles=7, L_cycles=5, L_layers=5,
        halt_max_steps=48, halt_exploration_prob=0.08, force_min_steps=4, no_ACT_continue=True,
        forward_dtype="bfloat16", reasoning_seq_len=96, reasoning_vocab_size=32000,
        enable_reasoning_stream="auto", post_refinement_steps=4, puzzle_emb_ndim=1024,
        eval_halting="max",
    )  # fmt: skip
    assert {key: arch[key] for key in published} == published


@pytest.mark.parametrize("name", [n for n in PRESETS["arch"] if n.startswith(("athena", "trans"))])
def test_text_presets_never_see_the_next_token_or_another_document(name):
    config = load(f"arch={name}")
    assert config.arch.causal is True and config.arch.document_mask is True
    assert config.feed == "consume"


def test_text_presets_do_not_wait_for_an_exact_row():
    assert load("arch=athena_trm_small").arch.loss.terms["halting"]["target"] == "budget"


def test_trm_preset_is_trm():
    config = load("arch=trm")
    arch = config.arch.options
    expected = dict(
        hidden_size=512, num_heads=8, num_key_value_heads=8, expansion=4, H_cycles=3, L_cycles=6,
        L_layers=2, halt_max_steps=16, halt_exploration_prob=0.1, causal=False,
        document_mask=False, puzzle_emb_ndim=512, puzzle_emb_len=16, force_min_steps=0,
        post_refinement_steps=0,
    )  # fmt: skip
    assert {key: arch[key] for key in expected} == expected
    assert config.arch.loss.options == {
        "loss_type": "stablemax_cross_entropy",
        "terms": {"halting": {"target": "exact"}},
    }
    assert (config.feed, config.weight_decay_all, config.ema_warmup) == ("present", True, False)
    # what the preset sets the command line still changes
    changed = load("arch=trm", "feed=consume", "arch.num_heads=4")
    assert changed.feed == "consume" and changed.arch.num_key_value_heads == 4


def test_a_command_written_for_trm():
    config = load(
        "arch=trm", "evaluators=[]", "epochs=50000", "eval_interval=5000", "lr=1e-4",
        "puzzle_emb_lr=1e-4", "weight_decay=1.0", "puzzle_emb_weight_decay=1.0",
        "arch.mlp_t=True", "arch.pos_encodings=none", "arch.L_layers=2", "arch.H_cycles=3",
        "arch.L_cycles=6", "+run_name=pretrain_mlp_t_sudoku", "ema=True",
    )  # fmt: skip
    assert config.arch.mlp_t is True and config.arch.pos_encodings == "none"


def test_every_key_is_composed_and_explained():
    assert set(composed()) == set(PretrainConfig.model_fields)
    assert all(field.description for field in PretrainConfig.model_fields.values())


def test_defaults_are_the_documented_ones():
    config = load()
    documented = dict(
        global_batch_size=768, epochs=1, lr=8e-5, lr_min_ratio=0.1, lr_warmup_steps=4000,
        beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip_norm=1.0, puzzle_emb_lr=2e-4,
        puzzle_emb_weight_decay=0.1, seed=0, ema=True, ema_rate=0.9995, device_type="auto",
        eval_save_outputs=[], resume="auto", feed="consume", weight_decay_all=False,
    )  # fmt: skip
    assert {key: getattr(config, key) for key in documented} == documented


def test_text_is_evaluated_by_default_with_its_options_checked():
    assert [e.name for e in load().evaluators] == ["text@PerplexityEvaluator"]
    line = complaint("evaluators=[{name: text@PerplexityEvaluator, prefx: held_out}]")
    assert line == "unknown key 'evaluators[0].prefx': did you mean 'evaluators[0].prefix'?"


# --- what is accepted -------------------------------------------------------------------------


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_plus_signs_make_no_difference(plus):
    overrides = ["run_name=x", "lr=1e-3", "arch.H_cycles=2", "arch=trm", "data_paths=[a]"]
    config = load_config(compose_config([plus + override for override in overrides]))
    assert (config.run_name, config.lr, config.arch.H_cycles) == ("x", 1e-3, 2)
    assert config.arch.L_cycles == 6


def test_numbers_in_the_forms_that_yaml_gives_them():
    raw = OmegaConf.to_container(compose_config([DATA]), resolve=True)
    raw.update(lr="1e-3", weight_decay=0, max_steps=1e4, run_name=7)
    raw["arch"].update(rms_norm_eps="1e-6", halt_max_steps=16.0)
    config = load_config(raw)
    assert (config.lr, config.weight_decay, config.max_steps, config.run_name) == (
        1e-3,
        0.0,
        10000,
        "7",
    )
    assert type(config.max_steps) is int and type(config.weight_decay) is float


def test_a_config_survives_its_own_dump():
    config = load("arch=trm", "early_stopping={metric: x, patience: 2}", "eval_interval=0.5")
    assert load_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ([], None),
        (["micro_batch_size=null"], 384),
        (["grad_accum_steps=4"], 96),
        (["micro_batch_size=48"], 48),
        (["micro_batch_size=48", "grad_accum_steps=8"], 48),
    ],
)
def test_rows_of_a_micro_batch(overrides, rows):
    assert load(*overrides, world_size=2).micro_rows(2) == rows


def test_evaluators_in_both_forms(evaluator):
    short, long = load(f"evaluators=[{evaluator}]"), load(f"evaluators=[{{name: {evaluator}}}]")
    assert short.evaluators == long.evaluators and short.evaluators[0].name == evaluator
    assert load(f"evaluators=[{{name: {evaluator}, depth: 3}}]").evaluators[0].options == {
        "depth": 3
    }
    line = complaint(f"evaluators=[{{name: {evaluator}, dpth: 3}}]")
    assert line == "unknown key 'evaluators[0].dpth': did you mean 'evaluators[0].depth'?"
    assert "write evaluators=[" in complaint(f"evaluators={evaluator}")


@pytest.fixture
def evaluator(tmp_path, monkeypatch):
    """An evaluator plug-in in a file of its own, found below `evaluators.`."""
    import evaluators

    (tmp_path / "plugin_for_test.py").write_text(
        "class Plugin:\n    begin_eval = result = None\n"
        "    def __init__(self, data_path, eval_metadata, depth=1): pass\n",
        "utf-8",
    )
    monkeypatch.setattr(evaluators, "__path__", [*evaluators.__path__, str(tmp_path)])
    yield "plugin_for_test@Plugin"
    sys.modules.pop("evaluators.plugin_for_test", None)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lrr=1", "'lr'"),
        ("learning_rate=1", "'lr'"),
        ("arch.hiden_size=3", "'arch.hidden_size'"),
        ("hidden_size=3", "'arch.hidden_size'"),
        ("arch.lr=3", "'lr'"),
        ("arch.loss.loss_tpe=x", "'arch.loss.loss_type'"),
        ("loss_type=x", "'arch.loss.loss_type'"),
        ("archh=trm", "'arch'"),
        ("early_stopping={metric: x, patence: 3}", "'early_stopping.patience'"),
        ("+arch.loss.terms.halting.taget=exact", "'arch.loss.terms.halting.target'"),
    ],
)
def test_unknown_keys_name_the_nearest_valid_one(override, meant):
    key = override.lstrip("+").partition("=")[0]
    line = complaint(override, "eval_interval=1")
    assert line.startswith(f"unknown key '{key}") and line.endswith(f"did you mean {meant}?")


def test_an_unknown_option_of_a_plugin_is_answered_with_its_own(tmp_path):
    (tmp_path / "p_norm.py").write_text(
        "from models.recursive_reasoning.athena_trm import AthenaTRM, AthenaTRMConfig\n"
        "class Config(AthenaTRMConfig):\n    p: float = 2.0\n    both: bool = True\n"
        "class Recursive(AthenaTRM):\n    Config = Config\n",
        "utf-8",
    )
    given = [f"plugins=[{tmp_path}]", "arch.name=p_norm@Recursive"]
    line = complaint(*given, "arch.q=1.5")
    assert "arch.q" in line and "arch.p, arch.both" in line and "--help" in line


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("lr=abc", ["lr", "a number", "'abc'"]),
        ("lr=nan", ["lr", "finite", "nan"]),
        ("lr=-1", ["lr", "at least 0", "-1"]),
        ("beta1=1.0", ["beta1", "less than 1", "1.0"]),
        ("lr_min_ratio=2", ["lr_min_ratio", "at most 1", "2"]),
        ("seed=true", ["seed", "a whole number", "true"]),
        ("epochs=0", ["epochs", "greater than 0"]),
        ("max_steps=1.5", ["max_steps", "a whole number or null", "1.5"]),
        ("ema=1", ["ema", "true or false", "1"]),
        ("optimizer=adam", ["optimizer", "adam_atan2, adamw, muon", "did you mean 'adamw'?"]),
        ("feed=consumed", ["feed", "did you mean 'consume'?"]),
        (
            "device_type=gpu",
            ["device_type", "auto, cuda, xla, tpu, mps, cpu", "'gpu'; did you mean 'cuda'"],
        ),
        ("micro_batch_size=most", ["micro_batch_size", "a whole number or auto or null"]),
        ("data_paths=data/x", ["data_paths", "a list", "write data_paths=[data/x]"]),
        ("fast=swiglu", ["fast", "write fast=[swiglu]"]),
        ("fast=swigl", ["fast", "attention, loss", "did you mean fast=[swiglu]"]),
        ("logger=[wandb,tensorbord]", ["logger[1]", "did you mean 'tensorboard'?"]),
        ("domain_weights={web: -1}", ["domain_weights.web", "at least 0", "-1"]),
        ("arch.causal=5", ["arch.causal", "true or false", "5"]),
        ("arch.num_heads='36'", ["arch.num_heads", "a whole number", "'36'"]),
        ("arch.L_layers=true", ["arch.L_layers", "a whole number", "true"]),
        ("arch.eval_halting=maxx", ["arch.eval_halting", "did you mean 'max'?"]),
        ("arch.loss=softmax", ["arch.loss", "'softmax'"]),
        ("arch.loss.loss_type=softmax", ["loss_type", "softmax_cross_entropy"]),
    ],
)
def test_wrong_values_are_named_with_what_is_expected(override, needed):
    line = complaint(override)
    assert "\n" not in line
    assert all(part in line for part in needed), line


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["global_batch_size=770"], ["global_batch_size 770", "4 rank(s)", "768 or 772"]),
        (["global_batch_size=2"], ["global_batch_size 2", "use 4"]),
        (["grad_accum_steps=5"], ["grad_accum_steps 5", "760 or 780"]),
        (["micro_batch_size=50"], ["micro_batch_size 50", "600 or 800"]),
        (
            ["micro_batch_size=48", "grad_accum_steps=2"],
            ["micro_batch_size 48", "4 micro-batches", "grad_accum_steps is 2"],
        ),
        (["eval_batch_size=6"], ["eval_batch_size 6", "4 or 8"]),
        (["eval_interval=2"], ["eval_interval 2", "epochs 1"]),
        (["min_eval_interval=2"], ["min_eval_interval 2", "epochs 1"]),
        (["epochs=null"], ["epochs", "max_steps", "max_seconds"]),
        (["data_paths=[]"], ["data_paths is empty"]),
        (["data_paths=[a,b,a]"], ["data_paths", "'a' twice"]),
        (["data_paths=[a,b,./a/]"], ["data_paths", "'./a/' twice", "'a'"]),
        (["load_checkpoint="], ["load_checkpoint", "empty"]),
        (["checkpoint_path=' '"], ["checkpoint_path", "empty"]),
        (["seed=18446744073709551616"], ["seed", "18446744073709551616"]),
        (["data_paths=[]", "dry_run=true", "seq_len=8"], ["dry_run", "vocab_size"]),
        (["parallel=fsdp", "device_type=tpu"], ["parallel=fsdp", "device_type=tpu"]),
        (["resume=/a", "load_checkpoint=/b"], ["resume='/a'", "load_checkpoint='/b'"]),
        (["eval_only=true"], ["eval_only", "load_checkpoint"]),
        (["eval_only=true", "resume=none", "run_name=x"], ["eval_only", "load_checkpoint"]),
        (["early_stopping={metric: x}"], ["early_stopping", "eval_interval"]),
        (["run_name=a/b"], ["run_name='a/b'"]),
        (["run_name=.."], ["run_name='..'"]),
        (["resume_allow=[lrr]"], ["'lrr'", "'lr'"]),
        (
            ["freeze_weights=true", "arch.puzzle_emb_ndim=0"],
            ["freeze_weights", "arch.puzzle_emb_ndim is 0"],
        ),
        (["arch.force_min_steps=100"], ["force_min_steps", "100", "halt_max_steps", "48"]),
        (["arch.num_heads=7"], ["hidden_size", "2304", "num_heads", "7"]),
        (["arch.vocab_size=5"], ["arch.vocab_size", "set by the data"]),
    ],
)
def test_clashes_name_both_values(overrides, needed):
    line = complaint(*overrides, world_size=4)
    assert "\n" not in line
    assert all(part in line for part in needed), line


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval_only=true", "run_name=x"],
        ["eval_only=true", "resume=/some/step_5"],
        ["eval_only=true", "load_checkpoint=/some/step_5", "epochs=null"],
        ["data_paths=[]", "dry_run=true", "seq_len=8", "vocab_size=9"],
        ["resume=auto", "load_checkpoint=/b"],
        ["resume=null"],
        ["epochs=null", "max_seconds=60"],
        ["early_stopping={metric: x}", "eval_interval=0.5"],
        ["resume_allow=[lr,arch.halt_max_steps]"],
    ],
)
def test_values_that_do_not_clash(overrides):
    load(*overrides, world_size=4)


def test_all_problems_are_listed_at_once():
    text = complaint(
        "lrr=1", "arch.hiden_size=3", "arch.loss.foo=1", "beta2=x", "eval_interval=3",
        "arch.num_heads=7", "arch.force_min_steps=100", "arch.causal=5",
    )  # fmt: skip
    parts = (
        "8 problems", "'lrr'", "'arch.hiden_size'", "'arch.loss.foo'", "beta2: expected",
        "eval_interval 3", "num_heads=7", "force_min_steps=100", "arch.causal",
    )  # fmt: skip
    for part in parts:
        assert part in text
    assert len(text.splitlines()) == 9


def test_no_complaint_about_a_value_that_the_user_did_not_give():
    """epochs is wrong; the default that stands in for it must not clash with eval_interval."""
    assert complaint("epochs=many", "eval_interval=5") == (
        "epochs: expected a number or null, got 'many'"
    )


def test_missing_and_broken_values_of_own_configs():
    with pytest.raises(UserError, match=r"arch is missing.*arch=athena_trm_"):
        load_config({"data_paths": ["x"]})
    cfg = compose_config([DATA])
    cfg.lr = "???"
    with pytest.raises(UserError, match=r"lr has no value yet"):
        load_config(cfg)
    cfg.lr = "${nowhere}"
    with pytest.raises(UserError, match=r"lr refers to a key.*nowhere"):
        load_config(cfg)


def test_rare_values_are_warned_about():
    assert config_warnings(load()) == []
    (line,) = config_warnings(load("max_steps=100"))
    assert "lr_warmup_steps 4000" in line and "max_steps 100" in line
    assert config_warnings(load("checkpoint_interval=null", "checkpoint_every_eval=false"))


def test_plugins_come_from_the_command_line_alone(tmp_path):
    """A preset from somebody else chooses no code."""
    (tmp_path / "experiment").mkdir()
    preset = tmp_path / "experiment" / "theirs.yaml"
    preset.write_text(f"# @package _global_\nplugins: ['{tmp_path}']\n", "utf-8")
    given = ["--config-dir", str(tmp_path), "experiment=theirs"]
    with pytest.raises(UserError, match=r"plugins=.*command line"):
        compose_config(given)
    assert load_config(
        compose_config([*given, f"plugins={tmp_path}", "data_paths=[x]"])
    ).plugins == [str(tmp_path)]
    with pytest.raises(UserError, match=r"plugins=.*nowhere"):
        load_config(compose_config([f"plugins=[{tmp_path / 'nowhere'}]", "data_paths=[x]"]))
    with pytest.raises(UserError, match="nowhere is not a directory"):
        compose_config(["--config-dir", str(tmp_path / "nowhere")])


# --- look-up of classes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identifier", "advice"),
    [
        (
            "recursive_reasoning.athena_tr@AthenaTRM",
            "did you mean 'recursive_reasoning.athena_trm'",
        ),
        ("athena_trm@AthenaTRM", "did you mean 'recursive_reasoning.athena_trm'"),
        ("recursive_reasoning.athena_trm@AthenaTrm", "did you mean 'AthenaTRM'"),
        ("AthenaTRM", "did you mean 'recursive_reasoning.athena_trm@AthenaTRM'"),
        ("losses.ACTLossHead", "did you mean 'losses@ACTLossHead'"),
        ("losses@math", "no class 'math'"),
        ("../os@system", "not of the form module@Class"),
    ],
)
def test_a_class_that_does_not_exist(identifier, advice):
    with pytest.raises(UserError, match="^[^\n]*" + re.escape(advice)):
        load_class(identifier, "models.")


def test_a_class_is_found_by_module_and_name():
    cls = load_class("losses@ACTLossHead")
    assert cls is load_class("losses@ACTLossHead", "models.") and cls.__name__ == "ACTLossHead"


def test_a_missing_package_is_named_and_a_bug_is_not_hidden(tmp_path, monkeypatch):
    import evaluators

    (tmp_path / "needs.py").write_text("import surely_not_installed\n", "utf-8")
    (tmp_path / "buggy.py").write_text("import models.surely_not_there\n", "utf-8")
    monkeypatch.setattr(evaluators, "__path__", [*evaluators.__path__, str(tmp_path)])
    with pytest.raises(UserError, match="'surely_not_installed', which is not installed"):
        load_class("needs@X", "evaluators.")
    with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
        load_class("buggy@X", "evaluators.")


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.terms.halting=null", "loss.halt_target=budget"],
        ["loss.terms.label_smoothing.weight=0.3", "loss.label_smoothing=0"],
    ],
)
def test_older_keys_of_the_loss_that_clash_with_its_terms_are_refused(overrides):
    with pytest.raises(UserError, match=r"arch\.loss\.terms\.\w+=.* clashes"):
        load_config(compose_config([*overrides, "data_paths=[x]"]))


def test_a_term_s_options_are_checked():
    with pytest.raises(UserError, match=r"z_loss\.weight must be at least 0.*, got -1"):
        load_config(compose_config(["loss.terms.z_loss.weight=-1", "data_paths=[x]"]))
    with pytest.raises(UserError, match=r"arch\.loss\.terms"):
        load_config(compose_config(["arch.loss.terms=7", "data_paths=[x]"]))
