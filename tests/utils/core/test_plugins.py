"""Classes in directories outside the project: found by name, never by accident, never silently."""

import sys

import pytest

from utils.core.errors import UserError
from utils.core.functions import load_class, load_named
from utils.core.plugins import plugin_folders, use_plugins


@pytest.fixture
def ideas(tmp_path):
    """A directory of plug-ins, in use."""
    folder = tmp_path / "ideas"
    (folder / "deeper").mkdir(parents=True)
    (folder / "shared.py").write_text("WIDTH = 7\n", "utf-8")
    (folder / "banded.py").write_text(
        "from athena_plugins.shared import WIDTH\nfrom .shared import WIDTH as again\n"
        "class Banded:\n    width = WIDTH\n",
        "utf-8",
    )
    (folder / "deeper" / "looped.py").write_text("class Looped: ...\n", "utf-8")
    use_plugins([folder])
    return folder


def test_a_class_is_found_wherever_its_kind_lies(ideas):
    for prefix in ("models.", "evaluators.", "utils.training.optimizers."):
        assert load_class("banded@Banded", prefix).width == 7
    assert load_named("banded@Banded", "utils.training.optimizers.").width == 7
    assert load_class("deeper.looped@Looped").__name__ == "Looped"


def test_nothing_is_imported_before_it_is_named(ideas):
    assert not [name for name in sys.modules if name.startswith("athena_plugins.")]


def test_other_folders_replace_those_before(ideas, tmp_path):
    before = load_class("banded@Banded")
    use_plugins([ideas])
    assert load_class("banded@Banded") is before, "the same directories are no change"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "banded.py").write_text("class Banded: width = 8\n", "utf-8")
    use_plugins([tmp_path / "other"])
    assert load_class("banded@Banded").width == 8
    use_plugins(())
    assert plugin_folders() == []
    with pytest.raises(UserError, match="banded@Banded"):
        load_class("banded@Banded")


@pytest.mark.parametrize(
    ("identifier", "advice"),
    [
        ("bandet@Banded", "did you mean 'banded'"),
        ("looped@Looped", "did you mean 'deeper.looped'"),
        ("banded@Bandet", "did you mean 'Banded'"),
        ("Banded", "did you mean 'banded@Banded'"),
        ("losses@ACTLosHead", "did you mean 'ACTLossHead'"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(ideas, identifier, advice):
    with pytest.raises(UserError, match=advice):
        load_class(identifier)


def test_a_module_that_is_nowhere_says_where_was_looked(ideas):
    with pytest.raises(UserError, match=str(ideas)):
        load_class("quite_unlike@X")


@pytest.mark.parametrize(
    ("source", "line", "error"),
    [
        ("x = 1\ny = 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
        ("class X:\n    def f(self:\n", 2, "SyntaxError"),
        ("\n\nimport surely_not_installed\n", 3, "pip install surely_not_installed"),
        ("import models.surely_not_there\n", 1, "models.surely_not_there"),
        ("import banded\n", 1, "from athena_plugins.banded import"),
    ],
)
def test_a_plugin_that_fails_names_its_line(ideas, source, line, error):
    (ideas / "broken.py").write_text(source, "utf-8")
    with pytest.raises(UserError) as raised:
        load_class("broken@X")
    assert f"{ideas / 'broken.py'}:{line}: " in str(raised.value) and error in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).count("line") == 0


def test_a_name_of_athena_s_own_is_refused(ideas):
    """Otherwise `losses@ACTLossHead` of a preset would mean one or the other."""
    (ideas / "losses.py").write_text("class ACTLossHead: ...\n", "utf-8")
    with pytest.raises(UserError) as raised:
        load_class("losses@ACTLossHead")
    assert str(ideas / "losses.py") in str(raised.value) and "models.losses" in str(raised.value)
    assert load_class("text@PerplexityEvaluator", "evaluators.")


def test_a_name_in_two_folders_is_refused(ideas, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "banded.py").write_text("class Banded: ...\n", "utf-8")
    use_plugins([ideas, tmp_path / "more"])
    with pytest.raises(UserError) as raised:
        load_class("banded@Banded")
    assert str(ideas / "banded.py") in str(raised.value)
    assert str(tmp_path / "more" / "banded.py") in str(raised.value)


@pytest.mark.parametrize(("name", "advice"), [("nowhere", "nowhere"), ("shared.py", "ideas")])
def test_a_path_that_is_not_a_directory(ideas, name, advice):
    with pytest.raises(UserError) as raised:
        use_plugins([ideas / name])
    assert f"plugins={ideas / name}" in str(raised.value) and advice in str(raised.value)
    assert plugin_folders() == [str(ideas)]


def complaint(identifier: str, prefix: str = "models.") -> str:
    with pytest.raises(UserError) as raised:
        load_class(identifier, prefix)
    return str(raised.value)


def test_a_forgotten_directory_is_asked_for():
    sentence = complaint("gain_norm@Recursive")
    assert "gain_norm@Recursive" in sentence and "plugins=[" in sentence
    assert "backbone" not in sentence, "Athena's modules are not what was meant"
    assert "--plugins" in complaint("subtitles@Subtitles", "dataset.input.")
    assert "did you mean 'losses'" in complaint("loses@ACTLossHead")


def test_what_the_directories_hold_is_listed(ideas):
    sentence = complaint("quite_unlike@X")
    assert "banded, deeper.looped, shared" in sentence
    assert "backbone" not in sentence and f"neither in Athena's models nor in {ideas}" in sentence


def test_a_directory_without_python_is_named(tmp_path):
    presets = tmp_path / "presets"
    (presets / "experiment").mkdir(parents=True)
    (presets / "experiment" / "x.yaml").write_text("lr: 1\n", "utf-8")
    use_plugins([presets])
    assert f"{presets} holds no Python file" in complaint("gain_norm@Recursive")
