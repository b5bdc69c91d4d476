"""What a tokenizer.json brings: its ids are those that the corpus holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from training_tools import ROOT

from dataset.tokens.tokenization import TextTokenizer
from tests.dataset.conftest import write_jsonl
from tests.dataset.tokenizer_variants import byte_level, words

KINDS = {"BPE": byte_level, "WordLevel": lambda: words(pre_tokenizers.WhitespaceSplit())}


def with_holes(path: Path, kind: str, *added: tuple[str, int]) -> dict[str, int]:
    """Write a tokenizer whose first ids no token has; return its vocabulary."""
    description = json.loads(KINDS[kind]().to_str())
    template = description["added_tokens"][0]
    gone = {"<pad>", "</s>"}
    model = description["model"]
    model["vocab"] = {t: n for t, n in model["vocab"].items() if t not in gone}
    description["added_tokens"] = [t for t in description["added_tokens"] if t["id"] > 1]
    description["added_tokens"] += [template | {"content": t, "id": n} for t, n in added]
    path.write_text(json.dumps(description), "utf-8")
    return model["vocab"]


@pytest.mark.parametrize("kind", KINDS)
def test_eos_and_pad_have_ids_of_their_own(tmp_path, kind):
    vocabulary = with_holes(tmp_path / "tok.json", kind)
    tokenizer = TextTokenizer(tmp_path / "tok.json")
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(vocabulary.values())
    assert tokenizer.tokenizer.token_to_id("fox") == vocabulary.get("fox")
    for token, index in vocabulary.items():
        assert tokenizer.tokenizer.id_to_token(index) == token
    tokenizer.save(tmp_path / "saved.json")
    again = TextTokenizer(tmp_path / "saved.json")
    assert (again.eos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert again.tokenizer.get_vocab() == tokenizer.tokenizer.get_vocab()


def test_added_tokens_keep_their_ids_beside_holes(tmp_path):
    highest = max(with_holes(tmp_path / "tok.json", "BPE").values())
    with_holes(tmp_path / "tok.json", "BPE", ("<|im_start|>", highest + 10), ("<|eos|>", 0))
    tokenizer = TextTokenizer(tmp_path / "tok.json")
    assert tokenizer.tokenizer.token_to_id("<|im_start|>") == highest + 10
    assert tokenizer.eos_id == 0
    assert tokenizer.pad_id == highest + 11


def test_tokens_that_share_an_id_are_named(tmp_path, build, fails):
    vocabulary = with_holes(tmp_path / "tok.json", "BPE")
    token, index = list(vocabulary.items())[-1]
    with_holes(tmp_path / "tok.json", "BPE", ("<|eos|>", index))
    path = write_jsonl(tmp_path / "a.jsonl", ["one two"])
    line = fails(lambda: build(path, options=f"--tokenizer-json {tmp_path / 'tok.json'}"))
    assert repr(token) in line and "'<|eos|>'" in line and str(index) in line
    description = json.loads(byte_level().to_str())
    description["model"]["vocab"]["zz"] = description["model"]["vocab"]["Ċ"]
    (tmp_path / "tok.json").write_text(json.dumps(description), "utf-8")
    line = fails(lambda: build(path, options=f"--tokenizer-json {tmp_path / 'tok.json'}"))
    assert "'Ċ'" in line and "'zz'" in line


ENCODE_A_LONG_TEXT = """
import resource, sys
from pathlib import Path
from dataset.tokens.tokenization import TextTokenizer
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
encoder, text = TextTokenizer(Path(sys.argv[1])).encoder, b"one day in the life of a fox " * 800_000
before = memory()
encoder.encode([text])
print((memory() - before) / len(text))
"""


@pytest.mark.slow
def test_a_document_of_any_size_takes_a_few_times_its_size(tokenizer_json):
    command = [sys.executable, "-c", ENCODE_A_LONG_TEXT, str(tokenizer_json)]
    times = float(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
    assert times < 20  # three times that where it was encoded at once
