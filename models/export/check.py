"""Test an exported folder with the installed transformers: load it, compare logits, generate."""

import atexit
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.inference.generation import Decoder
from models.inference.language_model import LanguageModel
from utils.core.errors import UserError

# Rounding errors stay far below this share of the logits; attending to wrong tokens exceeds it.
_TOLERANCE = 0.05
_MODULES = "HF_MODULES_CACHE"


class NotTried(Exception):
    """The folder could not be tested here, for a reason unrelated to the folder."""


@torch.no_grad()
def try_out(model: LanguageModel, folder: Path) -> float:
    """Return the largest difference between the model's logits for a random text and those that
    transformers computes with `folder`.

    Uses one ACT step, because all of them may take minutes. Raises NotTried if transformers 5
    cannot be imported or its cache is not writable, and UserError if the installed version fails to
    load the folder, computes other logits, or generates other tokens (greedy or sampled, with or
    without a cache).
    """
    try:
        with _modules_in_a_temporary_folder():
            import transformers
            from transformers import AutoModelForCausalLM, PreTrainedConfig  # noqa: F401  version 5
    except (ImportError, OSError) as error:
        raise NotTried(
            f"transformers 5 cannot be imported: {_first_line(error)} (pip install -r "
            "requirements-export.txt -c constraints.txt)"
        ) from error

    def fault(what: str) -> UserError:
        return UserError(
            f"with transformers {transformers.__version__}, the exported model {what}; nothing was "
            "written. Install the tested version: pip install -r requirements-export.txt "
            "-c constraints.txt"
        )

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)

    try:
        off, largest = _difference(model, load())
        if not math.isfinite(largest):  # the weights are not finite, so any generation would fail
            return off
        if not off <= _TOLERANCE * largest:
            raise fault(f"computes wrong logits, off by {off:.1e}")
        # float64, so that rounding differences between shapes are negligible
        wrong = _wrong_ways_to_generate(load(dtype=torch.float64), model.metadata.pad_id)
    except UserError:
        raise
    except Exception as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # errors raised by transformers have no errno
            raise NotTried(
                f"transformers cannot copy the model's code to its cache: {_first_line(error)} "
                f"({_MODULES} or TMPDIR sets another directory)"
            ) from error
        raise fault(f"fails ({type(error).__name__}: {_first_line(error)})") from error
    if wrong:
        raise fault(f"generates wrong tokens with {wrong}")
    return off


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _modules_in_a_temporary_folder() -> Iterator[None]:
    """Make transformers, if it is first imported here, copy the code of models to a temporary
    folder, because the user's cache may be read-only.
    """
    if "transformers" in sys.modules or _MODULES in os.environ:
        yield
        return
    os.environ[_MODULES] = folder = tempfile.mkdtemp(prefix="athena-export-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        yield
    finally:
        del os.environ[_MODULES]


def _difference(model: LanguageModel, exported: Any) -> tuple[float, float]:
    """Return the largest difference of the logits for a random text, and the largest logit."""
    text = torch.randint(model.metadata.vocab_size, (min(16, model.window),)).tolist()
    identifiers = torch.tensor([model.identifier])
    own = Decoder(model.head, identifiers, 1, cached=False).begin([text])[0]
    found = exported(torch.tensor([text]), steps=1).logits[0, -1]
    return float((own - found).abs().max()), float(own.abs().max())


def _wrong_ways_to_generate(exported: Any, pad_id: int) -> str:
    """Return the arguments of `generate` whose logits differ from those of one forward pass.

    Two texts of different lengths, the shorter padded on the left.
    """
    window = exported.config.max_position_embeddings
    length = min(8, window // 2)
    if length == 0:
        return ""
    new = min(4, window - length)
    vocab = exported.config.vocab_size
    texts = [torch.randint(vocab, (n,)) for n in (length, max(1, length - 3))]
    inputs = torch.stack([F.pad(text, (length - len(text), 0), value=pad_id) for text in texts])
    mask = torch.stack([F.pad(torch.ones_like(t), (length - len(t), 0)) for t in texts])
    wrong = []
    for do_sample in (False, True):
        for use_cache in (True, False):
            done = exported.generate(
                inputs,
                attention_mask=mask,
                steps=1,
                do_sample=do_sample,
                use_cache=use_cache,
                max_new_tokens=new,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found = torch.stack(done.logits, dim=1)
            if not _follows(exported, texts, done.sequences[:, length:], found):
                wrong.append(f"do_sample={do_sample}, use_cache={use_cache}")
    return "; ".join(wrong)


def _follows(exported: Any, texts: list[Tensor], written: Tensor, found: Tensor) -> bool:
    """Return whether the logits (B, n, V) of the tokens generated after each text equal those of
    one forward pass over the whole text.
    """
    if written.shape[1] == 0 or found.shape[:2] != written.shape:
        return False
    for text, tokens, logits in zip(texts, written, found, strict=True):
        whole = exported(torch.cat((text, tokens))[None], steps=1).logits[0]
        expected = whole[len(text) - 1 : -1]
        if not (logits - expected).abs().max() <= _TOLERANCE * expected.abs().max():
            return False
    return True
