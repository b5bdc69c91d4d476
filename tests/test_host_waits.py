"""How often the host waits for the device: what a GPU does meanwhile is nothing."""

import itertools

import pytest
import torch
from fake_tools import PRESETS, config_of
from host_waits import CountingBackend, HostWaits
from training_tools import IDENTIFIERS, make_config

from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from models.inference.sampling import Sampling
from models.layers import visible
from pretrain import train
from utils.config.schema import PretrainConfig

SHORT = [
    *IDENTIFIERS, "max_steps=4", "epochs=20", "evaluators=[]", "log_interval=100", "seed=3",
    "checkpoint_every_eval=false", "ema_rate=0.9", "grad_clip_norm=0.5", "eval_max_batches=1",
]  # fmt: skip
REFINED = "arch.post_refinement_steps=1"


def counted(corpus, folder, *options) -> HostWaits:
    return count(make_config(corpus, f"checkpoint_path={folder}", "run_name=x", *SHORT, *options))


def count(config: PretrainConfig) -> HostWaits:
    waits = HostWaits()
    with waits:
        assert train(CountingBackend(waits), config) == 0
    return waits


def later_steps(waits: HostWaits) -> list[dict[str, int]]:
    """The waits of the third and the fourth step; the first makes the carries, and before the
    second the first is logged."""
    return [dict(stretch) for stretch in waits.stretches[3:5]]


@pytest.mark.parametrize(
    ("optimizer", "feed", "loss", "more"),
    [
        ("adam_atan2", "consume", "stablemax", [REFINED, "arch.post_refinement_train=true"]),
        ("adamw", "present", "stablemax", [REFINED, "grad_accum_steps=2"]),
        ("muon", "consume", "softmax", ["arch.document_mask=false", "arch.no_ACT_continue=false"]),
        ("adam_atan2", "present", "softmax", ["freeze_weights=true"]),
        ("adamw", "consume", "softmax", ["arch.loss.halt_target=plateau"]),
        ("muon", "present", "stablemax", ["arch.use_gradient_checkpointing=true"]),
        ("adam_atan2", "consume", "softmax", ["near a base"]),
    ],
)
def test_a_training_step_waits_once_for_what_has_halted(
    optimizer, feed, loss, more, text_corpus, text_run, tmp_path
):
    if more == ["near a base"]:
        more = [f"arch.loss.kl_to={text_run}", "arch.loss.kl_weight=0.1"]
    waits = counted(
        text_corpus, tmp_path, f"optimizer={optimizer}", f"feed={feed}",
        f"arch.loss.loss_type={loss}_cross_entropy", *more,
    )  # fmt: skip
    assert later_steps(waits) == [{"to_host": 1}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "ema", "micro_batches"),
    [*itertools.product(("adam_atan2", "adamw", "muon"), ("true", "false"), (1, 2))],
)
def test_a_step_waits_once_with_every_optimizer(
    optimizer, ema, micro_batches, text_corpus, tmp_path
):
    options = [f"optimizer={optimizer}", f"ema={ema}", f"grad_accum_steps={micro_batches}"]
    waits = counted(text_corpus, tmp_path, *options, "arch.forward_dtype=bfloat16")
    assert later_steps(waits) == [{"to_host": 1}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["true", "false"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_waits_once_in_every_preset(preset, fast, text_corpus, tmp_path):
    folders = [f"data_paths=[{text_corpus}]", f"checkpoint_path={tmp_path}", "run_name=x"]
    run = [*folders, *SHORT, f"fast={fast}", "device_type=cpu", "logger=[]"]
    waits = count(config_of(preset, *run))
    assert later_steps(waits) == [{"to_host": 1}] * 2


def test_a_step_that_logs_waits_once_more(text_corpus, tmp_path):
    """All metrics in one transfer; they are read after the step, in the stretch of the next."""
    waits = counted(text_corpus, tmp_path, "log_interval=1", "grad_accum_steps=2")
    assert later_steps(waits) == [{"to_host": 1, "tolist": 1}] * 2


@pytest.mark.parametrize(("refined", "expected"), [(False, {}), (True, {"_local_scalar_dense": 1})])
def test_a_step_of_an_evaluation_waits_for_what_is_to_be_refined_alone(
    refined, expected, text_corpus, text_run, tmp_path
):
    """Untrained refinement runs where rows have halted, so it looks whether any has."""
    given = [f"load_checkpoint={text_run}", "eval_only=true", "eval_max_batches=2"]
    given += [f"arch.post_refinement_steps={int(refined)}"]
    waits = counted(text_corpus, tmp_path, *given, "arch.loss.loss_type=stablemax_cross_entropy")
    # of a batch: its carry, four ACT steps, its end; what is read at last comes after them
    assert len(waits.stretches) == 2 * 6 + 1
    for batch in (waits.stretches[:6], waits.stretches[6:12]):
        assert [dict(stretch) for stretch in batch[1:5]] == [expected] * 4
        assert dict(batch[5]) == {}
    assert dict(waits.stretches[6]) == {}, "between two batches"


def test_the_mask_of_flex_attention_waits_for_nothing():
    """It is built for a GPU, in each step, but can be built anywhere."""
    waits, starts = HostWaits(), (torch.arange(300) // 70 * 70).int().expand(2, -1)
    with waits:
        mask = visible(starts, 3, True, "flex")
    assert waits.total() == {} and mask.kv_indices.shape[-1] == 3


@pytest.fixture
def model(text_run) -> LanguageModel:
    return load_language_model(text_run, refinement=0)


def test_scoring_waits_for_its_results_alone(model):
    waits = HostWaits()
    model.backend = CountingBackend(waits)
    with waits:
        model.score([([1, 2, 3], [4, 5]), ([6], [7, 8, 9])])
    assert waits.total() == {"cpu": 1, "tolist": 2}  # one `tolist` is of numbers on the host


def test_a_generated_token_waits_once_whatever_the_rows(model):
    how = Sampling(max_new_tokens=6, temperature=0)
    totals = []
    for rows in (1, 4):
        waits = HostWaits()
        with waits:
            model.write([[1, 2, 3, 4 + row] for row in range(rows)], how)
        totals.append(waits.total())
    assert totals[0]["cpu"] == totals[1]["cpu"] == 6
