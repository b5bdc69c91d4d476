"""SPMD: the real model and loss, their batch split over two devices by XLA itself.

Usage: sharded_gradients.py CORPUS, with CPU_NUM_DEVICES=2. Prints JSON: the largest difference of a
gradient and of a loss from one plain CPU, how the carry is split, whether its flags agree.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from training_tools import make_config

from models.build import create_model
from sequence_dataset import TrainStream
from tests.stream_tools import exploration
from utils.corpus.data import open_data

xr.use_spmd()
CONFIG = make_config(Path(sys.argv[1]), "arch.puzzle_emb_ndim=32", "arch.halt_max_steps=4")
DATA = open_data(CONFIG)


def three_batches() -> list[dict[str, np.ndarray]]:
    stream = TrainStream(
        DATA.train, global_batch_size=8, seed=0, epochs=9.0, max_iterations=4,
        row_options=exploration(0.3, 4),
    )  # fmt: skip
    flags = [np.ones(8, dtype=bool), *(np.arange(8) % 3 == k for k in range(2))]
    return [stream.next(step, halted)[0] for step, halted in enumerate(flags)]


def gradients(device: torch.device, mesh: xs.Mesh | None):
    """Summed over three steps of the same carry: by name, the losses, and the carry."""
    head = create_model(CONFIG.arch, DATA.train.metadata, batch_size=8).to(device).train()
    carry, losses = None, []
    for batch in three_batches():
        moved = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
        if mesh is not None:
            for value in moved.values():
                xs.mark_sharding(value, mesh, ("rows", *[None] * (value.ndim - 1)))
        carry = head.initial_carry(moved) if carry is None else carry
        carry, loss, *_ = head(return_keys=(), carry=carry, batch=moved)
        (loss / 8).backward()
        losses.append(loss.detach())
    found = {name: p.grad for name, p in head.named_parameters()}
    used = head.model.inner.puzzle_emb.used
    found |= {f"identifiers {i}": rows.grad for i, (_, rows) in enumerate(used)}
    torch_xla.sync()  # one program
    return {k: v.cpu() for k, v in found.items()}, torch.stack(losses).cpu(), carry


def main() -> None:
    assert xr.global_runtime_device_count() == 2
    mesh = xs.Mesh(np.arange(2), (2,), ("rows",))
    split, split_losses, split_carry = gradients(torch_xla.device(), mesh)
    plain, losses, carry = gradients(torch.device("cpu"), None)
    off = {name: (split[name] - plain[name]).abs().max().item() for name in plain}
    found = {
        "gradients": max(off.values()),
        "losses": ((split_losses - losses).abs() / losses).max().item(),
        "largest gradient": max(g.abs().max().item() for g in plain.values()),
        "flags agree": torch.equal(split_carry.halted.cpu(), carry.halted),
        "carry": torch_xla._XLAC._get_xla_sharding_spec(split_carry.latents["z_H"]),
    }
    print(json.dumps(found))


main()
