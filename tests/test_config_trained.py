"""eval_only=true load_checkpoint=… alone: what the checkpoint was trained as need not be said."""

from utils.config import compose_config, load_config
from utils.config_trained import as_trained


def test_a_checkpoint_brings_its_own_architecture_and_corpus(text_run, text_corpus):
    """Dotted options change single values of it; a preset that is named is taken whole."""

    def config(*overrides: str):
        given = ["eval_only=true", f"load_checkpoint={text_run}", *overrides]
        return load_config(as_trained(compose_config(given), given))

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


def test_training_takes_nothing_from_a_checkpoint_but_its_weights(text_run, text_corpus):
    given = [f"load_checkpoint={text_run}", f"data_paths=[{text_corpus}]"]
    composed = compose_config(given)
    assert as_trained(composed, given) is composed
