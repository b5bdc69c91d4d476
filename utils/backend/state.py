"""Sharding over ranks (FSDP), and the unsharded state of models and optimizers.

A checkpoint contains whole tensors by name, so that it can be loaded with any `parallel` and world
size, and in a single process. torch.distributed.checkpoint's own directories are not used: they
contain a pickled index, and reading one can run code.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# Importing torch's FSDP, DTensor or state dicts takes half a second, so only the functions that
# need them import them. Before that, nothing can be sharded.


def is_sharded_model(model: nn.Module) -> "TypeGuard[FSDPModule]":
    """Return whether `shard` was applied to the model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return isinstance(model, getattr(fsdp, "FSDPModule", ()))


def is_sharded(value: Tensor) -> "TypeGuard[DTensor]":
    """Return whether each rank holds only a part of the tensor."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return isinstance(value, getattr(tensor, "DTensor", ()))


def shard(model: nn.Module, device_type: str, world_size: int) -> nn.Module:
    """Shard every weight, and its gradient, moments and average, over the ranks.

    The model is one unit: the recursion applies the same blocks many times in a step, so gathering
    them block by block would repeat every transfer many times. Whole weights exist from the start
    of a forward pass to the end of its backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (world_size,))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def gather(model: nn.Module) -> None:
    """Gather whole weights, for code that calls submodules of the model. A collective."""
    if is_sharded_model(model):
        model.unshard()


def release(model: nn.Module) -> None:
    """Free whole weights; call it before and after changing the shards directly."""
    if is_sharded_model(model):
        model.reshard()


def host_copy(value: Any, keep: bool = True) -> Any:
    """Copy nested dicts and lists, with every tensor unsharded and in host memory.

    A collective if tensors are sharded. keep: False to take part in the collective only; tensors
    are None then.
    """
    devices: set[torch.device] = set()

    def copy(tensor: Tensor) -> Tensor | None:
        source = whole(tensor).detach()
        if not keep:
            return None
        if not source.is_cuda:
            return source.to("cpu", copy=True)
        devices.add(source.device)
        pinned = torch.empty_like(source, device="cpu", pin_memory=True)
        return pinned.copy_(source, non_blocking=True)

    copied = tree_map_only(Tensor, copy, value)
    for device in devices:  # once per device, after starting all its copies
        torch.cuda.synchronize(device)
    return copied


def part_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor, sharded as `reference` is."""
    if is_sharded(reference):
        from torch.distributed.tensor import distribute_tensor

        moved = value.to(reference.device_mesh.device_type)
        return distribute_tensor(moved, reference.device_mesh, reference.placements)
    return value


def local_part(value: Tensor) -> Tensor:
    """Return a view of this rank's shard; return unsharded tensors unchanged."""
    return value.to_local() if is_sharded(value) else value


def _options(model: nn.Module) -> "StateDictOptions":
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    sharded = is_sharded_model(model)
    return StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return whole weights by name; for a sharded model on rank 0 only, on the host."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return dict(get_model_state_dict(model, options=_options(model)))


def load_model_state(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights, the same on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=is_sharded_model(model))
    set_model_state_dict(model, dict(weights), options=options)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return `state` and `param_groups` with parameters by name, like `model_state`."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not optimizer.state:  # torch would take a step to create a state
        return {}
    return get_optimizer_state_dict(model, optimizer, options=_options(model))


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts that `optimizer_state` returned, the same on every rank.

    Learning rates, weight decays and other settings are not changed.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    if not state:
        return
    present = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    options = StateDictOptions(full_state_dict=is_sharded_model(model))
    set_optimizer_state_dict(model, optimizer, state, options=options)
    for group, values in zip(optimizer.param_groups, present, strict=True):
        group.update(values)


def whole(value: Tensor) -> Tensor:
    """Return a sharded tensor, or a norm over sharded gradients, as a plain one. A collective."""
    return value.full_tensor() if is_sharded(value) else value
