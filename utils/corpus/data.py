"""Open the corpora of a run: training split, test split, and their tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.common import read_tokenizer
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.remote.cache import local_path


class Data(NamedTuple):
    """The opened corpora of a run.

    train: the joined training corpora. test: the split to evaluate, or None.
    test_paths: local directories of the evaluated corpora.
    """

    train: Corpora
    test: Corpora | None
    test_paths: list[str]
    tokenizer: Path | None

    def highest_values(self, names: Iterable[str]) -> dict[str, int]:
        """Return the highest value in both splits of each array in `names` that training has.

        names: additional per-token arrays, such as `reasoning_labels`.
        """
        if "reasoning_labels" not in names or not self.train.reasoning_width:
            return {}
        splits = [self.train] if self.test is None else [self.train, self.test]
        return {"reasoning_labels": max(split.highest_reasoning_label() for split in splits)}


def open_data(config: PretrainConfig) -> Data:
    """Open and check the corpora; raise UserError if something is missing or inconsistent.

    Remote corpora are fetched first, once per machine; the config keeps the URLs, so that a
    checkpoint records the paths as given.
    """
    train_paths = [local_path(path) for path in config.data_paths]
    own_test_paths = [local_path(path) for path in config.data_paths_test]
    train = Corpora(train_paths, "train")
    for key, value in (("vocab_size", config.vocab_size), ("seq_len", config.seq_len)):
        found = getattr(train.metadata, key)
        if value is not None and value != found:
            raise UserError(f"{key}={value}, but the corpus has {key} {found}; omit the key")
    test_paths = own_test_paths or train_paths
    paths = [*train_paths, *own_test_paths]
    has_test = own_test_paths or any((Path(path) / "test").is_dir() for path in test_paths)
    test = Corpora(test_paths, "test", like=train) if has_test else None
    tokenizer = _find_tokenizer(paths, train.metadata.vocab_size)
    if test is not None and test.num_rows == 0:
        test = None
    return Data(train, test, test_paths, tokenizer)


def _find_tokenizer(data_paths: Sequence[str], vocab_size: int) -> Path | None:
    """Return the tokenizer.json that all corpora share; None if there is none (puzzles).

    Raises UserError if two differ, or if the ids do not match `vocab_size`.
    """
    files = [file for path in data_paths if (file := Path(path) / "tokenizer.json").is_file()]
    if not files:
        return None
    without = [str(path) for path in data_paths if not (Path(path) / "tokenizer.json").is_file()]
    if without:
        raise UserError(
            f"{without[0]} has no tokenizer.json, so it is unknown whether its tokens match those "
            f"of {files[0].parent}; copy the tokenizer.json that it was built with into it"
        )
    content = files[0].read_bytes()
    for other in files[1:]:
        if other.read_bytes() != content:
            raise UserError(
                f"{files[0]} and {other} differ; corpora that are trained on or evaluated "
                "together must be built with the same tokenizer"
            )
    tokenizer, _ = read_tokenizer(files[0])
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size != vocab_size:
        raise UserError(
            f"{files[0]} has {size} token ids, but the corpus was built for vocab_size "
            f"{vocab_size}: they do not match; rebuild the corpus"
        )
    return files[0]
