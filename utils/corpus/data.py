"""Open the corpora of a run: training split, test split, and their tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.corpus.tokenizer_files import check_tokenizers
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
        """Return the highest value in both splits of those arrays that training has.

        names: arrays per token beside the usual ones; a corpus may have `reasoning_labels`.
        """
        if "reasoning_labels" not in names or not self.train.reasoning_width:
            return {}
        splits = [self.train] if self.test is None else [self.train, self.test]
        return {"reasoning_labels": max(split.highest_reasoning_label() for split in splits)}


def open_data(config: PretrainConfig) -> Data:
    """Open and check the corpora; raise UserError if something is missing or inconsistent.

    Remote corpora are fetched first, once per machine; the config keeps the URLs, so that a
    checkpoint records what the run was given.
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
    tokenizer = check_tokenizers(paths, train.metadata.vocab_size)
    if test is not None and test.num_rows == 0:
        test = None
    return Data(train, test, test_paths, tokenizer)
