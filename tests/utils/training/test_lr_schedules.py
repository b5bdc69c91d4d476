"""Learning-rate schedules: their values, and one of one's own in one file."""

import math
import re
from types import SimpleNamespace

import pytest
import yaml
from training_tools import differing, make_config, metrics_of

from utils.config.saved import changed_keys, dump_config
from utils.core.errors import UserError
from utils.training.schedule import Schedule

PACKAGE = "utils.training.lr_schedules"
STAIRS = """
from pydantic import Field

from utils.config.schema import ScheduleOptions


class StairsOptions(ScheduleOptions):
    steps: int = Field(4, ge=1)


def stairs(progress, step, options: StairsOptions):
    return max(options.lr_min_ratio, 1 - int(progress * options.steps) / options.steps)


def half(progress, step, options):
    return 0.5


def broken(progress, step, options):
    return float("nan")
"""
RUN = [
    "epochs=20", "evaluators=[]", "eval_max_batches=1", "keep_checkpoints=null", "lr=1e-3",
    "lr_warmup_steps=1",
]  # fmt: skip


@pytest.fixture
def stairs(write_plugin):
    write_plugin(PACKAGE, "stairs", STAIRS)


def factors(*overrides: str, steps: int = 100) -> list[float]:
    """The factor at every step of a run."""
    config = make_config("unused", "epochs=null", f"max_steps={steps}", *overrides)
    schedule = Schedule(config, SimpleNamespace(total_steps=None, progress=0.0))
    states = (SimpleNamespace(step=step, seconds=0.0) for step in range(1, steps + 1))
    return [schedule.learning_rate_factor(state) for state in states]


def test_the_cosine_is_the_default_and_the_warm_up_multiplies_it():
    found = factors("lr_warmup_steps=10", "lr_min_ratio=0.07")
    for step, factor in enumerate(found, 1):
        least = 0.07 + (1 - 0.07) * (1 + math.cos(math.pi * (step / 100))) / 2
        assert factor == min(1.0, step / 10) * least
    assert factors("lr_schedule=cosine", "lr_warmup_steps=10", "lr_min_ratio=0.07") == found


@pytest.mark.parametrize("warmup", [0, 10, 200])
def test_under_feed_present_the_cosine_is_that_of_trm(warmup):
    """TRM's function, from its pretrain.py."""

    def trm(step, num_warmup_steps, num_training_steps, min_ratio):
        if step < num_warmup_steps:
            return float(step) / float(max(1, num_warmup_steps))
        progress = float(step - num_warmup_steps) / float(
            max(1, num_training_steps - num_warmup_steps)
        )
        return min_ratio + max(
            0.0, (1 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress))
        )

    found = factors("feed=present", f"lr_warmup_steps={warmup}", "lr_min_ratio=0.2")
    assert found == [trm(step, warmup, 100, 0.2) for step in range(1, 101)]


def test_warm_up_stable_decay():
    given = ["lr_warmup_steps=10", "lr_min_ratio=0.1"]
    found = factors("lr_schedule=wsd", *given)
    assert found[4] == 0.5 and set(found[9:80]) == {1.0}
    assert found[89] == pytest.approx(0.55) and found[99] == pytest.approx(0.1)
    assert found[79:] == sorted(found[79:], reverse=True)
    half = factors("lr_schedule={name: wsd, decay: 0.5, shape: sqrt}", *given)
    assert half[49] == 1.0 and half[61] < 0.6 and half[99] == pytest.approx(0.1)
    cosine = factors("lr_schedule={name: wsd, decay: 1, shape: cosine}", *given)
    assert cosine == pytest.approx(factors(*given))
    late = factors("lr_schedule=wsd", *given, "feed=present")  # of what follows the warm-up
    assert late[81] == 1.0 and late[82] < 1.0 and late[99] == pytest.approx(0.1)


def test_constant_stays_at_the_peak():
    found = factors("lr_schedule=constant", "lr_warmup_steps=10")
    assert found[:9] == [step / 10 for step in range(1, 10)] and set(found[9:]) == {1.0}


def test_one_of_one_s_own_trains_and_resumes_bit_for_bit(text_corpus, run_training, stairs):
    options = [*RUN, "max_steps=4", "lr_schedule={name: stairs@stairs, steps: 2}"]
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=2")
    rates = [1e-3, 0.5e-3, 0.5e-3, 0.1e-3]
    assert metrics_of(whole, "train/lr") == pytest.approx(rates)
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_2'}")
    assert differing(whole / "step_4", parts / "step_4") == []
    saved = yaml.safe_load((whole / "config.yaml").read_text("utf-8"))
    assert saved["lr_schedule"] == {"name": "stairs@stairs", "steps": 2}


def test_one_without_options_needs_none_declared(stairs):
    assert factors("lr_schedule=stairs@half", "lr_min_ratio=0.1") == [0.5] * 100


def test_another_schedule_is_refused_unless_it_is_allowed(text_corpus, run_training):
    step = run_training(text_corpus, "run", *RUN, "max_steps=1") / "step_1"
    options = [*RUN, "max_steps=2", "resume_allow=[max_steps]", f"resume={step}"]
    for change in ("lr_schedule=constant", "lr_schedule={name: wsd, decay: 0.5}"):
        with pytest.raises(UserError) as error:
            run_training(text_corpus, "other", *options, change)
        assert "lr_schedule (was cosine" in str(error.value)
        (offered,) = re.findall(r"resume_allow=\[(.*?)\]", str(error.value))
        assert offered == "max_steps,lr_schedule"
    options[-2] = f"resume_allow=[{offered}]"
    run = run_training(text_corpus, "allowed", *options, "lr_schedule=constant")
    assert metrics_of(run, "train/lr")[-1] == 1e-3


def test_a_run_from_before_the_key_had_the_cosine():
    saved = dump_config(make_config("x"))
    del saved["lr_schedule"]
    assert changed_keys(make_config("x"), saved) == ({}, [])
    changed, _ = changed_keys(make_config("x", "lr_schedule=wsd"), saved)
    assert changed["lr_schedule"] == ("cosine", "wsd")


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("cosin", ["'cosin'", "constant, cosine, wsd", "did you mean 'cosine'?"]),
        ("half", ["'half'", "did you mean 'stairs@half'?"]),
        ("stair@half", ["'stair@half'", "did you mean 'stairs'?"]),
        ("stairs@hal", ["'stairs@hal'", "function", "did you mean 'half'?"]),
        ("stairs@StairsOptions", ["'stairs@StairsOptions'", "function"]),
        ("{name: wsd, decy: 0.1}", ["'lr_schedule.decy'", "did you mean 'lr_schedule.decay'?"]),
        ("{name: wsd, decay: 0}", ["lr_schedule.decay", "greater than 0"]),
        ("{name: wsd, shape: liner}", ["lr_schedule.shape", "did you mean 'linear'?"]),
        ("{name: wsd, lr_min_ratio: 0.2}", ["lr_schedule.lr_min_ratio", "remove it"]),
        ("{name: stairs@half, steps: 3}", ["'lr_schedule.steps'"]),
        ("[wsd]", ["lr_schedule", "module@function", "'wsd'"]),
    ],
)
def test_mistakes_are_answered_with_the_nearest(stairs, given, needed):
    with pytest.raises(UserError) as error:
        make_config("unused", f"lr_schedule={given}")
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in needed), line


def test_a_factor_that_is_no_number_stops_the_run(stairs):
    with pytest.raises(UserError, match=r"stairs@broken.*nan.*step 1\b"):
        factors("lr_schedule=stairs@broken")
