"""The base class of architectures, and the state that rows carry between steps.

Shape letters: B rows, S tokens, P prefix positions, D hidden.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backbone import Backbone, BackboneConfig, Batch
from models.layers import CastedEmbedding, SequenceInfo


@dataclass
class Carry:
    """The state that rows carry between steps; the first axis of every tensor is rows.

    latents: (B, P+S, D) each, in the forward dtype, without gradient; {} if nothing is carried.
    steps: (B,) int32, steps taken on the row's current example.
    halted: (B,) bool, whether the row loads a new example at the next training step.
    current_data: all batch entries of the row's current example.
    memory: (B, ...) each, state of the loss terms; an architecture passes it on unchanged.
    info: in evaluation, positions and mask of the rows, reused by later steps.
    """

    latents: dict[str, Tensor]
    steps: Tensor
    halted: Tensor
    current_data: Batch
    memory: dict[str, Tensor] = field(default_factory=dict)
    info: SequenceInfo | None = None


OptionsKey = tuple[tuple[str, int], ...]


def options_key(options: Mapping[str, int]) -> OptionsKey:
    """Return step options as a hashable key; `dict` converts it back."""
    return tuple(sorted(options.items()))


class Outputs(dict[str, Tensor]):
    """Outputs of a step by name. `logits` (B, S, V) are computed on first access from `readout` (B,
    S, D), the input of the output head, if the step returned that.
    """

    def __init__(self, predict: Callable[[Tensor], Tensor], **values: Tensor):
        super().__init__(values)
        self.predict = predict

    def __missing__(self, name: str) -> Tensor:
        if name != "logits" or "readout" not in self:
            raise KeyError(name)
        self[name] = logits = self.predict(self["readout"])
        return logits


class Architecture(nn.Module):
    """Base of all models, constructed with a dict of the options of its `Config`.

    An option that is unknown or conflicts with others raises `pydantic.ValidationError`, a
    ValueError that names the option.

    inner: the module that holds all weights. max_steps: a row halts after at most this many steps
    in training.
    """

    Config: type[BackboneConfig]
    config: Any
    inner: Backbone
    max_steps: int = 1
    min_steps: int = 1
    """Minimum number of training steps of a row."""
    repeats_blocks: bool = True
    """Whether a step runs a block several times, so that casting its weights once pays."""
    row_depth: str | None = None
    """Prefix of evaluation metrics if rows differ in depth: act or budget."""

    def blocks(self) -> list[nn.Module]:
        """Return the modules whose weight matrices Muon trains. Default: the items of every
        `nn.ModuleList`."""
        lists = [module for module in self.inner.modules() if isinstance(module, nn.ModuleList)]
        return [block for items in lists for block in items]

    def regions(self) -> list[tuple[nn.Module, str]]:
        """Return the modules and the names of their methods that `torch.compile` compiles. Default:
        the forward pass of each block."""
        return [(block, "forward") for block in self.blocks()]

    def embeddings(self) -> set[str]:
        """Return the names of the parameters that are embedding tables."""
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, nn.Embedding | CastedEmbedding)
            for parameter, _ in module.named_parameters(recurse=False)
        }

    def undecayed(self) -> set[str]:
        """Return the names of matrices without weight decay. Default: the embedding tables."""
        return self.embeddings()

    def step_options(self, progress: float, rng: np.random.Generator) -> dict[str, int]:
        """Return the options of a training step's forward pass, such as a number of loops; each set
        of options is a compiled program. Default: none.

        Called once per optimizer step; ranks and micro-batches get the same answer, and a resumed
        run repeats it. progress: share of the run completed before the step, 0..1. rng: a separate
        generator for each step.
        """
        return {}

    def eval_depth(self, progress: float = 1.0) -> int:
        """Return the depth of every row in an evaluation: ACT steps, or loops if there is one step.
        progress: share of training completed by then. Default: `max_steps`.
        """
        return self.max_steps

    def row_options(
        self, progress: float, rng: np.random.Generator, rows: int
    ) -> dict[str, np.ndarray]:
        """Draw additional inputs of each row for a training step. Default: none.

        The arrays are entries of `batch` for that step and never part of `current_data`.

        Args:
            progress: share of the run completed before the step, 0..1.
            rng: generator of (seed, step), the same on all ranks.
            rows: number of rows of all ranks.
        Returns:
            arrays by name, (rows,) each.
        """
        return {}

    def expected_steps(self, budget: int) -> float:
        """Return the mean number of training steps of an example with this iteration budget (0: no
        budget), to estimate the length of a run. Default: `max_steps`.
        """
        return float(self.max_steps)

    @property
    def takes_depth(self) -> bool:
        """Whether `forward` takes the depth as an option called `depth`, instead of ACT steps."""
        return "depth" in inspect.signature(self.forward).parameters

    def option_sets(self) -> dict[OptionsKey, float]:
        """Return the sets of step options that occur in a run, with each one's share of the steps.

        They are sampled over the progress of a run, so sets rarer than about one in a hundred draws
        may be missing.
        """
        rng = np.random.default_rng(0)
        draws = [
            options_key(self.step_options(progress, rng))
            for progress in np.linspace(0, 1, 33).tolist()
            for _ in range(16)
        ]
        return {key: count / len(draws) for key, count in Counter(draws).items()}

    @classmethod
    def fix_depth(
        cls, options: Mapping[str, Any], steps: int | None, refinement: int | None
    ) -> dict[str, Any]:
        """Return the changes to `options` of the `Config` that make every row of an evaluation run
        to the same depth. Default: none; all rows have the same depth.

        steps: ACT steps; None: as configured. refinement: passes after them; None: as configured.
        """
        return {}

    def notes(self) -> list[str]:
        """Return messages to print at the start of a run. Default: none."""
        return []

    def initial_carry(self, batch: Batch) -> Carry:
        """Return a carry with only free rows, for batches with the shapes of `batch`."""
        rows, device = len(batch["inputs"]), batch["inputs"].device
        # a row in progress must not keep what was drawn for its first step
        drawn = self.row_options(0.0, np.random.default_rng(0), 1)
        return Carry(
            latents=self.empty_latents(batch),
            steps=torch.zeros(rows, dtype=torch.int32, device=device),
            halted=torch.ones(rows, dtype=torch.bool, device=device),
            current_data={
                name: torch.zeros_like(value) for name, value in batch.items() if name not in drawn
            },
        )

    def empty_latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return the latents of free rows: their names, shapes and dtypes. Default: none."""
        return {}

    def fresh_latents(self) -> dict[str, Tensor]:
        """Return the initial latents of a row, (D,) each. Default: none."""
        return {}

    def admit(self, carry: Carry, batch: Batch) -> Carry:
        """Load the batch's examples into free rows; rows in progress keep their data.

        In evaluation a row that has halted is finished, not free.
        """
        free = carry.halted if self.training else carry.halted & (carry.steps == 0)

        def choose(new: Tensor, held: Tensor) -> Tensor:
            return torch.where(free.view(-1, *[1] * (held.ndim - 1)), new, held)

        fresh = self.fresh_latents()
        return Carry(
            latents={
                name: choose(fresh[name].to(held.dtype), held)
                for name, held in carry.latents.items()
            },
            steps=torch.where(free, 0, carry.steps),
            halted=carry.halted & ~free,
            current_data={
                name: choose(batch[name], held) for name, held in carry.current_data.items()
            },
            memory=carry.memory,
            info=None if self.training else carry.info,
        )

    def forward(self, carry: Carry, batch: Batch, *_: Any, **options: Any) -> tuple[Carry, Batch]:
        """Take one step of every row; free rows first take their row of `batch`.

        options: those returned by `step_options`, in training.
        Returns the new carry and the outputs by name: readout (B, S, D) or logits (B, S, V), and
        optional ones; see `Outputs`.
        """
        raise NotImplementedError
