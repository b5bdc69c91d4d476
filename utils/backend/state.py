"""Sharding over ranks (FSDP), and the state of models and optimizers as if nothing were sharded.

A checkpoint holds whole tensors by name, whatever the ranks did, so that it loads with any
`parallel` and world size, and in a single process. torch.distributed.checkpoint's own folders are
not used: they keep a pickled index, and reading one can run code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def shard(model: nn.Module, device_type: str, world_size: int) -> nn.Module:
    """Leaves each rank a part of every weight, and so of its gradient, moments and average.

    As one unit: the recursion applies the same blocks many times in a step, so gathering them
    block by block would repeat each transfer as often. Whole weights live from a forward pass to
    the end of its backward pass.
    """
    mesh = init_device_mesh(device_type, (world_size,))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def gather(model: nn.Module) -> None:
    """Brings whole weights together, for those who use parts of the model. A collective."""
    if isinstance(model, FSDPModule):
        model.unshard()


def release(model: nn.Module) -> None:
    """Drops whole weights, before or after the parts were changed by hand."""
    if isinstance(model, FSDPModule):
        model.reshard()


def accumulate(model: nn.Module, last: bool) -> None:
    """Whether the next backward pass is the last one of its step, and reduces gradients."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def host_copy(value: Any, keep: bool = True) -> Any:
    """Nested dicts and lists with every tensor whole, in host memory, and a copy.

    A collective where tensors are sharded. keep: False to take part in that alone; tensors are
    None then.
    """
    devices: set[torch.device] = set()
    copied = _host_copy(value, keep, devices)
    for device in devices:  # once, after all copies of it were asked for
        torch.cuda.synchronize(device)
    return copied


def _host_copy(value: Any, keep: bool, devices: set[torch.device]) -> Any:
    if isinstance(value, dict):
        return {key: _host_copy(item, keep, devices) for key, item in value.items()}
    if isinstance(value, list):
        return [_host_copy(item, keep, devices) for item in value]
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not isinstance(value, Tensor):
        return value
    if not keep:
        return None
    source = value.detach()
    if not source.is_cuda:
        return source.to("cpu", copy=True)
    devices.add(source.device)
    pinned = torch.empty_like(source, device="cpu", pin_memory=True)
    return pinned.copy_(source, non_blocking=True)


def part_like(value: Tensor, reference: Tensor) -> Tensor:
    """The part of a whole tensor that this rank keeps, as `reference` is sharded."""
    if isinstance(reference, DTensor):
        moved = value.to(reference.device_mesh.device_type)
        return distribute_tensor(moved, reference.device_mesh, reference.placements)
    return value


def local_part(value: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, which shares its memory; others as they are."""
    return value.to_local() if isinstance(value, DTensor) else value


def _options(model: nn.Module) -> StateDictOptions:
    sharded = is_sharded(model)
    return StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Whole weights by name, those of the model itself; of a sharded one on rank 0 only, on the
    host."""
    return dict(get_model_state_dict(model, options=_options(model)))


def load_model_state(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Every rank gives the same whole weights."""
    options = StateDictOptions(full_state_dict=is_sharded(model))
    set_model_state_dict(model, dict(weights), options=options)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """state and param_groups with parameters by name, as `model_state` gives weights."""
    if not optimizer.state:  # torch would make a step to have something to save
        return {}
    return get_optimizer_state_dict(model, optimizer, options=_options(model))


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    if not state:
        return
    options = StateDictOptions(full_state_dict=is_sharded(model))
    set_optimizer_state_dict(model, optimizer, state, options=options)


def scalar(value: Tensor) -> Tensor:
    """A norm over sharded gradients as a plain tensor, the same on all ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_shard(parameter: Tensor) -> bool:
    """Return whether this rank holds a part of the parameter alone."""
    return isinstance(parameter, DTensor)
