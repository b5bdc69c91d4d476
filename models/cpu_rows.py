"""The losses of rows of logits on a CPU, in C++: see `models/cpu_kernels.cpp`.

The formulas are those of `models.token_losses`.
"""

from ctypes import c_bool, c_int64, c_void_p

import torch
from torch import Tensor

from models.cpu_kernels import cpu_kernels
from models.token_losses import LossType

# Names of the kernels by dtype of the logits.
KERNELS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def compute_losses(
    loss_type: LossType, logits: Tensor, labels: Tensor, scale: Tensor, graded: bool
) -> tuple[Tensor, Tensor]:
    """Compute loss and argmax, (T,) each; see `models.token_losses.Rows`."""
    library, name = cpu_kernels(), KERNELS.get(logits.dtype)
    if library is None or name is None or not logits.is_contiguous():
        assert loss_type.rows is not None
        return loss_type.rows(logits, labels, scale, graded)
    labels, scale = labels.long().contiguous(), scale.float().contiguous()
    nll, preds = torch.empty_like(scale), torch.empty_like(labels)
    pointers = (c_void_p(x.data_ptr()) for x in (logits, labels, scale, nll, preds))
    sizes, options = map(c_int64, logits.shape), (loss_type.kernel == "stablemax", graded)
    compute = library[f"token_losses_{name}"]
    compute.restype = c_int64
    wrong = compute(*pointers, *sizes, *map(c_bool, options), torch.get_num_threads())
    if wrong >= 0:
        raise IndexError(f"label {labels[wrong]} in a vocabulary of {logits.shape[1]} tokens")
    return nll, preds
