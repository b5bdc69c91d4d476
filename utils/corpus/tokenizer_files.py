"""Do the corpora of a run, and their metadata, agree on one tokenizer?"""

from collections.abc import Sequence
from pathlib import Path

from dataset.common import tokenizer_fault
from utils.core.errors import UserError

NAME = "tokenizer.json"


def check_tokenizers(data_paths: Sequence[str], vocab_size: int) -> Path | None:
    """The tokenizer.json that all corpora share; None where none has one (puzzles).

    Raises UserError where two differ, or where the ids do not fit `vocab_size`.
    """
    files = [file for path in data_paths if (file := Path(path) / NAME).is_file()]
    if not files:
        return None
    without = [str(path) for path in data_paths if not (Path(path) / NAME).is_file()]
    if without:
        raise UserError(
            f"{without[0]} has no {NAME}, so that nothing tells whether its tokens mean what those "
            f"of {files[0].parent} do; copy the {NAME} into it that it was built with"
        )
    from tokenizers import Tokenizer

    content = files[0].read_bytes()
    for other in files[1:]:
        if other.read_bytes() != content:
            raise UserError(
                f"{files[0]} and {other} differ; corpora that are trained on or evaluated "
                "together must be built with one tokenizer"
            )
    try:
        vocabulary = Tokenizer.from_buffer(content).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        fault = tokenizer_fault(content, error)
        raise UserError(f"{files[0]} is not a tokenizer.json: {fault}") from None
    size = max(vocabulary.values()) + 1
    if size != vocab_size:
        raise UserError(
            f"{files[0]} has {size} token ids, but the corpus was built for vocab_size "
            f"{vocab_size}: they do not belong together; build the corpus again"
        )
    return files[0]
