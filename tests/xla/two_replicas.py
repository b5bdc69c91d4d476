"""The real training in two replicas that `torch_xla.launch` started: threads of one process.

Usage: two_replicas.py CORPUS FOLDER [key=value ...], with CPU_NUM_DEVICES=2.

XLA's CPU runs an all-reduce of two such replicas only where it carries a channel, which
`xm.all_reduce` gives it none of (pytorch/xla #9089). So here, and nowhere else, `xm.all_reduce` is
made of an all-gather with a channel and a sum; and replicas meet before each program, because a
collective waits on threads that the other replica's program may hold. All else is as on a TPU.
"""

import sys
import threading
from pathlib import Path

import torch
from training_tools import make_config

from pretrain import train
from utils.backend.xla import XLABackend

LOCAL = threading.local()
MEETING = threading.Barrier(2)
LOCK = threading.Lock()


def make_collectives_work() -> None:
    import torch_xla
    import torch_xla.core.xla_model as xm

    with LOCK:
        if hasattr(xm, "real_sync"):
            return
        xm.real_sync = torch_xla.sync

    def sync(*args, **options):
        LOCAL.channel = 0
        MEETING.wait(120)
        xm.real_sync(wait=True)
        MEETING.wait(120)

    def total(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        LOCAL.channel = getattr(LOCAL, "channel", 0) + 1
        both = torch_xla._XLAC._xla_all_gather(
            tensor.reshape(1, -1), 0, 2, [[0, 1]], False, LOCAL.channel, True
        )
        return (both.sum(0) * scale).to(tensor.dtype).reshape(tensor.shape)

    @torch.no_grad()
    def all_reduce(reduce_type, inputs, scale=1.0, groups=None, pin_layout=True):
        assert reduce_type == xm.REDUCE_SUM and not groups
        if isinstance(inputs, torch.Tensor):
            return total(inputs, scale)
        for tensor in inputs:
            tensor.copy_(total(tensor, scale))
        return inputs

    torch_xla.sync, xm.all_reduce = sync, all_reduce


def run(replica, config) -> int:
    make_collectives_work()
    return train(replica, config, "as the test asks")


if __name__ == "__main__":
    corpus, folder, *overrides = sys.argv[1:]
    config = make_config(Path(corpus), f"checkpoint_path={folder}", "run_name=test", *overrides)
    sys.exit(XLABackend().launch(run, config))
