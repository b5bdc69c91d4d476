"""An architecture that only its author knows: one file and a preset, outside the project.

Its latents, its weights and its options have names that nothing else has, so that whatever reads a
name of AthenaTRM's instead of the contract of `models/base.py` fails here.
"""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import ROOT, altered, contents, finish, start

from models.inference.loading import build_model, load_language_model
from pretrain import train
from scripts import estimate, export_hf, generate
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.checkpoint.run_config import apply_trained_config
from utils.config.load import compose_config, load_config
from utils.core.errors import UserError
from utils.core.plugins import use_plugins

SOURCE = '''
"""A tide that rises twice, and spray that follows it."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from models.backbone import Backbone, BackboneConfig
from models.base import Architecture
from models.layers import CastedLinear

from .salt import bitter


class TideConfig(BackboneConfig):
    num_layers: int = Field(1, ge=1)
    swells: int = Field(2, ge=1)


class Sea(Backbone):
    def __init__(self, config):
        super().__init__(config)
        self.shoals = nn.ModuleList(self.make_block() for _ in range(config.num_layers))
        self.mist = CastedLinear(config.hidden_size, config.hidden_size)
        for name in ("dawn", "dusk"):
            self.register_buffer(name, torch.randn(config.hidden_size))

    def swell(self, z, x, info):
        tide, spray = z["tide"], z["spray-2"]
        for shoal in self.shoals:
            tide = shoal(tide + x + bitter(self.mist(spray)), info)
        return {"tide": tide, "spray-2": spray + tide}

    def answer(self, x, info, steps):
        z = {"tide": self.dawn.to(x.dtype).expand_as(x)}
        z["spray-2"] = self.dusk.to(x.dtype).expand_as(x)
        for _ in range(steps):
            z = self.swell(z, x, info)
        return z["tide"]


class Tide(Architecture):
    Config = TideConfig

    def __init__(self, config_dict):
        super().__init__()
        self.config = TideConfig(**config_dict)
        self.inner = Sea(self.config).to(self.config.param_dtype)

    @property
    def max_steps(self):
        return self.config.swells

    def empty_latents(self, batch):
        rows, length = batch["inputs"].shape
        zero = torch.zeros(rows, self.config.prefix_len + length, self.config.hidden_size,
                           dtype=self.config.dtype, device=batch["inputs"].device)
        return {"tide": zero, "spray-2": zero}

    def fresh_latents(self):
        return {"tide": self.inner.dawn, "spray-2": self.inner.dusk}

    def forward(self, carry, batch):
        carry = self.admit(carry, batch)
        inner, data = self.inner, carry.current_data
        z = inner.swell(carry.latents, inner.embed(data), inner.sequence_info(data))
        steps = carry.steps + 1
        carry = replace(carry, latents={name: value.detach() for name, value in z.items()},
                        steps=steps, halted=steps >= self.config.swells)
        return carry, {"logits": inner.logits(z["tide"])}
'''
SALT = "def bitter(x):\n    return 0.1 * x\n"
PRESET = """
name: tide@Tide
loss: {name: losses@ACTLossHead, loss_type: softmax_cross_entropy}
hidden_size: 32
num_heads: 2
puzzle_emb_ndim: 16
forward_dtype: float32
"""
KEYS = """arch=tide device_type=cpu lr=1e-3 lr_warmup_steps=0 global_batch_size=8 log_interval=1
    max_steps=6 checkpoint_interval=3 eval_max_batches=1 run_name=test""".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The author's own directory: `ideas` with the code, `presets` with the preset."""
    folder = tmp_path_factory.mktemp("home")
    for name, text in (
        ("ideas/tide.py", SOURCE), ("ideas/salt.py", SALT), ("presets/arch/tide.yaml", PRESET),
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


def given(home: Path, corpus: Path, run: Path, *more: str) -> list[str]:
    return ["--config-dir", str(home / "presets"), f"plugins=[{home / 'ideas'}]", *KEYS,
            f"data_paths=[{corpus}]", f"checkpoint_path={run}", *more]  # fmt: skip


def trained(home: Path, corpus: Path, run: Path, *more: str) -> Path:
    config = load_config(compose_config(given(home, corpus, run, *more)))
    assert train(CPUBackend(), config) == 0
    return checkpoints_of(run)[-1]


@pytest.fixture(scope="module")
def run(home, text_corpus) -> Path:
    trained(home, text_corpus, home / "run")
    use_plugins(())  # other programs begin without
    return home / "run"


@pytest.fixture
def plugins(home) -> str:
    return f"plugins={home / 'ideas'}"


def test_its_checkpoint_names_its_latents_and_holds_its_source(run, home):
    tensors = contents(checkpoints_of(run)[-1])
    latents = {name.rpartition("latents/")[2] for name in tensors if "latents/" in name}
    assert latents == {"tide", "spray-2"}
    source = checkpoints_of(run)[-1] / "source"
    for name in ("tide", "salt"):
        kept = source / "athena_plugins" / f"{name}.py"
        assert kept.read_bytes() == (home / "ideas" / f"{name}.py").read_bytes()
    assert (source / "models" / "base.py").is_file()


def test_it_resumes_bit_for_bit(home, text_corpus, run, tmp_path):
    shutil.copytree(checkpoints_of(run)[0], tmp_path / "step_3")
    again = trained(home, text_corpus, tmp_path)
    whole, restarted = contents(checkpoints_of(run)[-1]), contents(again)
    assert whole.keys() == restarted.keys()
    for name, value in whole.items():
        assert torch.equal(value, restarted[name]), name


def test_it_is_evaluated_at_every_step(run):
    text = (run / "metrics.jsonl").read_text("utf-8")
    assert "eval/text/step_2/" in text and "train/tide_norm" in text


def test_a_checkpoint_says_which_plugins_to_give_and_runs_none(run, home, text_corpus):
    path = checkpoints_of(run)[-1]
    for use in (
        lambda: build_model(Checkpoint(path)),
        lambda: load_language_model(path),
        lambda: apply_trained_config(compose_config([f"load_checkpoint={path}"]), []),
    ):
        with pytest.raises(UserError) as raised:
            use()
        assert "plugins=[" in str(raised.value) and str(home / "ideas") in str(raised.value)
    assert not [name for name in sys.modules if name.startswith("athena_plugins.")]


def test_it_writes_text(run, plugins, capsys):
    generate.main([f"checkpoint={run}", plugins, "prompt=abc", "max_new_tokens=4", "temperature=0",
                   "device_type=cpu"])  # fmt: skip
    cached = capsys.readouterr().out
    generate.main([f"checkpoint={run}", plugins, "prompt=abc", "max_new_tokens=4", "temperature=0",
                   "device_type=cpu", "cache=false"])  # fmt: skip
    assert cached == capsys.readouterr().out and cached.startswith("abc")


def test_it_is_estimated(home, plugins, capsys):
    estimate.main(["--config-dir", str(home / "presets"), plugins, "arch=tide", "hardware=cpu"])
    assert "parameters" in capsys.readouterr().out


def test_muon_trains_its_blocks_and_compile_takes_them(home, text_corpus, tmp_path):
    trained(home, text_corpus, tmp_path, "optimizer=muon", "max_steps=1")
    config = load_config(compose_config(given(home, text_corpus, tmp_path)))
    head, _ = build_model(Checkpoint(checkpoints_of(tmp_path)[-1]))
    assert config.arch.name == "tide@Tide"
    assert head.model.blocks() == list(head.model.inner.shoals)
    assert head.model.regions() == [(shoal, "forward") for shoal in head.model.inner.shoals]
    saved = torch.load(checkpoints_of(tmp_path)[-1] / "optimizer.pt", weights_only=True)
    muon = {name for one in saved for name, own in one["state"].items() if "momentum_buffer" in own}
    matrices = {name for name, p in head.named_parameters() if ".shoals." in name and p.ndim == 2}
    assert muon == matrices and muon


@pytest.mark.slow
def test_compiled_it_computes_the_same(home, text_corpus, run, tmp_path):
    compiled = contents(trained(home, text_corpus, tmp_path, "compile=true"))
    eager = contents(checkpoints_of(run)[-1])
    for name, value in eager.items():
        if value.is_floating_point():
            np.testing.assert_allclose(compiled[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_ranks_equal_one(home, text_corpus, run, tmp_path):
    """Also by torchrun, whose processes look up the plug-ins themselves."""
    status, out, err = finish(start(*given(home, text_corpus, tmp_path), ranks=2))
    assert status == 0, out + err
    two, one = contents(checkpoints_of(tmp_path)[-1]), contents(checkpoints_of(run)[-1])
    for name in (n for n in one if n.startswith("model/") and one[n].is_floating_point()):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_sweep_finds_it_in_every_job(home, text_corpus, tmp_path):
    words = [w for w in given(home, text_corpus, tmp_path / "x") if "checkpoint_path" not in w]
    status, out, err = finish(
        start(*words, "-m", "max_steps=1", "seed=0,1", f"hydra.sweep.dir={tmp_path}",
              "checkpoint_path=" + str(tmp_path / "run_${seed}"))
    )  # fmt: skip
    assert status == 0, out + err
    assert len(list(tmp_path.glob("run_*/step_1"))) == 2


@pytest.mark.slow
def test_transformers_loads_its_export(run, plugins, home, tmp_path, capsys):
    pytest.importorskip("transformers")
    export_hf.main([f"checkpoint={run}", plugins, f"output={tmp_path / 'exported'}"])
    assert "logits differ by at most" in capsys.readouterr().out
    assert (tmp_path / "exported" / "salt.py").is_file()


@pytest.mark.slow
def test_a_process_that_is_handed_the_config_finds_it(home, text_corpus, tmp_path):
    """As those that PyTorch/XLA spawns, which compose nothing."""
    config = load_config(compose_config(given(home, text_corpus, tmp_path, "max_steps=1")))
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = (
        "import pickle, sys; from pathlib import Path; from pretrain import train\n"
        "from utils.backend.cpu import CPUBackend\n"
        "sys.exit(train(CPUBackend(), pickle.loads(Path(sys.argv[1]).read_bytes())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config")],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "step_1").is_dir()


@pytest.mark.slow
def test_the_harness_takes_its_directory(run, home):
    harness = pytest.importorskip("scripts.lm_eval_athena")
    model = harness.AthenaLM(checkpoint=str(run), plugins=str(home / "ideas"), device="cpu")
    assert type(model.model.model).__name__ == "Tide"


def test_an_evaluator_of_the_checkpoint_s_is_missed_too(home, run, text_corpus, tmp_path):
    """`eval_only=true` takes the evaluators from the checkpoint, and may find the rest."""
    path = altered(run, tmp_path / "step_6", evaluators=["swell@Swell"],
                   arch={"name": "losses@Nothing", "loss": {}})  # fmt: skip
    keys = [f"load_checkpoint={path}", "eval_only=true", "arch=athena_trm_tiny"]
    with pytest.raises(UserError) as raised:
        apply_trained_config(compose_config(keys), keys)
    assert "swell@Swell" in str(raised.value) and str(home / "ideas") in str(raised.value)
