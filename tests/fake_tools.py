"""Models and batches of fake tensors, which know shape, dtype and device, and hold nothing.

An operation on two devices raises, and so does one that needs a value on the host.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dataset.common import DatasetMetadata
from models.build import create_model
from models.losses import ACTLossHead
from utils.config.hydra_entry import CONFIG_DIR
from utils.config.load import compose_config, load_config
from utils.config.schema import PretrainConfig

ROWS, LENGTH, VOCAB = 2, 40, 90
PRESETS = sorted(path.stem for path in (CONFIG_DIR / "arch").glob("*.yaml"))
NARROW = ["arch.hidden_size=64", "arch.num_heads=2", "arch.num_key_value_heads=1",
          "arch.puzzle_emb_ndim=64"]  # fmt: skip
SHALLOW = ["arch.H_cycles=2", "arch.L_cycles=2", "arch.L_layers=1", "arch.halt_max_steps=2",
           "arch.force_min_steps=1"]  # fmt: skip


def config_of(preset: str, *overrides: str) -> PretrainConfig:
    depth = [] if preset == "transformer" else SHALLOW
    given = [f"arch={preset}", *NARROW, *depth, "data_paths=[none]", f"global_batch_size={ROWS}"]
    return load_config(compose_config([*given, *overrides]))


def model_of(config: PretrainConfig, mode: FakeTensorMode, device: torch.device) -> ACTLossHead:
    """Made on the host and then moved, as a run does: what a module does not register stays."""
    metadata = DatasetMetadata(
        pad_id=0, ignore_label_id=None, vocab_size=VOCAB, seq_len=LENGTH, total_groups=1,
        num_puzzle_identifiers=3, mean_puzzle_examples=1, total_puzzles=1,
    )  # fmt: skip
    head = create_model(config.arch, metadata, batch_size=ROWS)
    with mode, torch.no_grad():
        for module in head.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    moved = torch.empty(p.shape, dtype=p.dtype, device=device)
                    module._parameters[name] = torch.nn.Parameter(moved)
            for name, b in module._buffers.items():
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
    return head


def batch(device: torch.device) -> dict[str, torch.Tensor]:
    tokens = dict.fromkeys(("inputs", "labels", "document_starts"), (ROWS, LENGTH))
    rows = dict.fromkeys(("puzzle_identifiers", "iteration_targets", "explore"), (ROWS,))
    return {k: torch.zeros(s, dtype=torch.int32, device=device) for k, s in (tokens | rows).items()}
