"""An export tries out what it wrote, and fails where the installed transformers breaks it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_export_hf import export, fails, no_traces, variant_of
from training_tools import ROOT, sealed

__all__ = ["no_traces"]

VARIABLE = "ATHENA_TRANSFORMERS"
OTHERS = [Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]


@pytest.fixture(scope="module")
def checkpoint(text_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return variant_of(text_run, folder / "one", "identifiers, stablemax", "bfloat16")


def rename_the_cache(monkeypatch, transformers):
    """As transformers 5.24 did."""
    prepare = transformers.GenerationMixin.prepare_inputs_for_generation

    def prepared(self, *args, **kwargs):
        found = prepare(self, *args, **kwargs)
        for name in ("cache", "past_key_values"):
            if name in found:
                found["kept_states"] = found.pop(name)
        return found

    monkeypatch.setattr(transformers.GenerationMixin, "prepare_inputs_for_generation", prepared)


def lose_what_is_kept(monkeypatch, transformers):
    update = transformers.DynamicCache.update

    def updated(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys, values * 0

    monkeypatch.setattr(transformers.DynamicCache, "update", updated)


def lose_the_weights(monkeypatch, transformers):
    load = transformers.AutoModelForCausalLM.from_pretrained

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        for parameter in model.parameters():
            parameter.data.normal_()
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (rename_the_cache, "kept_states"),
        (lose_what_is_kept, "do_sample=False, use_cache=True; do_sample=True, use_cache=True;"),
        (lose_the_weights, "logits, off by"),
    ],
)
def test_a_transformers_that_breaks_the_model_fails_the_export(
    checkpoint, tmp_path, capsys, monkeypatch, harm, named
):
    transformers = importlib.import_module("transformers")  # not before no_traces
    harm(monkeypatch, transformers)
    output = tmp_path / "new" / "model"
    message = fails(capsys, f"checkpoint={checkpoint}", f"output={output}")
    assert named in message and f"transformers {transformers.__version__}" in message
    assert "constraints.txt" in message  # the way out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert (export(checkpoint, output) / "config.json").is_file()


@pytest.mark.parametrize("window", [1, 2, 9])
def test_models_of_short_windows_are_tried_out_too(checkpoint, tmp_path, capsys, window):
    short = shutil.copytree(checkpoint, tmp_path / "short")
    metadata = json.loads((short / "dataset.json").read_text("utf-8"))
    (short / "dataset.json").write_text(json.dumps(metadata | {"seq_len": window}), "utf-8")
    export(sealed(short), tmp_path / "model")
    assert "differ by at most" in capsys.readouterr().out


@pytest.mark.slow
def test_it_needs_no_cache_of_the_user(checkpoint, tmp_path):
    """Where it finds no place for a copy of the code at all, it says so and exports."""
    (tmp_path / "file").write_text("", "utf-8")
    nowhere = str(tmp_path / "file" / "below")
    for name, more in (("tried", {}), ("not tried", {"HF_MODULES_CACHE": nowhere})):
        output = tmp_path / name
        arguments = [f"checkpoint={checkpoint}", f"output={output}"]
        done = subprocess.run(
            [sys.executable, "scripts/export_hf.py", *arguments],
            cwd=ROOT, text=True, capture_output=True,
            env=os.environ | {"HOME": nowhere, "HF_HOME": nowhere, "OMP_NUM_THREADS": "1"} | more,
        encoding="utf-8")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("was not tested" in done.stdout) == bool(more)
        assert (output / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "not tried", "tried"]


@pytest.mark.nightly
@pytest.mark.skipif(not OTHERS, reason=f"{VARIABLE} names no folder of another transformers")
@pytest.mark.parametrize("folder", OTHERS, ids=str)
def test_exports_work_with_another_transformers(folder):
    """Run the tests of exports with the packages that `pip install --target` put into a folder."""
    env = os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": "1"}
    del env[VARIABLE]
    where = "import transformers; print(transformers.__version__, transformers.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert str(folder.resolve()) in found.stdout, found.stdout + found.stderr
    tests = [f"tests/scripts/test_export_{name}.py" for name in ("hf", "check")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{found.stdout}{done.stdout[-5000:]}{done.stderr[-2000:]}"
