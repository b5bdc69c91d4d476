"""What every part relies on: metadata of three makers, dtypes, checksums, bytes per token."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dataset.common import (
    DatasetMetadata,
    find_split,
    load_metadata,
    token_byte_lengths,
    token_dtype,
    verify_arrays,
)
from tests.dataset.conftest import random_text, write_jsonl
from utils.core.console import run_cli
from utils.core.errors import UserError

TRM = {
    "pad_id": 0,
    "ignore_label_id": 0,
    "blank_identifier_id": 0,
    "vocab_size": 11,
    "seq_len": 81,
    "num_puzzle_identifiers": 1,
    "total_groups": 3,
    "mean_puzzle_examples": 1.0,
    "total_puzzles": 3,
    "sets": ["all"],
}


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "u1"), (255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4"), (2**32 - 1, "u4")],
)
def test_dtype_leaves_room_for_the_ignored_label(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(vocab_size)).max > vocab_size - 1


def test_metadata_of_trm_and_of_the_prototype(tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "dataset.json"
    path.write_text(json.dumps(TRM), "utf-8")
    metadata = load_metadata(find_split(tmp_path, "train"))
    assert (metadata.total_puzzles, metadata.format_version, metadata.domains) == (3, 0, [])

    older = dict(TRM)
    older["num_sequence_identifiers"] = older.pop("num_puzzle_identifiers") + 6
    older["mean_examples_per_group"] = older.pop("mean_puzzle_examples") + 1
    older["total_sequences"] = older.pop("total_puzzles") + 4
    path.write_text(json.dumps(older), "utf-8")
    metadata = load_metadata(find_split(tmp_path, "train"))
    assert metadata.num_puzzle_identifiers == 7
    assert metadata.mean_puzzle_examples == 2
    assert metadata.total_puzzles == 7


def test_metadata_survives_its_own_json():
    metadata = DatasetMetadata(**TRM, relabel_ids=(2, 11), checksums={"a.npy": "00"})
    assert DatasetMetadata.model_validate(json.loads(metadata.model_dump_json())) == metadata


def test_bad_metadata_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*dataset.json"):
        load_metadata(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text('{"pad_id": 0', "utf-8")
    with pytest.raises(UserError, match=r"dataset\.json is not valid JSON"):
        load_metadata(tmp_path)
    path.write_text(json.dumps({**TRM, "seq_len": "long", "vocab_size": 0}), "utf-8")
    with pytest.raises(UserError, match=r"vocab_size: .*seq_len: "):
        load_metadata(tmp_path)
    with pytest.raises(UserError, match="has no split 'test'"):
        find_split(tmp_path, "test")
    with pytest.raises(UserError, match="directory"):
        find_split(tmp_path / "absent", "test")


def test_verify_names_the_damaged_file(build, tmp_path, rng):
    corpus = build(
        write_jsonl(tmp_path / "a.jsonl", [random_text(rng, 40) for _ in range(9)]),
        options="--seq-len 16",
    )
    folder = find_split(corpus, "train")
    assert folder == corpus / "train" / "all"
    metadata = load_metadata(folder)
    assert set(metadata.checksums) == {path.name for path in folder.glob("*.npy")}
    verify_arrays(folder, metadata)

    labels = bytearray((folder / "labels.npy").read_bytes())
    labels[-1] ^= 1
    (folder / "labels.npy").write_bytes(labels)
    with pytest.raises(UserError, match=r"labels\.npy .*checksum"):
        verify_arrays(folder, metadata)
    (folder / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"labels\.npy is missing"):
        verify_arrays(folder, metadata)


def test_byte_lengths_add_up_to_the_text(tokenizer_json, rng):
    lengths = token_byte_lengths(tokenizer_json)
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    text = random_text(rng, 300) + "\n\t\x00 é\u2028 \U0001f468\u200d\U0001f469"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert lengths[ids].sum() == len(text.encode())
    assert lengths[[tokenizer.token_to_id(t) for t in ("<|pad|>", "<|eos|>")]].sum() == 0
    assert len(lengths) == tokenizer.get_vocab_size()


def test_byte_lengths_of_added_tokens_and_gaps(tokenizer_json, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.add_tokens([AddedToken("é <tab>", special=False)])
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(tmp_path / "tok.json"))
    lengths = token_byte_lengths(tmp_path / "tok.json")
    assert lengths[tokenizer.token_to_id("é <tab>")] == len("é <tab>".encode())
    assert lengths[tokenizer.token_to_id("<|user|>")] == 0


def test_byte_lengths_of_a_metaspace_tokenizer(tmp_path):
    vocab = {"<unk>": 0, "a": 1, "▁": 2, "▁the": 3, "é": 4, "<0xC3>": 5, "▁a": 6}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tok.json"))
    assert token_byte_lengths(tmp_path / "tok.json").tolist() == [0, 1, 1, 4, 2, 1, 2]


def test_byte_lengths_refuse_what_is_no_tokenizer(tmp_path):
    (tmp_path / "tok.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match=r"tok\.json is not a valid tokenizer"):
        token_byte_lengths(tmp_path / "tok.json")


def test_run_cli_shows_only_user_errors(capsys):
    def user_mistake():
        raise UserError("seq_len is 0.")

    with pytest.raises(SystemExit) as stop:
        run_cli(user_mistake)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: seq_len is 0.\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_cli(lambda: 1 / 0)
    assert run_cli(lambda: 3) == 3
