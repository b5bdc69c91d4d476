"""Initialisation and precision, shared by all modules."""

import math

import torch
from torch import Tensor


def trunc_normal_init_(
    tensor: Tensor, std: float = 1.0, lower: float = -2.0, upper: float = 2.0
) -> Tensor:
    """Fill `tensor` in place from a normal distribution truncated at `lower` and `upper`, in
    standard deviations.

    Unlike `torch.nn.init.trunc_normal_`, `std` is the standard deviation of the result: values are
    scaled to compensate for the truncation (as in JAX's default initialisers).
    """
    if std == 0:
        return tensor.zero_() if not tensor.requires_grad else tensor.data.zero_()

    def pdf(x: float) -> float:
        return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)

    low, high = math.erf(lower / math.sqrt(2)), math.erf(upper / math.sqrt(2))
    mass = (high - low) / 2
    mean = (pdf(lower) - pdf(upper)) / mass
    variance = 1 - (upper * pdf(upper) - lower * pdf(lower)) / mass - mean**2
    scale = std / math.sqrt(variance)
    with torch.no_grad():
        tensor.uniform_(low, high).erfinv_().mul_(math.sqrt(2) * scale)
        return tensor.clamp_(lower * scale, upper * scale)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert `x` to float32, unless it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
