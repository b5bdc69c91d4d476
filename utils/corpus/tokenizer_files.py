"""Check that the corpora of a run and their metadata agree on one tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from dataset.common import read_tokenizer
from utils.core.errors import UserError

NAME = "tokenizer.json"


def check_tokenizers(data_paths: Sequence[str], vocab_size: int) -> Path | None:
    """Return the tokenizer.json that all corpora share; None if there is none (puzzles).

    Raises UserError if two differ, or if the ids do not match `vocab_size`.
    """
    files = [file for path in data_paths if (file := Path(path) / NAME).is_file()]
    if not files:
        return None
    without = [str(path) for path in data_paths if not (Path(path) / NAME).is_file()]
    if without:
        raise UserError(
            f"{without[0]} has no {NAME}, so it is unknown whether its tokens match those of "
            f"{files[0].parent}; copy the {NAME} that it was built with into it"
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
