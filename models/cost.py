"""What a model costs before it runs: parameters, layer passes, FLOPs and memory.

FLOPs count multiplications and additions of the matrix products (2 a pair); attention counts the
positions that a causal mask leaves. A backward pass costs twice its forward pass, recomputation
once more.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from models.backbone import BackboneConfig
from models.layers import SwiGLU


@dataclass(frozen=True)
class Cost:
    """Per token and ACT step unless said otherwise. Parameters are counted, memory is in bytes."""

    core_parameters: int
    embedding_parameters: int
    head_parameters: int
    identifier_parameters: int
    buffers: int
    layer_passes: int
    gradient_passes: int
    max_steps: int
    forward_flops: float
    train_flops: float

    @property
    def parameters(self) -> int:
        return self.core_parameters + self.embedding_parameters + self.head_parameters


def layer_passes(config: Any) -> tuple[int, int, int]:
    """Blocks run in one ACT step, those that carry gradient, and ACT steps at most."""
    if not hasattr(config, "H_cycles"):
        return config.num_layers, config.num_layers, 1
    per_cycle = (config.L_cycles + 1) * config.layers
    return (
        config.H_cycles * per_cycle,
        config.H_grad_cycles * per_cycle,
        config.halt_max_steps,
    )


def block_flops(config: Any) -> float:
    """Forward FLOPs of one block for one token, attention over the whole row included."""
    width, positions = config.hidden_size, config.prefix_len + config.seq_len
    share = positions / config.seq_len  # prefix positions are computed too
    inner = SwiGLU.inner_size(width, config.expansion)
    mlp = 6 * width * inner
    if getattr(config, "mlp_t", False):
        mixer = SwiGLU.inner_size(positions, config.expansion)
        return (mlp + 6 * width * mixer) * share
    head = width // config.num_heads
    projections = 2 * width * head * (2 * config.num_heads + 2 * config.key_value_heads)
    seen = (positions + 1) / 2 if config.causal else positions
    return (mlp + projections + 4 * width * seen) * share


def config_of(model: nn.Module) -> Any:
    """The architecture's options (a module's attributes have no type)."""
    return model.config


def measure(model: nn.Module) -> Cost:
    """Counts a model, which may live on the meta device."""
    config = config_of(model)
    sizes = dict(core=0, embed=0, head=0)
    for name, parameter in model.named_parameters():
        part = "core" if ".layers." in name else "embed" if "embed" in name else "head"
        sizes[part] += parameter.numel()
    identifiers = sum(b.numel() for n, b in model.named_buffers() if "puzzle_emb" in n)
    passes, with_gradient, steps = layer_passes(config)
    block, head = block_flops(config), 2 * config.hidden_size * config.vocab_size
    again = 4 if config.use_gradient_checkpointing else 3
    train = (passes - with_gradient) * block + with_gradient * again * block + 3 * head
    evaluate = passes * block + head
    refinement = getattr(config, "post_refinement_steps", 0) * getattr(config, "layers", 0) * block
    if refinement:
        trained = config.post_refinement_train
        train += again * refinement if trained else 0
        evaluate += refinement + (0 if trained else head)  # untrained: scored with and without it
    if not getattr(config, "no_ACT_continue", True):
        train += passes * block  # the bootstrapped target looks one step ahead
    return Cost(
        core_parameters=sizes["core"],
        embedding_parameters=sizes["embed"],
        head_parameters=sizes["head"],
        identifier_parameters=identifiers,
        buffers=sum(b.numel() for b in model.buffers()) - identifiers,
        layer_passes=passes,
        gradient_passes=with_gradient,
        max_steps=steps,
        forward_flops=evaluate,
        train_flops=train,
    )


def memory(
    config: BackboneConfig,
    cost: Cost,
    *,
    rows: int,
    micro_rows: int,
    optimizer: str,
    ema: bool,
) -> dict[str, int]:
    """Estimated bytes of one replica by part; `rows` are its slots, `micro_rows` at once."""
    wide = 8 if config.forward_dtype == "float64" else 4
    item = 2 if config.forward_dtype == "bfloat16" else wide
    positions = config.prefix_len + config.seq_len
    width = config.hidden_size
    inner = SwiGLU.inner_size(width, config.expansion)
    heads = (config.num_heads + 2 * config.key_value_heads) * (width // config.num_heads)
    # what autograd keeps of one block for one position: inputs of the maps, rotated heads and
    # their wide copies, gate, up and their product, and the wide sums under the norms
    kept = item * (4 * width + 2 * heads + 4 * inner) + wide * (2 * heads + 2 * width)
    if config.use_gradient_checkpointing:
        blocks = kept + item * width * cost.gradient_passes
    else:
        blocks = kept * cost.gradient_passes
    logits = config.vocab_size * (item + 3 * wide)
    moments = {"adam_atan2": 2, "adamw": 2, "muon": 1}[optimizer]
    carried = 2 if cost.max_steps > 1 else 0
    mask = positions**2 if config.document_mask else 0  # a byte a pair
    return {
        "weights": wide * (cost.parameters + cost.identifier_parameters + cost.buffers),
        "gradients": wide * cost.parameters,
        "optimizer": wide * moments * cost.parameters,
        "ema": wide * cost.parameters if ema else 0,
        "carry": carried * item * rows * positions * width,
        "activations": micro_rows * (positions * blocks + config.seq_len * logits + mask),
    }


def report(
    model: nn.Module, *, rows: int, micro_rows: int, world_size: int, optimizer: str, ema: bool
) -> str:
    """What `dry_run` prints; `rows` are the slots of one replica."""
    config, cost = config_of(model), measure(model)
    shape: dict[str, Any] = dict(rows=rows, optimizer=optimizer, ema=ema)
    parts = memory(config, cost, micro_rows=micro_rows, **shape)
    least = sum(memory(config, cost, micro_rows=1, **shape).values())
    step_tokens = rows * world_size * config.seq_len
    plain = cost.layer_passes - cost.gradient_passes
    lines = [
        ("parameters", _count(cost.parameters)),
        ("  core (blocks)", _count(cost.core_parameters)),
        ("  embeddings", _count(cost.embedding_parameters)),
        ("  heads", _count(cost.head_parameters)),
        ("identifier embedding", _count(cost.identifier_parameters) + " (own optimizer)"),
        ("buffers", _count(cost.buffers)),
        (
            "layer passes per token",
            f"{cost.layer_passes} per ACT step ({cost.gradient_passes} with gradient, {plain} "
            f"without), up to {cost.layer_passes * cost.max_steps:,} in {cost.max_steps} steps",
        ),
        ("FLOPs per token", f"{_short(cost.train_flops)} per ACT step in training, "
         f"{_short(cost.forward_flops)} in evaluation"),
        ("FLOPs per optimizer step", f"{_short(cost.train_flops * step_tokens)} "
         f"({rows * world_size} rows x {config.seq_len} tokens)"),
        ("memory of a replica", f"about {_bytes(sum(parts.values()))} "
         f"({rows} rows, {micro_rows} at once; {_bytes(least)} with one at once)"),
        *((f"  {name}", _bytes(size)) for name, size in parts.items()),
    ]  # fmt: skip
    return "\n".join(f"{name:<26}{value}" for name, value in lines)


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e5 else f"{number:,}"


def _short(number: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}FLOP"
    return f"{number:.0f} FLOP"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def fitting_rows(model: nn.Module, rows: int, free: int, *, optimizer: str, ema: bool) -> int:
    """The most rows at once, dividing `rows`, whose estimate stays under 80 % of `free` bytes."""
    counted = measure(model)
    for micro_rows in (n for n in range(rows, 0, -1) if rows % n == 0):
        need = memory(
            config_of(model),
            counted,
            rows=rows,
            micro_rows=micro_rows,
            optimizer=optimizer,
            ema=ema,
        )
        if sum(need.values()) < 0.8 * free:
            return micro_rows
    return 1
