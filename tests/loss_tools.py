"""Probabilities by their formula, for tests of losses."""

import torch


def reference_probabilities(name: str, logits: torch.Tensor) -> torch.Tensor:
    x = logits.double()
    if name == "softmax_cross_entropy":
        return x.softmax(-1)
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    return s / s.sum(-1, keepdim=True)


def formula(name: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The losses of (T, V) logits, as their definitions say."""
    if name == "softmax_cross_entropy":
        return -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    return -(s.gather(-1, labels[:, None])[:, 0] / s.sum(-1)).log()
