"""eval_only=true load_checkpoint=… alone: what the checkpoint was trained as need not be said."""

import pytest
from training_tools import altered

from utils.checkpoint.format import checkpoints_of
from utils.checkpoint.run_config import apply_trained_config
from utils.config.load import compose_config, load_config
from utils.core.errors import UserError


def test_a_checkpoint_brings_its_own_architecture_and_corpus(text_run, text_corpus):
    """Dotted options change single values of it; a preset that is named is taken whole."""

    def config(*overrides: str):
        given = ["eval_only=true", f"load_checkpoint={text_run}", *overrides]
        return load_config(apply_trained_config(compose_config(given), given))

    alone = config()
    assert alone.arch.options["hidden_size"] == 32 and alone.arch.options["halt_max_steps"] == 4
    assert alone.data_paths == [str(text_corpus)] and alone.global_batch_size == 8
    assert alone.run_name is None and alone.checkpoint_path is None
    changed = config("arch.halt_max_steps=7", "evaluators=[]", "global_batch_size=2")
    assert changed.arch.options["hidden_size"] == 32 and changed.arch.options["halt_max_steps"] == 7
    assert changed.evaluators == [] and changed.global_batch_size == 2
    other = config("arch=transformer")
    assert "num_layers" in other.arch.options and other.data_paths == [str(text_corpus)]
    assert config("debug=default", f"data_paths=[{text_corpus}]").arch.options["hidden_size"] > 32


def test_a_checkpoint_that_is_not_there_is_named_before_anything_else(text_run):
    """Not as a lack of data_paths, which the checkpoint would have named."""
    for given in (["eval_only=true"], ["data_paths=[x]"]):
        given = [*given, f"load_checkpoint={text_run}/step_33"]
        with pytest.raises(
            UserError, match=r"load_checkpoint=.*/step_33 .*did you mean .*/step_3\?"
        ):
            apply_trained_config(compose_config(given), given)


def test_training_further_takes_the_architecture_and_its_recipe(text_run, text_corpus, tmp_path):
    def config(checkpoint, *overrides: str):
        given = [f"load_checkpoint={checkpoint}", f"data_paths=[{text_corpus}]", *overrides]
        return load_config(apply_trained_config(compose_config(given), given))

    (tmp_path / "weights.pt").touch()
    found, plain = config(text_run), config(tmp_path / "weights.pt")
    assert found.arch.options["hidden_size"] == 32
    assert (found.global_batch_size, found.lr) == (8, 1e-3) != (plain.global_batch_size, plain.lr)
    found.arch, found.load_checkpoint = plain.arch, plain.load_checkpoint
    found.global_batch_size, found.lr = plain.global_batch_size, plain.lr
    assert found == plain
    changed = config(text_run, "recipe=small", "lr=0.5")
    assert (changed.arch.options["hidden_size"], changed.global_batch_size) == (32, 64)
    assert changed.lr == 0.5
    other = config(text_run, "arch=athena_trm_small")
    assert (other.arch.options["hidden_size"], other.global_batch_size) == (512, 64)
    assert config(text_run, "arch/size=medium").arch.options["hidden_size"] == 1024
    near = altered(text_run, tmp_path / "near", arch={"loss": {
        "name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy",
        "kl_to": "elsewhere", "kl_weight": 0.5, "label_smoothing": 0.1,
    }})  # fmt: skip
    whole = config(near, "arch.loss={label_smoothing: 0.3}")
    assert whole.arch.loss.options["terms"]["label_smoothing"] == {"weight": 0.3}
    assert whole.arch.loss.options["loss_type"] == "softmax_cross_entropy"
    changed = config(near, "arch.loss.label_smoothing=0.2", "arch.loss.halt_target=exact")
    assert "kl" not in changed.arch.loss.options["terms"]
    assert changed.arch.loss.options["terms"]["label_smoothing"] == {"weight": 0.2}
    assert changed.arch.options["hidden_size"] == 32


def test_a_run_that_goes_on_has_its_own_architecture(text_run, text_corpus):
    """Wherever the checkpoint is that it started from."""

    def width(*overrides: str) -> int:
        given = [f"data_paths=[{text_corpus}]", *overrides]
        return load_config(apply_trained_config(compose_config(given), given)).arch.options[
            "hidden_size"
        ]

    newest = checkpoints_of(text_run)[-1]
    assert width("load_checkpoint=gone", f"checkpoint_path={text_run}") == 32
    assert width(f"resume={newest.name}", f"checkpoint_path={text_run}") == 32
    assert width(f"resume={newest}") == width(f"resume={text_run}") == 32
    assert width(f"checkpoint_path={text_run}") > 32, "which did not start from a checkpoint"
    with pytest.raises(UserError, match="load_checkpoint=gone does not exist"):
        width("load_checkpoint=gone", "checkpoint_path=new")
    assert width(f"resume={newest}", "arch=athena_trm_small") > 32


def test_the_home_folder_may_be_written_as_a_tilde(text_run, text_corpus, monkeypatch):
    """Only some shells expand it behind `key=`, and none does within brackets."""
    monkeypatch.setenv("HOME", str(text_corpus.parent))
    (text_corpus.parent / "run").symlink_to(text_run)
    given = [f"data_paths=[~/{text_corpus.name}]", "load_checkpoint=~/run", "checkpoint_path=~/new"]
    config = load_config(apply_trained_config(compose_config(given), given))
    assert config.arch.options["hidden_size"] == 32  # the checkpoint's
    assert config.data_paths == [str(text_corpus)]
    assert config.load_checkpoint == str(text_corpus.parent / "run")
    assert config.checkpoint_path == str(text_corpus.parent / "new")
    assert load_config(compose_config([given[0], "resume=~/run"])).resume == config.load_checkpoint
    (text_corpus.parent / "run").unlink()
