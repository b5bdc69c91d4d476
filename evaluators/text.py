"""Report perplexity, nats per token and bits per byte, by domain and by ACT step."""

import math
from pathlib import Path

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata, token_byte_lengths
from evaluators.interface import Batch, Summing


class PerplexityEvaluator(Summing):
    """Perplexity over all ranks, without padding and ignored labels.

    Reports <prefix>/perplexity, /nats_per_token, /bits_per_byte (nats / ln 2 / bytes of the scored
    text: an unknown token counts the bytes that it replaced, an end-of-document token counts its
    nats but no bytes). The last two are also reported by ACT step (/step_<k>/…), by domain
    (/domain_<name>/…) and, if untrained refinement passes changed the result, without these
    (/unrefined/…).
    """

    class Config(BaseModel, extra="forbid"):
        prefix: str = "text"

    required_outputs = frozenset({"token_nll", "unrefined_token_nll", "row_nll_by_step"})

    def __init__(self, data_path: str, eval_metadata: DatasetMetadata, prefix: str = "text"):
        self.prefix, self.metadata = prefix, eval_metadata
        tokenizer = Path(data_path) / "tokenizer.json"
        self.bytes_of = token_byte_lengths(tokenizer) if tokenizer.is_file() else None
        self.begin_eval()

    def update_batch(self, batch: Batch, preds: Batch) -> None:
        """Add a batch: labels (B, S), domain_ids (B,), scored_bytes (B,) if the bytes cannot be
        derived from the ids. preds: token_nll (B, S) in nats and, if available, unrefined_token_nll
        (B, S) and row_nll_by_step (B, steps).
        """
        labels = batch["labels"].cpu().numpy()
        scored = labels != IGNORE_LABEL_ID
        tokens = scored.sum(1)
        size = np.zeros(len(labels))
        if self.bytes_of is not None:
            size = np.where(scored, self.bytes_of[np.where(scored, labels, 0)], 0).sum(1)
        nats = _row_sums(preds["token_nll"])
        if "scored_bytes" in batch:  # -1: the corpus does not have it
            counted = batch["scored_bytes"].cpu().numpy()
            size = np.where(counted < 0, size, counted)
        self._add("", nats, tokens, size)
        if "unrefined_token_nll" in preds:
            self._add("unrefined/", _row_sums(preds["unrefined_token_nll"]), tokens, size)
        for k, by_step in enumerate(preds["row_nll_by_step"].cpu().double().numpy().T, 1):
            self._add(f"step_{k}/", by_step, tokens, size)
        if "domain_ids" in batch and len(self.metadata.domains) > 1:
            domains = batch["domain_ids"].cpu().numpy()
            for i, name in enumerate(self.metadata.domains):
                here = domains == i
                self._add(f"domain_{name}/", nats[here], tokens[here], size[here])

    def _add(self, name: str, nats: np.ndarray, tokens: np.ndarray, size: np.ndarray) -> None:
        self.add(name, np.array([nats.sum(), tokens.sum(), size.sum()]))

    def summarize(self, sums: dict[str, np.ndarray], save_path: str | None) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, (nats, tokens, size) in sums.items():
            if tokens == 0:
                continue
            place = f"{self.prefix}/{name}"
            metrics[f"{place}nats_per_token"] = nats / tokens
            metrics[f"{place}perplexity"] = math.exp(min(nats / tokens, 700.0))
            if size > 0:
                metrics[f"{place}bits_per_byte"] = nats / math.log(2) / size
        return metrics


def _row_sums(token_nll: Tensor) -> np.ndarray:
    return token_nll.cpu().double().sum(-1).numpy()  # not every device has float64
