"""What a model costs before it runs: parameters, layer passes, FLOPs and memory.

FLOPs are those of the matrix products, 2 for a multiplication and its addition. A backward pass
costs twice its forward pass, recomputation once more. Attention counts the pairs of positions that
a causal mask leaves, half the square, as kernels that skip the rest compute them; borders of
documents are not subtracted. `measure(model, whole_square=True)` counts all pairs, as
`torch.utils.flop_counter` does, and then equals it exactly.

Memory is that of one training step at its worst moment. It knows what autograd keeps of each block
when run without a compiler; a compiled model takes less, and what PyTorch/XLA takes is unknown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models.backbone import BackboneConfig
from models.flex import attention_kernel
from models.layers import SwiGLU
from models.losses import ACTLossHead
from models.terms.kl_to_base import KLToBase
from models.token_losses import _CHUNK_ELEMENTS
from utils.config.plugins import checkpoint_options
from utils.config.schema import PretrainConfig

_INTEGER = 4  # bytes of a token id on the device
_TOKEN_ARRAYS = 3  # inputs, labels, document starts


@dataclass(frozen=True)
class Cost:
    """Parameters as numbers, FLOPs of a row (its `seq_len` tokens and its prefix)."""

    core_parameters: int
    embedding_parameters: int
    head_parameters: int
    identifier_parameters: int
    buffers: int
    largest_parameter: int
    layer_passes: int
    gradient_passes: int
    max_steps: int
    eval_steps: int
    seq_len: int
    row_forward_flops: int
    """One ACT step in evaluation, without refinement."""
    row_train_flops: int
    """One ACT step in training, forward and backward."""
    row_refinement_flops: int
    """What refinement adds to the last ACT step of an evaluation: logits are then made twice."""

    @property
    def parameters(self) -> int:
        return self.core_parameters + self.embedding_parameters + self.head_parameters

    @property
    def forward_flops(self) -> float:
        """Per token and ACT step in evaluation, without refinement."""
        return self.row_forward_flops / self.seq_len

    @property
    def train_flops(self) -> float:
        """Per token and ACT step in training."""
        return self.row_train_flops / self.seq_len

    @property
    def evaluation_flops(self) -> float:
        """Per token in an evaluation of as many ACT steps as configured, refinement included."""
        whole = self.row_forward_flops * self.eval_steps + self.row_refinement_flops
        return whole / self.seq_len


def layer_passes(config: Any) -> tuple[int, int, int]:
    """Blocks run in one ACT step, those that carry gradient, and ACT steps at most."""
    if not hasattr(config, "H_cycles"):
        return config.num_layers, config.num_layers, 1
    per_cycle = (config.L_cycles + 1) * config.L_layers
    return (
        config.H_cycles * per_cycle,
        config.H_grad_cycles * per_cycle,
        config.halt_max_steps,
    )


def block_flops(config: Any, whole_square: bool = False) -> int:
    """Forward FLOPs of one block for one row, prefix included."""
    width, positions = config.hidden_size, config.prefix_len + config.seq_len
    mlp = 6 * width * SwiGLU.inner_size(width, config.expansion) * positions
    if getattr(config, "mlp_t", False):
        return mlp + 6 * width * SwiGLU.inner_size(positions, config.expansion) * positions
    head = width // config.num_heads
    projections = 2 * width * head * (2 * config.num_heads + 2 * config.key_value_heads)
    triangle = config.causal and not whole_square
    pairs = positions * (positions + 1) // 2 if triangle else positions**2
    return mlp + projections * positions + 4 * width * pairs


def recomputed_flops(config: Any, block: int) -> int:
    """Forward FLOPs of a block that gradient checkpointing spends again, for one row."""
    if not config.use_gradient_checkpointing:
        return 0
    if config.norm_type == "post":
        return block
    # recomputation ends where the last input is known: nothing needs the result of down_proj
    width, positions = config.hidden_size, config.prefix_len + config.seq_len
    return block - 2 * width * SwiGLU.inner_size(width, config.expansion) * positions


def refinement_passes(config: Any, trained_only: bool = False) -> int:
    """Blocks run after halting; `trained_only`: those of a training step."""
    if trained_only and not getattr(config, "post_refinement_train", False):
        return 0
    return getattr(config, "post_refinement_steps", 0) * getattr(config, "L_layers", 0)


def reasoning_logits(config: Any) -> int:
    """Logits of a row's reasoning stream."""
    if getattr(config, "enable_reasoning_stream", False) is not True:
        return 0
    return min(config.reasoning_seq_len, config.seq_len) * config.reasoning_vocab_size


def config_of(model: nn.Module) -> Any:
    """The architecture's options (a module's attributes have no type)."""
    return model.config


def measure(model: nn.Module, *, whole_square: bool = False) -> Cost:
    """Counts a model, which may live on the meta device; see the top for `whole_square`."""
    config = config_of(model)
    sizes = dict(core=0, embed=0, head=0)
    for name, parameter in model.named_parameters():
        part = "core" if ".layers." in name else "embed" if "embed" in name else "head"
        sizes[part] += parameter.numel()
    identifiers = sum(b.numel() for n, b in model.named_buffers() if "puzzle_emb" in n)
    passes, with_gradient, steps = layer_passes(config)
    trained = with_gradient + refinement_passes(config, trained_only=True)
    block = block_flops(config, whole_square)
    width = config.hidden_size
    logits = 2 * width * config.vocab_size * config.seq_len
    halting = 4 * width if hasattr(config, "H_cycles") else 0  # two logits a row
    heads = logits + halting + 2 * width * reasoning_logits(config)
    train = (passes - with_gradient) * block + 3 * heads
    train += trained * (3 * block + recomputed_flops(config, block))
    if not getattr(config, "no_ACT_continue", True):
        train += passes * block + halting  # the bootstrapped target looks one step ahead
    refinement = refinement_passes(config) * block
    return Cost(
        core_parameters=sizes["core"],
        embedding_parameters=sizes["embed"],
        head_parameters=sizes["head"],
        identifier_parameters=identifiers,
        buffers=sum(b.numel() for b in model.buffers()) - identifiers,
        largest_parameter=max(p.numel() for p in model.parameters()),
        layer_passes=passes,
        gradient_passes=with_gradient,
        max_steps=steps,
        eval_steps=getattr(config, "max_eval_steps", 1),
        seq_len=config.seq_len,
        row_forward_flops=passes * block + heads,
        row_train_flops=train,
        row_refinement_flops=refinement + logits if refinement else 0,
    )


def measure_run(model: nn.Module, run: PretrainConfig) -> Cost:
    """As `measure`, with the answers of the base of a KL term, taken to be of the same kind."""
    counted = measure(model)
    if not _has_base(run):
        return counted
    return replace(counted, row_train_flops=counted.row_train_flops + counted.row_forward_flops)


def _has_base(run: PretrainConfig) -> bool:
    return bool(checkpoint_options(run.arch.loss.options))


def step_flops(head: ACTLossHead) -> float:
    """FLOPs per token of one training step, the answers of a base included."""
    bases = [term.base for term in head.terms if isinstance(term, KLToBase)]
    return measure(head.model).train_flops + sum(measure(b).forward_flops for b in bases)


def expected_steps(config: Any, budgets: Iterable[int]) -> float:
    """Mean ACT steps of a training example, where each ends with its budget (0: it has none).

    The halting head is not foreseen. A row that explores at its k-th step continues with the chance
    that the number drawn from 2..halt_max_steps is above k.
    """
    most = getattr(config, "halt_max_steps", 1)
    known: dict[int, float] = {}

    def after(budget: int) -> float:
        first = min(max(budget or most, config.force_min_steps, 1), most)
        steps, reached = float(first), 1.0
        for k in range(first, most):
            reached *= config.halt_exploration_prob * (most - max(k, 1)) / (most - 1)
            steps += reached
        return steps

    if most == 1:
        return 1.0
    found = []
    for budget in budgets:
        if budget not in known:
            known[budget] = after(budget)
        found.append(known[budget])
    return sum(found) / len(found)


# --- memory -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """Bytes of an activation and of a master weight; positions of a row and of a micro-batch."""

    item: int
    wide: int
    row: int
    positions: int

    @classmethod
    def of(cls, config: BackboneConfig, micro_rows: int) -> "_Sizes":
        wide = 8 if config.forward_dtype == "float64" else 4
        item = 2 if config.forward_dtype == "bfloat16" else wide
        row = config.prefix_len + config.seq_len
        return cls(item, wide, row, micro_rows * row)


def _masks_densely(model: nn.Module, device: str) -> bool:
    """Return whether attention keeps a mask of all pairs of positions."""
    config = config_of(model)
    if not config.document_mask:
        return False
    chosen = getattr(getattr(model, "inner", None), "masked_attention", None)
    return (chosen or attention_kernel(device, config.dtype, config.head_size).kernel) == "dense"


def _block_bytes(config: Any, n: _Sizes, dense: bool) -> int:
    """What autograd keeps of one block for one position."""
    width, inner = config.hidden_size, SwiGLU.inner_size(config.hidden_size, config.expansion)
    # the input of each linear map; gate and up, silu(gate) and the product; and, in wide
    # precision, what the two norms saw
    kept = n.item * (2 * width + 4 * inner) + n.wide * (2 * width + 2)
    if getattr(config, "mlp_t", False):
        # per position of the row: the same of the mixing MLP, whose channels are the positions
        return kept + n.item * 4 * width * SwiGLU.inner_size(n.row, config.expansion) // n.row
    head = width // config.num_heads
    rotated = head * (config.num_heads + config.key_value_heads)
    kept += n.item * (rotated + head * config.key_value_heads)  # queries, keys and values
    kept += n.item * width + n.wide * config.num_heads  # attention's result and its sums
    if config.pos_encodings == "rope":
        kept += n.item * rotated  # before they were rotated
    if dense:
        kept += n.item * n.row  # the mask, which the kernel there takes as numbers
    return kept


def _loss_bytes(config: Any, n: _Sizes, loss_type: str, elements: int) -> int:
    """The logits and what the loss needs beside them, at its worst moment."""
    chunk = min(elements, _CHUNK_ELEMENTS)
    widened = n.wide * chunk if n.item < n.wide else 0
    if loss_type == "softmax_cross_entropy":  # keeps log-probabilities
        return n.wide * elements + 2 * n.wide * chunk + n.item * (elements - chunk)
    # stablemax keeps the logits, and makes their gradient chunk by chunk
    return n.item * (2 * elements - chunk) + widened + 3 * n.wide * chunk + chunk


def _beside_bytes(n: _Sizes, latents: int, micro_rows: int, elements: int) -> int:
    """What a step takes for answering beside a base: its new latents, its logits, and how far they
    are from the model's."""
    chunk = min(elements, (1 << 24))
    return micro_rows * latents + n.item * elements + 5 * n.wide * chunk


def _update_bytes(counted: Cost, wide: int, optimizer: str, device: str) -> int:
    """Temporaries of the update: most go one weight after the other."""
    if optimizer == "adamw" and device == "cuda":
        return wide * counted.parameters  # roots of all weights at once
    return 2 * wide * counted.largest_parameter


def _activation_bytes(
    config: Any,
    counted: Cost,
    n: _Sizes,
    *,
    loss_type: str,
    micro_rows: int,
    optimizer: str,
    device: str,
    dense: bool,
    gradients_stay: bool,
) -> int:
    """What a step needs at its worst moment beyond all that lasts, whole gradients included.

    dense: masks are of all pairs of positions. gradients_stay: they are there when a micro-batch
    begins; else they grow as activations go.
    """
    width, passes = config.hidden_size, counted.gradient_passes
    passes += refinement_passes(config, trained_only=True)
    layers = getattr(config, "L_layers", counted.layer_passes)
    narrow = n.item < n.wide  # weights are cast for every use, and autograd keeps each copy
    block = _block_bytes(config, n, dense) * n.positions
    block += n.item * counted.core_parameters // layers if narrow else 0
    if config.use_gradient_checkpointing:
        kept = n.item * width * n.positions * passes
        again = block
    else:
        kept, again = block * passes, 0
    if config.norm_type == "pre":
        kept += n.wide * width * n.positions * (passes // layers)
    always = n.positions * n.item * width  # the embedding
    if config.document_mask:  # rotary factors of positions that restart, and the mask
        factors = 2 * n.wide * (width // config.num_heads) if config.pos_encodings == "rope" else 0
        always += n.positions * (factors + (n.row if dense else 0))
    elements = micro_rows * (config.vocab_size * config.seq_len + reasoning_logits(config))
    head = config.vocab_size * width
    loss = _loss_bytes(config, n, loss_type, elements)
    loss += n.item * (n.positions * width + (head if narrow else 0))  # what the head keeps
    to_block = again + 4 * n.wide * width * n.positions  # gradients of both streams, and the norm's
    # A weight used more than once gets its gradient when all uses are done: until then their sum
    # lies beside what earlier micro-batches left.
    summed = n.wide * counted.core_parameters if passes > layers else 0
    tied = n.wide * head if config.tie_embeddings else 0
    later = round(kept * (1 - layers / passes)) + summed
    update = _update_bytes(counted, n.wide, optimizer, device)
    if gradients_stay:
        backward = to_block + tied + max(kept, later)
        return max(always + max(kept + loss, backward), update)
    there = n.wide * (counted.head_parameters + (head if config.tie_embeddings else 0))
    unsummed = n.wide * counted.core_parameters - summed if passes == layers else 0
    whole = n.wide * counted.parameters
    moments = (kept + loss, kept + to_block + there, later + unsummed + to_block + there)
    return max(always + max(moments) - whole, update)


def memory(
    model: nn.Module,
    run: PretrainConfig,
    *,
    micro_rows: int,
    ranks: int = 1,
    device: str,
    counted: Cost | None = None,
) -> dict[str, int]:
    """Bytes of one of `ranks` replicas by part; their sum is the most that a training step takes.

    micro_rows: rows at once. device: its type, e.g. `cuda`. `activations` holds all that does not
    last; where gradients are not yet whole at the worst moment, what they still lack is taken off.
    `base`, with a KL term: the model that the run stays near, taken to be one of its own kind.
    """
    config = config_of(model)
    counted = counted or measure(model)
    n = _Sizes.of(config, micro_rows)
    rows = run.rows_per_rank(ranks)
    weights = n.wide * counted.parameters
    buffers = n.wide * (counted.identifier_parameters + counted.buffers)
    muon = run.optimizer.name == "muon"
    moments = 1.0 if muon else 2.0  # others are taken to keep two, as most do
    if muon:  # AdamW serves what is no matrix of a block
        moments += 1 - counted.core_parameters / counted.parameters
    sharded = ranks if run.parallel == "fsdp" else 1
    # latents in the forward dtype, and the rows' data, once held and once newly arrived
    latents = 2 * n.item * n.row * config.hidden_size if hasattr(config, "H_cycles") else 0
    data = 2 * _TOKEN_ARRAYS * _INTEGER * config.seq_len
    near = _has_base(run)
    parts = {
        # FSDP keeps a part, and whole weights and gradients through the backward pass
        "weights": weights + buffers + (weights // sharded if sharded > 1 else 0),
        "gradients": weights,
        "optimizer": round(moments * weights) // sharded,
        "ema": weights // sharded if run.ema else 0,
        "carry": rows * (latents + data),
        "activations": _activation_bytes(
            config,
            counted,
            n,
            loss_type=run.arch.loss.options.get("loss_type", ""),
            micro_rows=micro_rows,
            optimizer=run.optimizer.name,
            device=device,
            dense=_masks_densely(model, device),
            gradients_stay=ranks > 1 or rows > micro_rows,
        ),
    }
    if near:
        mapped = counted.core_parameters + counted.head_parameters
        parts["base"] = n.item * mapped + n.wide * counted.embedding_parameters
        parts["base"] += buffers + rows * latents
        elements = micro_rows * config.vocab_size * config.seq_len
        parts["activations"] += _beside_bytes(n, latents, micro_rows, elements)
    return parts


def count_present_bytes(head: ACTLossHead, device: str) -> int:
    """Count what lies on `device` of a model that is built, and of the base that it stays near."""
    modules = [head, *(term.base for term in head.terms if isinstance(term, KLToBase))]
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return sum(t.nbytes for t in tensors if t.device.type == device)


def checkpoint_bytes(model: nn.Module, run: PretrainConfig) -> int:
    """What a checkpoint takes on disk, the held rows of all ranks included."""
    parts = memory(model, run, micro_rows=1, device="cpu")
    names = ["weights", "optimizer", "ema", *(["carry"] if run.checkpoint_carry else [])]
    return sum(parts[name] for name in names)


FILLED = 0.8
"""Share of the free memory that a plan may fill; the rest is for the allocator and the kernels."""


def fitting_rows(
    model: nn.Module, run: PretrainConfig, free: int, *, ranks: int = 1, device: str
) -> int:
    """The most rows at once, dividing those of a rank, whose estimate stays under 80 % of `free`
    bytes; 1 where none does."""
    counted, rows = measure(model), run.rows_per_rank(ranks)
    for micro_rows in (n for n in range(rows, 0, -1) if rows % n == 0):
        parts = memory(
            model, run, micro_rows=micro_rows, ranks=ranks, device=device, counted=counted
        )
        if sum(parts.values()) < FILLED * free:
            return micro_rows
    return 1
