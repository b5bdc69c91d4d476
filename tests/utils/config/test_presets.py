"""What published command lines train with: presets of architectures, recipes, experiments."""

import pytest

from utils.config.load import compose_config, load_config

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
