"""A checkpoint as a language model: its own probabilities, only from the text so far."""

import math

import pytest
import torch
from seeds import draw_rng
from training_tools import altered, next_probabilities

from dataset.common import UserError
from models.language_model import LanguageModel
from models.loading import build_model, load_language_model
from models.train_state import load_into
from utils.checkpoint import load_weights
from utils.sampling import Sampling


@pytest.fixture(scope="module")
def trained(text_run) -> LanguageModel:
    return load_language_model(text_run, identifier="poems")


def random_ids(model: LanguageModel, length: int) -> list[int]:
    return draw_rng().integers(2, model.metadata.vocab_size, length).tolist()


def test_scores_are_those_of_a_naive_loop(trained):
    """Contexts and continuations of any length in one call, each token from its own forward."""
    pairs = [(random_ids(trained, c), random_ids(trained, a)) for c, a in ((1, 1), (3, 9), (15, 8))]
    best = [int(next_probabilities(trained, pairs[1][0]).argmax())]
    pairs.append((pairs[1][0], best))
    for (context, after), found in zip(pairs, trained.score(pairs), strict=True):
        nats = 0.0
        for n, token in enumerate(after):
            nats -= math.log(next_probabilities(trained, [*context, *after[:n]])[token])
        assert found.nats == pytest.approx(nats, rel=1e-4)
    assert trained.score(pairs)[-1].greedy


def test_what_is_longer_than_the_window_is_scored_in_parts(trained):
    """The window holds 24 tokens; every token is scored once, with half a window before it."""
    text = random_ids(trained, 90)
    nats = 0.0
    for begin in range(1, 90, 12):  # the last part takes what is left, if that fits in a window
        end = begin + 12 if begin < 73 else 90
        for n in range(begin, end if begin <= 73 else begin):
            seen = text[max(0, end - 25) : n]
            assert min(n, 8) <= len(seen) <= 24
            nats -= math.log(next_probabilities(trained, seen)[text[n]])
    assert trained.score([(text[:1], text[1:])])[0].nats == pytest.approx(nats, rel=1e-4)


def test_a_window_after_one_token_is_one_part(trained):
    """As windows of rolling log-likelihoods are; each part is a row to compute."""
    first, after = random_ids(trained, 1), random_ids(trained, 25)
    assert len(list(trained._in_windows(first, after[:24]))) == 1
    assert len(list(trained._in_windows(first, after))) == 2


def test_words_get_the_tokens_of_running_text(trained):
    before, after = trained.encode_pair("abc def ", "gh")
    assert before == trained.encode("abc def")
    assert trained.decode([*before, *after]) == "abc def gh"
    assert trained.encode_pair("", "gh")[0] == trained.encode("\n")


def test_steps_decide_the_depth(text_run, trained):
    deeper, shallow = (load_language_model(text_run, steps=n, identifier="poems") for n in (7, 1))
    assert (shallow.steps, trained.steps, deeper.steps) == (1, 4, 7)
    pair = [(random_ids(trained, 5), random_ids(trained, 5))]
    assert len({model.score(pair)[0].nats for model in (shallow, trained, deeper)}) == 3


def test_refinement_passes_can_be_chosen(text_run, trained):
    more = load_language_model(text_run, refinement=3, identifier="poems")
    assert (trained.config.post_refinement_steps, more.config.post_refinement_steps) == (1, 3)


def test_averaged_and_raw_weights_differ(text_run, trained):
    raw = load_language_model(text_run, "raw")
    name = "inner.lm_head.weight"
    assert not torch.equal(raw.model.state_dict()[name], trained.model.state_dict()[name])


def test_kept_weights_of_the_forward_dtype_change_nothing(text_run, tmp_path):
    """In bfloat16, where they are not cast any more for every token."""
    folder = altered(text_run, tmp_path / "bf16", arch={"forward_dtype": "bfloat16"})
    model = load_language_model(folder, identifier="poems")
    values, opened = load_weights(folder, "ema")
    plain, _ = build_model(opened)
    load_into(plain.model, values)
    assert model.model.inner.lm_head.weight.dtype == torch.bfloat16
    pair = [(random_ids(model, 5), random_ids(model, 9))]
    cast = model.score(pair)
    model.head = plain.eval()
    assert model.score(pair) == cast


def test_padding_and_ids_without_a_token_are_never_written(trained):
    assert trained.metadata.pad_id in trained.never_written()


def test_many_texts_are_those_of_one_by_one(trained):
    prompts, how = [random_ids(trained, n) for n in (2, 9, 4)], Sampling(max_new_tokens=6, seed=3)
    trained.rows = 2  # a batch for the shortest two, another for the last
    together = trained.write_all(prompts, how)
    for row, prompt in enumerate(prompts):
        assert trained.write([prompt], how, rows=[row])[0].ids == together[row].ids


def test_a_model_that_sees_the_future_is_refused(text_run, tmp_path):
    folder = altered(text_run, tmp_path / "both_ways", arch={"causal": False})
    with pytest.raises(UserError, match="not causal"):
        load_language_model(folder)


def test_depth_never_follows_the_rows(text_run, tmp_path):
    """A budget is computed from a whole row, which does not exist while it is being written."""
    folder = altered(text_run, tmp_path / "budget", arch={"eval_halting": "act"})
    assert load_language_model(folder).config.eval_halting == "max"


def test_a_run_of_several_ranks_loads_on_one(text_run, tmp_path):
    """8 rows as 2 ranks x 2 x 2 were right there; on one rank the same keys would clash."""
    folder = altered(text_run, tmp_path / "ranks", micro_batch_size=2, grad_accum_steps=2)
    load_language_model(folder)
