"""Checkpoints outlive the code: keys that came, went or changed since a run was saved."""

import subprocess
import sys
from types import ModuleType

import pydantic
import pytest
import yaml
from training_tools import TINY, altered, finish, start

from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from models.recursive_reasoning.athena_trm import AthenaTRM
from utils.checkpoint.format import checkpoints_of
from utils.config.load import compose_config, load_config
from utils.config.saved import changed_keys, dump_config, read_arch
from utils.config.schema import PLACEHOLDERS, PretrainConfig
from utils.core.functions import load_class


def saved_config(run) -> dict:
    return yaml.safe_load((checkpoints_of(run)[-1] / "config.yaml").read_text("utf-8"))


def test_a_saved_architecture_has_every_default(text_run):
    """So that a later version, with other defaults, builds the same model."""
    saved = saved_config(text_run)["arch"]
    for options in (saved, saved["loss"]):
        declared = set(load_class(options["name"]).Config.model_fields) - PLACEHOLDERS.keys()
        assert declared <= options.keys()


def test_every_key_says_what_may_be_resumed():
    for name, field in PretrainConfig.model_fields.items():
        extra = field.json_schema_extra or {}
        assert extra.get("on_resume") in (None, "any", "fixed"), name


@pytest.fixture
def config():
    return load_config(compose_config([*TINY, "data_paths=[x]"]))


def test_a_key_that_a_run_did_not_have_counts_as_its_default(config):
    saved = dump_config(config)
    for key in ("grad_clip_norm", "puzzle_emb_weight_decay", "slow_step_factor"):
        del saved[key]
    del saved["arch"]["rope_theta"], saved["arch"]["loss"]["terms"]["halting"]["plateau_threshold"]
    assert changed_keys(config, saved) == ({}, [])
    other = config.model_copy(update={"grad_clip_norm": 0.25})
    assert changed_keys(other, saved) == ({"grad_clip_norm": (1.0, 0.25)}, [])


def test_an_empty_mapping_and_none_are_no_change(config):
    saved = dump_config(config)
    assert saved["domain_weights"] is None
    assert changed_keys(config, saved | {"domain_weights": {}}) == ({}, [])


def test_a_key_that_is_gone_is_named_and_nothing_else_changes(config):
    saved = dump_config(config) | {"warp": 9}
    saved["arch"] |= {"flux": 1}
    saved["arch"]["loss"] |= {"spin": 2}
    assert changed_keys(config, saved) == ({}, ["warp", "arch.flux", "arch.loss.spin"])
    arch, gone = read_arch(saved["arch"])
    assert gone == ["arch.flux", "arch.loss.spin"]
    assert {"flux", "spin"}.isdisjoint(arch.options | arch.loss.options)


def test_layers_that_a_run_left_to_its_cycles_stay_their_number(config, text_run, tmp_path):
    """L_layers=null meant L_cycles: such a run loads for use, and is resumed."""
    saved = dump_config(config)
    saved["arch"]["L_layers"] = None
    assert changed_keys(config, saved) == ({}, [])
    assert read_arch(saved["arch"] | {"L_cycles": 3})[0].options["L_layers"] == 3
    run = altered(text_run, tmp_path / "before", arch={"L_layers": None})
    assert len(load_language_model(run).model.inner.L_level.layers) == 2


def test_an_option_may_count_as_another_value_in_runs_without_it(monkeypatch):
    """A default that is changed, or a new option whose default is not what the code used to do."""

    class Odd:
        class Config(pydantic.BaseModel):
            width: int = 4
            warmth: float = pydantic.Field(2.0, json_schema_extra={"absent": 1.0})

    module = ModuleType("models.odd")
    Odd.__module__, module.Odd = module.__name__, Odd
    monkeypatch.setitem(sys.modules, "models.odd", module)
    loss = {"name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy"}
    arch, _ = read_arch({"name": "odd@Odd", "loss": loss})
    assert arch.options == {"width": 4, "warmth": 1.0}
    arch, _ = read_arch({"name": "odd@Odd", "warmth": 3.0, "loss": loss})
    assert arch.options == {"width": 4, "warmth": 3.0}


@pytest.fixture
def later(text_run, tmp_path):
    """The run as a version would find it that has neither its optimizer nor some of its options."""
    saved = saved_config(text_run)["arch"]
    arch = saved | {"flux": 1, "loss": saved["loss"] | {"spin": 2}}
    del arch["rms_norm_eps"]
    return altered(
        text_run, tmp_path / "later", arch=arch, optimizer="gone", lr="fast", warp=9, feed=[]
    )


def test_a_model_is_used_whatever_became_of_its_training_config(text_run, later):
    before = load_language_model(text_run)
    with pytest.warns(UserWarning, match=r"arch\.flux, arch\.loss\.spin"):
        after = load_language_model(later)

    def scores(model: LanguageModel):
        return model.score([(model.encode("ab c"), model.encode(" de f"))])

    assert scores(after) == scores(before)


@pytest.mark.slow
def test_a_later_version_evaluates_and_fine_tunes(later, text_corpus, tmp_path):
    code, out, err = finish(start("eval_only=true", f"load_checkpoint={later}", "device_type=cpu",
                                  f"checkpoint_path={tmp_path / 'evaluated'}"))  # fmt: skip
    assert code == 0, out + err
    assert "arch.flux" in out and "eval/all/lm_loss" in out
    code, out, err = finish(
        start(*(key for key in TINY if not key.startswith("arch")), f"load_checkpoint={later}",
              f"data_paths=[{text_corpus}]", "max_steps=2", f"checkpoint_path={tmp_path / 'tuned'}")
    )  # fmt: skip
    assert code == 0, out + err
    assert saved_config(tmp_path / "tuned")["arch"]["hidden_size"] == 32
    code, out, err = finish(start(f"checkpoint={later}", f"output={tmp_path / 'exported'}",
                                  script="scripts/export_hf.py"))  # fmt: skip
    assert code == 0, out + err
    assert "gone" in (tmp_path / "exported" / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_source_of_a_checkpoint_is_whole(text_run):
    """The model's own modules and all that these import of the project, as packages."""
    source = checkpoints_of(text_run)[-1] / "source"
    name = f"{AthenaTRM.__module__}, {AthenaTRM.__name__}".replace(", ", "@")
    module, _, cls = name.partition("@")
    code = f"import {module} as m, models.losses; print(m.{cls}.Config.__name__, m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, encoding="utf-8",
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"AthenaTRMConfig {source}" in done.stdout
