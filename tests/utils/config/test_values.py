"""Values on the command line: a path is the path that was written, whatever its letters."""

import random
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from training_tools import TINY

from utils.checkpoint.run_config import apply_trained_config
from utils.config.load import compose_config, hydra_entry, load_config
from utils.config.values import assignment, hydra_override, readable
from utils.core.errors import UserError

LETTERS = "ab/.-_ '\"[](){}=,日本é😀$~%#\\:;&!?*|@+<>^`0719"
TEXTS = ("checkpoint_path", "load_checkpoint", "resume", "best_metric")
LISTS = ("data_paths", "data_paths_test", "eval_save_outputs")
ODD = "/x/日本 (1) it's a=b [c] {d} $e ${f} ~g 100% #h \\i"


def random_path() -> str:
    return "".join(random.choice(LETTERS) for _ in range(random.randint(1, 14)))


def is_plain(text: str) -> bool:
    """Whether the rules let a text stand without quotes."""
    return "," not in text and text.strip() == text and text[0] not in "'\""


def values_of(*overrides: str) -> dict:
    return load_config(
        apply_trained_config(compose_config([*TINY, *overrides]), overrides)
    ).model_dump()


def written(key: str, value: str | list[str]) -> str:
    """As a user writes it: without quotes where the rules allow it."""
    parts = value if isinstance(value, list) else [value]
    if not all(map(is_plain, parts)):
        return assignment(key, value)
    return f"{key}=[{','.join(parts)}]" if isinstance(value, list) else f"{key}={value}"


def drawn(key: str) -> str | list[str]:
    if key in LISTS:
        return [random_path() for _ in range(random.randint(1, 3))]
    return random_path()


def test_any_path_is_what_it_says():
    """And is so again where the override is passed on to another command."""
    parser = OverridesParser.create()
    for _ in range(150):
        key = random.choice(TEXTS + LISTS)
        value = drawn(key)
        override = written(key, value)
        for given in (override, readable(override)):
            _, _, text = given.partition("=")
            cfg = OmegaConf.create({})
            parsed = parser.parse_override(hydra_override(key, text))
            OmegaConf.update(cfg, key, parsed.value(), force_add=True)
            assert OmegaConf.to_container(cfg, resolve=True)[key] == value, given


def test_any_path_arrives_in_the_config():
    for _ in range(3):
        given = {key: drawn(key) for key in TEXTS + LISTS}
        composed = compose_config([written(key, value) for key, value in given.items()])
        plain = OmegaConf.to_container(composed, resolve=True)
        assert {key: plain[key] for key in given} == given


def test_odd_paths_in_options_of_evaluators():
    path = "/x/日本 (1) it's a=b ~g 100% #h"
    tasks = f"{{name: tasks@MultipleChoiceEvaluator, path: {path}}}"
    given = [f"evaluators=[text@PerplexityEvaluator,{tasks}]", "data_paths=[x]"]
    assert values_of(*given)["evaluators"][1]["path"] == path
    near = [f"loss.kl_to={path}", "loss.kl_weight=1", "data_paths=[x]"]
    assert values_of(*near)["arch"]["loss"]["terms"]["kl"]["base"] == path


def test_domains_have_names_of_their_own():
    for given in (
        "domain_weights={日本: 2, 'a: b': 1, it's (x)=y: 3, 2024: 1}",
        'domain_weights={"日本": 2, \'a: b\': 1, "it\'s (x)=y": 3, "2024": 1}',
    ):
        weights = values_of(given, "data_paths=[x]")["domain_weights"]
        assert weights == {"日本": 2, "a: b": 1, "it's (x)=y": 3, "2024": 1}
    changed = values_of("domain_weights={b: 1}", "domain_weights.日本=0.5", "data_paths=[x]")
    assert changed["domain_weights"] == {"b": 1, "日本": 0.5}


@pytest.mark.parametrize("value", ["7", "1e3", "true", "007", "[a]", "choice"])
def test_names_that_look_like_numbers_are_names(value):
    assert compose_config([f"run_name={value}"]).run_name == value


def test_interpolations_are_those_that_name_a_key_or_a_resolver(monkeypatch):
    monkeypatch.setenv("ATHENA_PLACE", "/somewhere")
    cfg = compose_config(
        ["run_name=lr_${lr}_${nothing}", "checkpoint_path=${oc.env:ATHENA_PLACE}/${run_name}",
         "data_paths=['${oc.env:ATHENA_PLACE}/a,b', /x/${y:z}]", r"load_checkpoint='\${lr}, x'"]
    )  # fmt: skip
    assert cfg.run_name == f"lr_{cfg.lr}_${{nothing}}"
    assert cfg.checkpoint_path == f"/somewhere/{cfg.run_name}"
    assert list(cfg.data_paths) == ["/somewhere/a,b", "/x/${y:z}"]
    assert cfg.load_checkpoint == "${lr}, x"


def test_sweeps_over_odd_paths(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.chdir(tmp_path)
    arguments = [
        "-m", "run_name=日本(1),'a,b',it's=x", f"checkpoint_path={ODD}/${{run_name}}",
        "data_paths=[/x/é,'/y/a,b'],[/z/${q}]",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    hydra_entry(
        lambda cfg: seen.append((cfg.run_name, cfg.checkpoint_path, list(cfg.data_paths)))
    )()
    names, lists = ["日本(1)", "a,b", "it's=x"], [["/x/é", "/y/a,b"], ["/z/${q}"]]
    assert seen == [(name, f"{ODD}/{name}", paths) for name in names for paths in lists]


def test_a_comma_without_quotes_is_asked_about():
    for override, advice in (("run_name=a,日本", "quotes"), ("data_paths=a,日本", "[a,日本]")):
        with pytest.raises(UserError) as error:
            compose_config([override])
        assert override in str(error.value) and advice in str(error.value)


def test_a_run_of_its_own_in_odd_folders(text_corpus, tmp_path, monkeypatch):
    """Trained, resumed and evaluated, with what `pretrain.py` itself is given."""
    import pretrain
    from utils.checkpoint.format import checkpoints_of

    folder = tmp_path / ODD.replace("/x/", "")
    folder.mkdir()
    (folder / "corpus").symlink_to(text_corpus)

    def run(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *TINY, *overrides])
        pretrain.main()

    data = f"data_paths=[{folder}/corpus]"
    options = [data, f"checkpoint_path={folder}/run", "epochs=20", "eval_max_batches=1"]
    run(*options, "max_steps=1", "run_name=日本 (1) = it's [c] ${f}")
    run(*options, "max_steps=2", f"resume={folder}/run/step_1", "resume_allow=[max_steps]")
    run("eval_only=true", f"load_checkpoint={folder}/run", f"checkpoint_path={folder}/evaluation")
    run(*options[:1], f"load_checkpoint={folder}/run", f"checkpoint_path={folder}/more",
        "max_steps=1", "eval_max_batches=1")  # fmt: skip
    assert [p.name for p in checkpoints_of(folder / "run")] == ["step_1", "step_2"]
    assert checkpoints_of(folder / "more")
    assert (folder / "evaluation" / "metrics.jsonl").is_file()
