"""scripts/estimate.py: what it advises holds, and a mistake ends in a sentence."""

import re

import pytest
import torch
from seeds import draw_rng

from models.cost import evaluation_flops
from models.recursive_reasoning.athena_trm import AthenaTRM
from scripts import estimate
from scripts.estimate import Plan, plan
from utils.core.errors import UserError


def printed(capsys, *arguments: str) -> str:
    estimate.main(arguments)
    return capsys.readouterr().out


@pytest.mark.slow
def test_advice_for_a_model_that_does_not_fit_fits(capsys):
    """Each setting that is named, given back, is what was promised."""
    given = ["arch=athena_trm_large", "hardware=4060", "tokens=1e9"]
    out = printed(capsys, *given)
    assert "DOES NOT FIT" in out and "210 (30 with gradient)" in out
    advice = re.findall(
        r"^    (\S+=\S+(?: \S+=\S+)*): ([\d.]+ [GM]B).*?, ([\d.,]+ \w+), \$", out, re.M
    )
    assert len(advice) >= 4
    options, overrides = estimate.parse(given)
    for settings, memory, time in advice[:2]:
        again = plan(options, estimate.changed(overrides, settings.split()))
        assert (estimate.format_bytes(again.total), estimate.duration(again.seconds)) == (
            memory,
            time,
        )
        assert again.fits


def test_this_machine_is_measured_once():
    """Or noise would make one of two equal plans the cheaper one."""
    options, overrides = estimate.parse(["arch=athena_trm_tiny", "hardware=cpu", "tokens=1e9"])
    one, two = (plan(options, overrides) for _ in range(2))
    assert (one.seconds, one.memory) == (two.seconds, two.memory)


@pytest.mark.slow
def test_what_is_set_already_is_not_advised(capsys):
    given = ["arch=athena_trm_small", "arch.halt_max_steps=8", "hardware=4060", "tokens=1e12"]
    offered = re.findall(r"^    (\S+=\S+(?: \S+=\S+)*): ", printed(capsys, *given), re.M)
    assert "arch.H_cycles=3" in offered
    assert not any(key in " ".join(offered) for key in ("arch=athena_trm_small", "halt_max_steps"))


def test_time_and_money_follow_from_flops_and_price():
    options, overrides = estimate.parse(
        "arch=athena_trm_small hardware=a100 devices=4 tokens=1e9 utilisation=0.5 price=2".split()
    )
    found = plan(options, overrides)
    rate = 4 * 312e12 * 0.5
    assert found.seconds == pytest.approx(1e9 * found.act_steps * found.counted.train_flops / rate)
    assert found.money == pytest.approx(found.seconds / 3600 * 4 * 2)
    decoder = plan(options, estimate.changed(overrides, ["arch=transformer"]))
    assert decoder.act_steps == 1


def test_expected_steps_are_those_of_the_halting_rule():
    sizes = dict(batch_size=1, seq_len=8, vocab_size=9, hidden_size=16, num_heads=2)
    model = AthenaTRM(sizes | dict(halt_max_steps=9, halt_exploration_prob=0.9, force_min_steps=2))
    budgets = torch.from_numpy(draw_rng().integers(0, 12, 40_000))
    budgets[budgets == 11] = 0  # none
    targets = torch.where(budgets == 0, 99, budgets)
    q = torch.full(budgets.shape, -5.0)
    steps = torch.zeros(len(budgets), dtype=torch.int32)
    running = torch.ones(len(budgets), dtype=torch.bool)
    model.train()
    while running.any():
        steps += running
        drawn = model.row_options(0.0, draw_rng(), len(budgets))["explore"]
        halts = model.halts(steps, q, q, {"iteration_targets": targets}, torch.from_numpy(drawn))
        running &= ~halts
    expected = [model.expected_steps(budget) for budget in budgets.tolist()]
    assert sum(expected) / len(expected) == pytest.approx(steps.float().mean().item(), rel=0.01)


def test_a_corpus_brings_its_sizes_and_budgets(text_corpus, capsys):
    """Budgets are 1..5 there; rows halt when theirs are spent."""
    given = [f"data_paths=[{text_corpus}]", "arch=athena_trm_tiny", "hardware=cpu"]
    given += ["arch.force_min_steps=0", "arch.halt_exploration_prob=0"]
    options, overrides = estimate.parse(given)
    found = plan(options, overrides)
    assert found.counted.seq_len == 24 and 1 < found.act_steps < 5
    lifted = plan(options, [*overrides, "min_iterations=7"])
    assert lifted.act_steps == 7
    assert "iteration_targets" in printed(capsys, *given)


@pytest.mark.slow
def test_what_changes_the_work_of_a_run_is_counted(text_run):
    """The base of kl_to, budgets that grow, the architecture of the checkpoint it starts from."""

    def planned(*keys: str) -> Plan:
        options, overrides = estimate.parse(["hardware=cpu", "tokens=1e6", *keys])
        return plan(options, overrides)

    tiny = ["arch=athena_trm_tiny", "vocab_size=300", "seq_len=64", "global_batch_size=8"]
    plain = planned(*tiny)
    near = planned(*tiny, "loss.kl_to=base", "loss.kl_weight=1")
    one, two = (evaluation_flops(plain.model, depth) for depth in (1, 2))
    heads = plain.model.config.hidden_size * (2 * 300 + 4 / 64)  # of each token, of a row
    base = two - one + heads
    added = near.counted.train_flops - plain.counted.train_flops
    assert added == pytest.approx(base)
    growing = planned(*tiny, "iteration_curriculum={start: 0.5, until: 1}", "min_iterations=1")
    assert 1 < growing.act_steps < 0.85 * planned(*tiny, "min_iterations=1").act_steps
    assert planned(f"load_checkpoint={text_run}", *tiny[1:]).model.config.hidden_size == 32


@pytest.mark.slow
def test_presets_side_by_side(capsys):
    out = printed(capsys, "arch=athena_trm_tiny,transformer", "hardware=h200")
    assert re.search(r"^layer passes per ACT step +12 .* 5 ", out, re.M)


def test_measurement_stands_beside_the_estimate(capsys):
    out = printed(
        capsys,
        *"arch=athena_trm_tiny measure=true device_type=cpu vocab_size=99 seq_len=32".split(),
    )
    ratio = float(re.search(r"^  total .* ([\d.]+)$", out, re.M)[1])
    assert 0.85 < ratio < 1.15
    assert re.search(r"in [\d.]+ s, utilisation=0\.\d+", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hardwre=h200"], "did you mean 'hardware'"),
        (["hardware=b200"], "h200, h100, a100"),
        (["hardware=v48"], "did you mean 'v4-8'"),
        (["lrr=1"], "did you mean 'lr'"),
        (["utilisation=2"], "utilisation must be at most 1"),
        (["devices=5", "global_batch_size=16"], "not a multiple of 5"),
        (["hardware=a100", "arch.forward_dtype=float64"], "no known rate"),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_sentence(arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        estimate.run(["arch=athena_trm_tiny", *arguments])
