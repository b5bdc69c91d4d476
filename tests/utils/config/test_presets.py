"""What published command lines train with: presets of architectures, recipes, experiments."""

import sys

import pytest

from utils.config.hydra_entry import CONFIG_DIR
from utils.config.load import compose_config, hydra_entry, load_config
from utils.core.errors import UserError

RECIPE = ("global_batch_size", "lr", "lr_warmup_steps", "feed", "weight_decay_all", "ema_warmup")
LARGE = (768, 8e-5, 4000, "consume", False, True)
SMALL = (64, 3e-4, 200, "consume", False, True)
TINY = (16, 5e-3, 20, "consume", False, True)
TRM = (768, 8e-5, 4000, "present", True, False)
SUDOKU = "arch=trm epochs=50000 lr=1e-4 weight_decay=1.0 arch.mlp_t=True arch.pos_encodings=none"


def trained_with(command: str) -> tuple:
    config = load_config(compose_config(["data_paths=[x]", *command.split()]))
    return tuple(getattr(config, key) for key in RECIPE)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("arch=athena_trm_large global_batch_size=768 +run_name=athena_v1_large", LARGE),
        ("arch=athena_trm_medium", LARGE),
        ("arch=athena_trm_small", SMALL),
        ("arch=athena_trm_tiny max_seconds=120", TINY),
        ("run_name=bare", TINY),
        ("arch=trm", TRM),
        ("arch=single_z", TRM),
        ("arch=hier6", TRM),
        ("arch=transformer", LARGE),
        (SUDOKU, (768, 1e-4, 4000, "present", True, False)),
        ("experiment=quickstart", (16, 4e-3, 40, "consume", False, True)),
        ("experiment=compare_transformer", (16, 4e-3, 40, "consume", False, True)),
        ("experiment=novels", (32, 4e-3, 100, "consume", False, True)),
        ("experiment=sudoku6", (64, 8e-3, 30, "consume", True, True)),
        ("experiment=sudoku4", (128, 8e-3, 100, "consume", True, True)),
        ("arch=athena_trm_small recipe=tiny", TINY),
        ("recipe=trm arch=athena_trm_small lr=1", (768, 1, 4000, "present", True, False)),
        ("experiment=quickstart recipe=trm", (16, 4e-3, 40, "present", True, False)),
    ],
)
def test_batch_learning_rate_and_feed(command, expected):
    """An architecture brings its recipe; an experiment and the command line change it."""
    assert trained_with(command) == expected


@pytest.mark.parametrize(
    ("command", "name", "shape"),
    [
        ("arch=athena_trm_large", "AthenaTRM", (2304, 36, 1024)),
        ("arch=athena_trm_medium", "AthenaTRM", (1024, 16, 1024)),
        ("arch=athena_trm_small", "AthenaTRM", (512, 8, 512)),
        ("arch=athena_trm_tiny", "AthenaTRM", (64, 2, 64)),
        ("run_name=bare", "AthenaTRM", (64, 2, 64)),
        ("arch=transformer", "Transformer", (2304, 36, 1024)),
        ("arch=trm", "AthenaTRM", (512, 8, 512)),
        ("arch=single_z", "SingleZ", (512, 8, 512)),
        ("arch=hier6", "Hier6", (512, 8, 512)),
        ("arch/net=transformer arch/size=small", "Transformer", (512, 8, 512)),
        ("+arch/size=medium arch/net=hier6", "Hier6", (1024, 16, 1024)),
        ("arch=transformer arch/size=tiny", "Transformer", (64, 2, 64)),
        ("arch=athena_trm_large arch/net=single_z arch.num_heads=18", "SingleZ", (2304, 18, 1024)),
    ],
)
def test_nets_are_crossed_with_sizes(command, name, shape):
    arch = load_config(compose_config(["data_paths=[x]", *command.split()])).arch
    assert arch.name.endswith(f"@{name}")
    assert (arch.hidden_size, arch.num_heads, arch.puzzle_emb_ndim) == shape


@pytest.mark.parametrize("size", sorted(path.stem for path in (CONFIG_DIR / "arch/size").glob("*")))
@pytest.mark.parametrize("net", sorted(path.stem for path in (CONFIG_DIR / "arch/net").glob("*")))
def test_any_net_has_any_size(net, size):
    load_config(compose_config([f"arch/net={net}", f"arch/size={size}", "data_paths=[x]"]))


def test_a_size_brings_its_recipe():
    assert trained_with("arch/net=transformer arch/size=small") == SMALL
    assert trained_with("arch/net=transformer arch/size=small recipe=tiny") == TINY
    assert trained_with("arch=trm arch/size=tiny") == TRM


def test_a_preset_of_ones_own_names_a_net_and_a_size(tmp_path, monkeypatch, capsys):
    """Found by --config-dir."""
    (tmp_path / "arch").mkdir()
    (tmp_path / "arch" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /arch/net: hier6\n  - /arch/size: tiny\n  - _self_\n"
        "arch:\n  H_cycles: 1\n",
        "utf-8",
    )
    seen = []
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config-dir", str(tmp_path), "arch=mine"])
    hydra_entry(seen.append)()
    (cfg,) = seen
    assert (cfg.arch.hidden_size, cfg.arch.H_cycles, cfg.arch.L_cycles) == (64, 1, 6)
    assert (cfg.lr, cfg.feed) == (5e-3, "consume")


@pytest.mark.parametrize("program", ["pretrain", "compose"])
@pytest.mark.parametrize(
    ("folder", "parts"),
    [
        ("preset", ["--config-dir", "preset is not a directory", "did you mean", "presets"]),
        ("presets/experiment", ["experiment=gain_norm", "--config-dir", "presets/experiment"]),
    ],
)
def test_a_wrong_directory_of_presets(tmp_path, monkeypatch, capsys, folder, parts, program):
    presets = tmp_path / "presets"
    (presets / "experiment").mkdir(parents=True)
    (presets / "experiment" / "gain_norm.yaml").write_text("# @package _global_\nlr: 1\n", "utf-8")
    words = ["--config-dir", str(tmp_path / folder), "experiment=gain_norm"]
    if program == "compose":
        with pytest.raises(UserError) as raised:
            compose_config(words)
        sentence = str(raised.value)
    else:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        with pytest.raises(SystemExit):
            hydra_entry(lambda cfg: None)()
        sentence = capsys.readouterr().err
    assert all(part in sentence for part in parts), sentence
    assert str(presets) in sentence.replace(str(presets / "experiment"), "")
