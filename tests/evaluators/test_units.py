"""What evaluators read and refuse, and how views of a grid are put together and voted on."""

import json

import numpy as np
import pytest
import torch
from seeds import draw_rng

from dataset.common import DatasetMetadata
from evaluators.examples import pick_evenly, read_json_lines
from evaluators.generation import GenerationEvaluator
from evaluators.puzzle import ExactMatchEvaluator, View, vote
from evaluators.tasks import MultipleChoiceEvaluator
from models.inference.language_model import Score
from utils.core.errors import UserError
from utils.core.functions import load_class


def metadata(**changes) -> DatasetMetadata:
    values = dict(
        pad_id=0, eos_id=1, ignore_label_id=None, vocab_size=11, seq_len=16, total_groups=1,
        num_puzzle_identifiers=1, mean_puzzle_examples=1, total_puzzles=1, relabel_ids=(2, 11),
    )  # fmt: skip
    return DatasetMetadata(**values | changes)


def lines(folder, *records, name="task.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def tasks(path: str, **options) -> MultipleChoiceEvaluator:
    return MultipleChoiceEvaluator("", metadata(), path=path, **options)


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [1, "1", "B", "second one", "y"])
def test_the_right_choice_may_be_named_in_many_ways(answer, tmp_path):
    choices = {"text": ["first", "second one"], "label": ["x", "y"]}
    record = {"question": "which?", "choices": choices, "answerKey": answer}
    item = tasks(lines(tmp_path, record), delimiter="\nAnswer: ").items[0]
    assert item.answer == 1 and item.solved() == "which?\nAnswer: second one"


def test_the_last_word_of_a_text_is_asked_for(tmp_path):
    assert tasks(lines(tmp_path, {"text": "one two three\n"})).items[0].pairs == [
        ("one two", " three")
    ]


@pytest.mark.parametrize(
    "text, pair",
    [
        ("end of line\nlast", ("end of line\n", "last")),
        ("one\ttwo ", ("one\t", "two")),
        ("one\u3000two", ("one\u3000", "two")),
        ("one \n  two\n\n", ("one \n ", " two")),
        ("alone", ("", "alone")),
    ],
)
def test_any_white_space_may_stand_before_the_last_word(text, pair, tmp_path):
    assert tasks(lines(tmp_path, {"text": text})).items[0].pairs == [pair]


@pytest.mark.parametrize(
    "question, delimiter, choice, whole",
    [
        ("q?", " ", " a", "q? a"),
        ("q?", " ", "a", "q? a"),
        ("q?", " ", "\n  a", "q?\n  a"),
        ("q?", "\nAnswer: ", " a", "q?\nAnswer: a"),
        ("q?", "\n", " a", "q?\n a"),
        ("q? ", " ", "a", "q? a"),
        ("q?\n", " ", "a", "q?\na"),
        ("q?\n", "\nAnswer: ", "a", "q?\n\nAnswer: a"),
        ("q?", "", " a", "q? a"),
    ],
)
def test_a_delimiter_is_not_doubled(question, delimiter, choice, whole, tmp_path):
    records = [
        {"question": question, "choices": [choice, "b"], "answer": 0},
        {"context_options": [question, "r"], "continuation": choice, "answer": 0},
    ]
    for record in records:
        item = tasks(lines(tmp_path, record), delimiter=delimiter).items[0]
        assert item.solved() == whole
    path = lines(tmp_path, {"context": question, "continuation": choice})
    (pair,) = tasks(path, delimiter=delimiter).items[0].pairs
    assert "".join(pair) == whole


@pytest.mark.parametrize(
    "record, says",
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "'answer' holds 2"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "'choices' holds ['a']"),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "is empty"),
        ({"context": "q", "continuation": ""}, "is empty"),
        ({"choices": ["a", "b"], "answer": 0}, "no key 'question'"),
        ({"story": "x"}, "no task format has the keys story"),
        ({"context": 3, "continuation": "x"}, "'context' holds 3"),
    ],
)
def test_a_faulty_example_is_named_with_its_line(record, says, tmp_path):
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(UserError, match=r"task\.jsonl, line 2: .*") as error:
        tasks(lines(tmp_path, good, record), delimiter="\nAnswer: ")
    assert says in str(error.value)


def test_solved_examples_are_drawn_without_the_question_itself(tmp_path):
    records = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
    path = lines(tmp_path, *records)
    for i, shots in enumerate(tasks(path, num_few_shot=3).shots):
        others = [f"q{k} {'ab'[k % 2]}\n\n" for k in range(4) if k != i]
        assert sorted(shots.split("\n\n")[:3]) == sorted(o.strip() for o in others)
    with pytest.raises(UserError, match="num_few_shot=4, but only 3"):
        tasks(path, num_few_shot=4)
    other = lines(tmp_path, *records[:1], name="other.jsonl")
    assert tasks(path, num_few_shot=1, few_shot_path=other).shots == ["q0 a\n\n"] * 4
    pairs = lines(tmp_path, *[{"sentence_good": "a", "sentence_bad": "b"}] * 3, name="pairs.jsonl")
    with pytest.raises(UserError, match="does not apply"):
        tasks(pairs, num_few_shot=1)


class Costs:
    """A model that charges as many nats for each choice as a test decides."""

    steps = window = 1

    def __init__(self, nats: list[float]) -> None:
        self.nats = nats

    def encode_pair(self, context: str, continuation: str) -> tuple[str, str]:
        return context, continuation

    def score(self, pairs, identifier=None) -> list[Score]:
        return [Score(nats, False) for nats in self.nats]


def accuracies(path: str, nats: list[float], **options) -> dict[str, float]:
    evaluator = tasks(path, **options)
    evaluator.examine(Costs(nats), None)
    return {name.split("/")[-1]: value for name, value in evaluator.result(None, 0, 1).items()}


@pytest.mark.parametrize(
    "choices, nats, answer",
    [
        (["ab", "abcdefgh"], [4.0, 10.0], 1),  # 2 and 1.25 nats a character
        (["ab", "犬犬犬"], [4.0, 6.5], 0),  # 2 and 2.17; of bytes the second would be the better
    ],
)
def test_choices_are_normalised_by_their_own_characters(choices, nats, answer, tmp_path):
    """With the delimiter the first would be ahead: 4/10 nats against 10/16."""
    path = lines(tmp_path, {"question": "q", "choices": choices, "answer": answer})
    found = accuracies(path, nats, delimiter="\nAnswer: ")
    assert found["accuracy_norm"] == 1 and found["accuracy"] == (answer == 0)


@pytest.mark.slow
def test_accuracy_norm_is_that_of_the_harness(tmp_path):
    api = pytest.importorskip("lm_eval.api.task")
    rng = draw_rng()
    differ = 0
    for number in range(40):
        choices = ["".join(rng.choice(list("ab é犬"), n)) + "x" for n in rng.integers(1, 9, 3)]
        record = {"question": "q", "choices": choices, "answer": int(rng.integers(3))}
        path = lines(tmp_path, record, name=f"{number}.jsonl")
        nats = rng.uniform(1, 12, 3).tolist()
        if number == 0:
            task = api.ConfigurableTask(config={
                "task": "choices", "dataset_path": "json", "test_split": "train",
                "dataset_kwargs": {"data_files": path}, "output_type": "multiple_choice",
                "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
                "doc_to_target": "answer", "target_delimiter": "\nAnswer: ",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            })  # fmt: skip
        wanted = task.process_results(record, [(-value, False) for value in nats])
        found = accuracies(path, nats, delimiter="\nAnswer: ")
        assert found["accuracy"] == wanted["acc"]
        assert found["accuracy_norm"] == wanted["acc_norm"], (choices, nats)
        differ += wanted["acc"] != wanted["acc_norm"]
    assert differ


def test_a_limit_takes_examples_from_all_over_the_file(tmp_path):
    assert pick_evenly(10, 3) == [0, 3, 6] and pick_evenly(2, 5) == [0, 1]
    records = [{"text": f"a {i}"} for i in range(10)]
    found = tasks(lines(tmp_path, *records), limit=3).items
    assert [item.pairs[0][1] for item in found] == [" 0", " 3", " 6"]


def test_files_may_be_compressed_and_must_be_json(tmp_path):
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b"}\n\n{"text": "c d"}'))
    found = read_json_lines(str(tmp_path / "a.jsonl.gz"))
    assert [record["text"] for _, record in found] == ["a b", "c d"]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n[1]\n', "utf-8")
    with pytest.raises(UserError, match="line 2"):
        read_json_lines(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("\n", "utf-8")
    with pytest.raises(UserError, match="path="):
        read_json_lines(str(tmp_path / "c.jsonl"))


def test_only_line_feeds_end_a_line_and_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "task.jsonl"
    text = "one\u2028two\x85three last"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path.write_bytes(f"\ufeff{line}\r\n{line}\r\n".encode())
    assert [record["text"] for _, record in read_json_lines(str(path))] == [text, text]
    path.write_text(json.dumps([{"text": "a b"}], indent=1), "utf-8")
    with pytest.raises(UserError, match=r"task\.jsonl, line 1.*array.*jq"):
        read_json_lines(str(path))
    path.write_text('{"question": "q", "choices": ["a", "\\ud800"], "answer": 0}\n', "utf-8")
    with pytest.raises(UserError, match=r"line 1: .*'choices' holds .*surrogate"):
        tasks(str(path))


def test_a_response_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    path = lines(tmp_path, {"prompt": "p", "response": 72})
    with pytest.raises(UserError, match=r"line 1: .*'response'"):
        GenerationEvaluator("", metadata(), path=path)


def test_answers_are_found_by_pattern_and_functions_by_path(tmp_path, monkeypatch):
    path = lines(tmp_path, {"prompt": "p", "response": "so\n#### 72"})
    evaluator = GenerationEvaluator("", metadata(), path=path, answer_pattern=r"#### (\S+)")
    assert evaluator._answer("6 x 12\n#### 70, no\n#### 72\n") == "72"
    assert evaluator._answer("72") is None
    for options, says in (
        ({"answer_pattern": "("}, "answer_pattern="),
        ({"score_function": "nowhere"}, "package.module:function"),
        ({"score_function": "no_such_module:f"}, "cannot be imported"),
        ({"score_function": "json:f"}, "json has no function f"),
    ):
        with pytest.raises(UserError, match=says):
            GenerationEvaluator("", metadata(), path=path, **options)


def test_evaluators_are_found_by_the_names_that_the_documents_give():
    for name in ("text@PerplexityEvaluator", "halting@HaltingEvaluator",
                 "puzzle@ExactMatchEvaluator", "tasks@MultipleChoiceEvaluator",
                 "generation@GenerationEvaluator"):  # fmt: skip
        assert load_class(name, "evaluators.").__name__ == name.partition("@")[2]


# --- grids -------------------------------------------------------------------------------------


def test_every_view_can_be_undone():
    for options in ({"geometry": "dihedral"}, {"geometry": "flips", "grid": [2, 8]}, {}):
        views = ExactMatchEvaluator("", metadata(), views=3, **options).views
        rows = draw_rng().integers(0, 11, (5, 16))
        assert np.array_equal(views[0].show(rows), rows)
        shown = [view.show(rows) for view in views]
        assert all(np.array_equal(v.undo(s), rows) for v, s in zip(views, shown, strict=True))
        assert len({s.tobytes() for s in shown}) == len(views)
        for s in shown:  # ids that are no digits keep their names
            assert np.array_equal(np.sort(s[s < 2]), np.sort(rows[rows < 2]))


def test_views_of_a_grid_are_its_eight_symmetries():
    views = ExactMatchEvaluator("", metadata(seq_len=9), geometry="dihedral").views
    grid = np.arange(9).reshape(3, 3)
    turned = {np.rot90(g, k).tobytes() for g in (grid, grid.T) for k in range(4)}
    assert {view.show(grid.reshape(1, 9)).tobytes() for view in views} == turned


@pytest.mark.parametrize(
    "options, says",
    [
        ({"geometry": "dihedral", "grid": [2, 8]}, "geometry=flips"),
        ({"geometry": "flips", "grid": [3, 8]}, "the 16 cells"),
        ({"views": 2}, "no ids that may be renamed"),
    ],
)
def test_grids_that_do_not_fit_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        ExactMatchEvaluator("", metadata(relabel_ids=None), **options)


class Solver:
    """A model that solves a grid (each cell + 1) in most views, and in others misses a cell."""

    def __init__(self, wrong: set[int]):
        self.wrong, self.calls = wrong, 0

    def predict(self, batch):
        self.calls += 1
        answer = np.where(batch["inputs"] >= 2, batch["inputs"], 2)
        if self.calls in self.wrong:
            answer[:, 0] = np.where(answer[:, 0] == 2, 3, 2)
        return answer, np.zeros(len(answer))


class Alone:
    def gather_objects(self, value):
        return [value]


def test_the_answer_of_most_views_wins():
    """Blanks (id 0) stand for the id 2, which no renaming may touch here."""
    evaluator = ExactMatchEvaluator("", metadata(relabel_ids=(3, 11)), views=5)
    inputs = torch.from_numpy(draw_rng().choice([0, 4, 5, 6], (6, 16)))
    labels = torch.where(inputs == 0, 2, inputs)
    labels[:, 5] = -100  # not asked for
    preds = labels.clone()
    preds[:, 1] = 10  # as it is, every row is wrong
    evaluator.update_batch(
        {"inputs": inputs, "labels": labels}, {"preds": preds, "valid": torch.ones(6, dtype=bool)}
    )
    evaluator.examine(Solver(wrong={2}), Alone())
    found = evaluator.result(None, 0, 1)
    assert found is not None and found["puzzle/exact_accuracy"] == 0
    assert found["puzzle/cell_accuracy"] == pytest.approx(14 / 15)
    assert found["puzzle/voted/exact_accuracy"] == 1
    assert found["puzzle/voted/agreement"] == pytest.approx(3 / 5)


def test_equal_votes_go_to_the_surest_answer():
    labels = np.array([[1, 2]])
    answers = np.array([[[1, 2]], [[1, 1]], [[2, 2]]])
    for sure, first, two in (([5, 1, 0], 1, 1), ([0, 5, 4], 0, 0), ([4, 0, 5], 0, 1)):
        found = vote(answers, np.array(sure, dtype=float)[:, None], labels)
        assert found["voted/exact_accuracy"] == first and found["voted/within_two"] == two


def test_a_view_renames_and_moves():
    view = View(np.array([1, 0]), np.array([0, 2, 1]))
    assert view.show(np.array([[1, 0]])).tolist() == [[0, 2]]
