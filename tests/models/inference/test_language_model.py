"""A checkpoint as a language model: its own probabilities, only from the text so far."""

import math

import numpy as np
import pytest
import torch
from dispatch_tools import Shapes
from seeds import draw_rng
from training_tools import altered, next_probabilities

from dataset.common import IGNORE_LABEL_ID
from models.build import load_into
from models.inference.language_model import LanguageModel
from models.inference.loading import build_model, load_language_model
from models.inference.sampling import Sampling
from utils.checkpoint.format import load_weights
from utils.core.errors import UserError


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


DEPTHS = {
    "all steps": {},
    "act": dict(eval_halting="act"),
    "fixed, prefix": dict(eval_halting="fixed", eval_steps=3, puzzle_emb_ndim=40),
    "act, learned positions": dict(eval_halting="act", pos_encodings="learned"),
    "pre-norm": dict(norm_type="pre", post_refinement_steps=0),
}


def scored_with_a_mask(model: LanguageModel, pairs) -> list[float]:
    """Nats of each pair, padding kept out of the attention by a document mask."""
    length = max(len(context) + len(after) - 1 for context, after in pairs)
    inputs = torch.zeros(len(pairs), length, dtype=torch.int32)
    labels = torch.full_like(inputs, IGNORE_LABEL_ID)
    starts = torch.full_like(inputs, length)
    for i, (context, after) in enumerate(pairs):
        ids = torch.tensor([*context, *after], dtype=torch.int32)
        inputs[i, : len(ids) - 1] = ids[:-1]
        labels[i, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
        starts[i, : len(ids) - 1] = 0
    identifiers = torch.full((len(pairs),), model.identifier, dtype=torch.int32)
    batch = dict(
        inputs=inputs, labels=labels, puzzle_identifiers=identifiers, document_starts=starts
    )
    with torch.no_grad():
        carry = model.head.initial_carry(batch)
        for _ in range(model.steps):
            carry, _, _, found, _ = model.head(return_keys=("token_nll",), carry=carry, batch=batch)
    return found["token_nll"].sum(-1).tolist()


@pytest.mark.parametrize("name", DEPTHS)
def test_padding_needs_no_mask_to_be_without_influence(name, trained):
    """Scores of texts of different lengths equal those under a document mask, which padding
    before this was hidden by; rows halt at depths of their own where evaluation lets them."""
    config = trained.config.model_dump() | {"forward_dtype": "float64"} | DEPTHS[name]
    model = type(trained.model)(config)
    if hasattr(model.inner, "q_head"):
        torch.nn.init.normal_(model.inner.q_head.weight, std=3.0)
        model.inner.q_head.bias.data.zero_()
    head = type(trained.head)(model, **trained.head.config.model_dump()).eval()
    lm = LanguageModel(head, trained.metadata, trained.identifiers, trained._tokenizer)
    pairs = [(random_ids(lm, c), random_ids(lm, a)) for c, a in ((1, 1), (3, 20), (15, 8), (6, 2))]
    found = [score.nats for score in lm.score(pairs)]
    assert found == pytest.approx(scored_with_a_mask(lm, pairs), abs=1e-6)
    alone = [lm.score([pair])[0].nats for pair in pairs]
    assert found == pytest.approx(alone, abs=1e-6)


def test_scoring_takes_no_memory_of_the_square_of_a_length(trained):
    """A mask of all pairs would take gigabytes at 2,048 tokens."""
    pair = (random_ids(trained, 5), random_ids(trained, 15))
    positions = 19 + trained.config.prefix_len
    with Shapes() as shapes:
        trained.score([pair, pair])
    assert any(19 in shape for shape in shapes.seen)
    assert shapes.squares(19, positions) == []


def test_views_are_answered_alike_in_batches_of_any_size(trained):
    """The last batch is filled up, so that a compiled model meets one shape."""
    rows = {"inputs": draw_rng().integers(2, 200, (5, trained.window)).astype(np.int32)}
    rows["puzzle_identifiers"] = np.full(5, trained.identifier, dtype=np.int32)
    former = trained.rows
    try:
        trained.rows = 8
        preds, sure = trained.predict(rows)
        trained.rows = 2
        others = trained.predict(rows)
    finally:
        trained.rows = former
    assert np.array_equal(preds, others[0])
    assert sure == pytest.approx(others[1], abs=1e-4)
