"""The command line as users meet it: what Hydra would refuse, what it must still do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils.config.load import PretrainConfig, hydra_entry
from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DATA = "data_paths=[data/x]"
PRESETS = {
    group: sorted(path.stem for path in (ROOT / "config" / group).glob("*.yaml"))
    for group in ("arch", "arch/net", "arch/size", "device", "debug", "experiment", "recipe")
}

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from utils.config.load import hydra_entry

assert "torch" not in sys.modules  # a typo must not wait for it

@hydra_entry
def launch(cfg):
    if cfg.seed == 14:
        raise RuntimeError("a bug")
    if "lrr" in cfg:
        from utils.config.load import load_config
        load_config(cfg)
    print("lr", cfg.lr, "run", cfg.run_name)

launch()
"""


@pytest.fixture
def command(tmp_path):
    """Runs a program like pretrain.py in an empty folder, with any number of command lines."""
    (tmp_path / "program").mkdir()
    (tmp_path / "cwd").mkdir()
    program = tmp_path / "program" / "pretrain.py"
    program.write_text(PROGRAM.format(root=str(ROOT)), "utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA", "LOCAL_"))}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(program), *arguments],
            cwd=tmp_path / "cwd",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )

    run.cwd = tmp_path / "cwd"
    return run


def refused(result: subprocess.CompletedProcess) -> str:
    """The one sentence of a refused command line."""
    assert result.returncode == 2, result
    assert result.stdout == "" and result.stderr.count("\n") == 1, result
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").strip()


@pytest.mark.slow
def test_a_run_leaves_the_working_directory_alone(command):
    result = command("data_paths=[x]", "+run_name=x", "lr=1e-3", "hydra.verbose=false")
    assert (result.returncode, result.stdout, result.stderr) == (0, "lr 0.001 run x\n", "")
    assert list(command.cwd.iterdir()) == []


@pytest.mark.slow
def test_a_typo_on_the_command_line(command):
    sentence = refused(command("lrr=1", DATA))
    assert sentence == "unknown key 'lrr': did you mean 'lr'?"


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(command):
    bug = command("seed=14")
    assert bug.returncode == 1 and "RuntimeError: a bug" in bug.stderr and "launch" in bug.stderr


@pytest.mark.slow
def test_sweeps_still_work(command):
    result = command("run_name=x", "-m", "lr=1e-3,2e-3")
    assert result.stdout.splitlines() == ["lr 0.001 run x", "lr 0.002 run x"], result


# Each takes a good part of a second to import.
LATE = (
    "torch._dynamo torch._inductor torch.distributed.checkpoint torch.distributed.fsdp "
    "torch.distributed.tensor sympy pandas pyarrow matplotlib transformers optuna wandb "
    "tensorboard torch.utils.tensorboard"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "late"),
    [
        ("pretrain.py --help", 0, LATE),
        ("pretrain.py lrr=1", 2, LATE),
        ("pretrain.py data_paths=[x] dry_run=true global_batch_size=0", 2, LATE),
        ("scripts/generate.py --help", 0, LATE),
        ("scripts/estimate.py --help", 0, LATE),
        ("scripts/sweep_optuna.py --help", 0, {*LATE} - {"optuna"}),
        ("scripts/plot_run.py --help", 0, [*LATE, "torch"]),
        ("scripts/gpu_check.py --help", 0, [*LATE, "torch"]),
        ("scripts/smoke_test.py --help", 0, [*LATE, "torch"]),
        ("-m dataset.build_corpus_dataset --help", 0, [*LATE, "torch"]),
        ("-m dataset.build_text_dataset --help", 0, [*LATE, "torch"]),
        ("-m dataset.inspect_corpus --help", 0, [*LATE, "torch"]),
    ],
)
def test_an_answer_waits_for_no_import_that_it_does_not_use(arguments, status, late):
    command = [sys.executable, "-X", "importtime", *arguments.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert result.returncode == status, result.stderr[-1000:]
    lines = [x for x in result.stderr.splitlines() if x.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "utils.core.errors" in imported  # the names were understood
    assert not imported.intersection(late)


# The rest in this process: starting one for each would mostly test Python's start.


def test_cfg_prints_the_config(monkeypatch, capsys):
    arguments = ["--cfg", "job", "arch=athena_trm_tiny", "lr=1e-3"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    hydra_entry(lambda cfg: pytest.fail("must not run"))()
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.lr, shown.arch.hidden_size) == (1e-3, 64)


def test_help_lists_groups_presets_and_keys(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    hydra_entry(lambda cfg: pytest.fail("must not run"))()
    text = capsys.readouterr().out
    for key, field in PretrainConfig.model_fields.items():
        assert re.search(rf"^  {key}\b.*{re.escape(field.description)}", text, re.M), key
    for group, presets in PRESETS.items():
        assert re.search(rf"^  {group} +{', '.join(presets)}$", text, re.M)
    for option in (
        "hidden_size = 64 .*width",
        "loss.terms.halting.target = .*exact, budget, plateau",
    ):
        assert re.search(rf"^  arch\.{option}", text, re.M), option


def test_a_mistake_found_while_running(monkeypatch, capsys):
    def launch(cfg):
        raise UserError(f"seed {cfg.seed} brings bad luck: use another")

    monkeypatch.setattr(sys, "argv", ["pretrain.py", "seed=13"])
    with pytest.raises(SystemExit) as exit_:
        hydra_entry(launch)()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: seed 13 brings bad luck: use another\n"


ENTRY_MISTAKES = [
    (["arch=athena_trm_lrge"], ["did you mean 'arch=athena_trm_large'", "athena_trm_tiny", "trm"]),
    (["recipe=null"], ["recipe=null", *PRESETS["recipe"]]),
    (["experiment=nothing"], ["'experiment=nothing'", *PRESETS["experiment"]]),
    (["data_paths=[a,", "b]"], ["data_paths=[a,", "'data_paths=[a,b]'"]),
    (["lr", "=", "1"], ["'lr'", "key=value"]),
    (["logger=a,b"], ["'logger=a,b'", "[value1,value2]", "--multirun"]),
    (["lr=[1"], ["'lr=[1'", "'lr=[a,b]'"]),
    (["run_name=a,b"], ["run_name=a,b", "quotes", "-m"]),
    (["data_paths=a,b"], ["ambiguous", "'data_paths=[a,b]'"]),
    (["--lr=1"], ["--lr", "lr=1"]),
    (["--multrun"], ["'--multirun'"]),
    (["--config-name", "cfg_pretran"], ["'cfg_pretran'"]),
    (["nogroup/x=1"], ["'nogroup/x'", "arch/net, arch/size, debug, device, experiment, recipe"]),
    (["hydra.nokey=1"], ["hydra.nokey"]),
    (["--cfg", "job", "lrr=1"], ["'lrr'", "'lr'"]),
]


@pytest.mark.parametrize(("arguments", "needed"), ENTRY_MISTAKES)
def test_command_lines_that_hydra_would_refuse(arguments, needed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        hydra_entry(lambda cfg: pytest.fail("must not run"))()
    output = capsys.readouterr()
    assert exit_.value.code == 2
    assert output.out == "" and output.err.count("\n") == 1 and "HYDRA" not in output.err
    assert all(part in output.err for part in needed), output.err
