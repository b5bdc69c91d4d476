"""AthenaTRM: one small network applied many times to two latent streams, with adaptive halting.

z_H carries the answer, z_L the working state. After Tiny Recursive Models (Jolicoeur-Martineau
2025, arXiv 2510.04871), adapted to text: causal attention, document masks, iteration budgets per
example.

Shape letters: B rows, S tokens, P prefix positions, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbone import Backbone, BackboneConfig, Batch, mean_over, real_tokens
from models.base import Architecture, Carry, Outputs
from models.common import trunc_normal_init_
from models.layers import Block, CastedLinear, SequenceInfo, at_least_float32, maybe_any, rms_norm

Latents = dict[str, Tensor]


class AthenaTRMConfig(BackboneConfig):
    """Options of `AthenaTRM`."""

    H_cycles: int = Field(3, ge=1, description="outer cycles of an ACT step")
    L_cycles: int = Field(6, ge=1, description="updates of z_L in an outer cycle")
    L_layers: int = Field(2, ge=1, description="blocks of L_level")
    H_layers: int = Field(0, description="accepted for TRM's configs, without effect")
    H_grad_cycles: int = Field(1, ge=1, description="last outer cycles that carry gradient")
    mlp_t: bool = Field(False, description="mix positions by an MLP instead of attention")

    halt_max_steps: int = Field(16, ge=1, description="maximum number of ACT steps")
    halt_exploration_prob: float = Field(
        0.1, ge=0, le=1, description="probability that a step sets a random minimum number of steps"
    )
    force_min_steps: int = Field(0, ge=0, description="minimum number of ACT steps in training")
    no_ACT_continue: bool = Field(True, description="halt when q_halt > 0; no continue target")
    eval_halting: Literal["max", "fixed", "budget", "act"] = Field(
        "max", description="how the number of steps in evaluation is decided"
    )
    eval_steps: int | None = Field(None, ge=1, description="ACT steps with eval_halting=fixed")

    post_refinement_steps: int = Field(0, ge=0, description="z_H passes after halting")
    post_refinement_train: bool = Field(False, description="train those passes too")

    reasoning_seq_len: int = Field(
        96, ge=1, description="token positions that the reasoning head reads"
    )
    reasoning_vocab_size: int = Field(32000, ge=1, description="its vocabulary")
    enable_reasoning_stream: bool | Literal["auto"] = Field(
        "auto", description="a head that decodes z_L; auto: only where a loss uses it"
    )

    @property
    def max_eval_steps(self) -> int:
        """Number of ACT steps that every row runs in evaluation."""
        if self.eval_halting == "fixed" and self.eval_steps is not None:
            return self.eval_steps
        return self.halt_max_steps

    @model_validator(mode="after")
    def _steps_fit(self):
        if self.force_min_steps > self.halt_max_steps:
            raise ValueError(
                f"force_min_steps={self.force_min_steps} exceeds halt_max_steps="
                f"{self.halt_max_steps}; decrease the former or increase the latter"
            )
        if self.H_grad_cycles > self.H_cycles:
            raise ValueError(
                f"H_grad_cycles={self.H_grad_cycles} exceeds H_cycles={self.H_cycles}; at most "
                "all outer cycles can carry gradient"
            )
        if (self.eval_halting == "fixed") != (self.eval_steps is not None):
            raise ValueError(
                f"eval_halting={self.eval_halting} and eval_steps={self.eval_steps} clash: "
                "set eval_steps if and only if eval_halting=fixed"
            )
        if self.mlp_t and (self.causal or self.document_mask):
            raise ValueError(
                f"mlp_t=true mixes all positions, but causal={self.causal} and document_mask="
                f"{self.document_mask}; set both to false or mlp_t to false"
            )
        return self


class ReasoningModule(nn.Module):
    """L_level: adds the injection, then runs its blocks."""

    def __init__(self, layers: list[Block], norm_type: str, eps: float, checkpointed: bool):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm_type, self.eps, self.checkpointed = norm_type, eps, checkpointed

    def forward(self, h: Tensor, injection: Tensor | None, info: SequenceInfo) -> Tensor:
        if injection is not None:
            h = h + injection
        for layer in self.layers:
            if self.checkpointed and torch.is_grad_enabled():
                h = checkpoint(layer, h, info, use_reentrant=False)
            else:
                h = layer(h, info)
        return rms_norm(h, self.eps) if self.norm_type == "pre" else h


class AthenaTRMInner(Backbone):
    """The recursion: no halting, no losses.

    A variant names its latent streams and defines how a cycle updates them (`work`, `conclude`).
    """

    config: AthenaTRMConfig
    streams: tuple[str, ...] = ("z_H", "z_L")
    """Names of the latents: the first holds the answer, the last the working state."""

    def __init__(self, config: AthenaTRMConfig):
        super().__init__(config)
        self.q_head = CastedLinear(config.hidden_size, 2, bias=True)
        mixer_size = config.prefix_len + config.seq_len if config.mlp_t else None
        self.L_level = ReasoningModule(
            [self.make_block(mixer_size) for _ in range(config.L_layers)],
            config.norm_type,
            config.rms_norm_eps,
            config.use_gradient_checkpointing,
        )
        for stream in self.streams:
            start = trunc_normal_init_(torch.empty(config.hidden_size))
            self.register_buffer(f"{stream.removeprefix('z_')}_init", start)
        if config.enable_reasoning_stream is True:
            self.reasoning_head = CastedLinear(config.hidden_size, config.reasoning_vocab_size)
        with torch.no_grad():  # almost never halts at first, as in TRM
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(-5)  # type: ignore[union-attr]

    def starts(self) -> Latents:
        """Return the initial value of each stream of a row, (D,)."""
        return {z: self.get_buffer(f"{z.removeprefix('z_')}_init") for z in self.streams}

    def work(self, z: Latents, x: Tensor, info: SequenceInfo) -> Latents:
        """Return the streams after the inner cycles of an outer cycle. x: (B, L, D) embeddings."""
        z_H, z_L = z["z_H"], z["z_L"]
        for _ in range(self.config.L_cycles):
            z_L = self.L_level(z_L, z_H + x, info)
        return {"z_H": z_H, "z_L": z_L}

    def conclude(self, z: Latents, info: SequenceInfo) -> Tensor:
        """Return the answer's stream at the end of an outer cycle, (B, L, D)."""
        return self.L_level(z["z_H"], z["z_L"], info)

    def recur(self, z: Latents, x: Tensor, info: SequenceInfo) -> Latents:
        """Take one ACT step: streams (B, L, D), with gradient through the last H_grad_cycles."""

        def cycle(z: Latents) -> Latents:
            info.begin_cycle()
            z = self.work(z, x, info)
            return z | {self.streams[0]: self.conclude(z, info)}

        with torch.no_grad():
            for _ in range(self.config.H_cycles - self.config.H_grad_cycles):
                z = cycle(z)
        for _ in range(self.config.H_grad_cycles):
            z = cycle(z)
        return z

    def refine(self, z: Latents, info: SequenceInfo) -> Tensor:
        """Return the answer's stream after the refinement passes, (B, L, D)."""
        info.end_cycles()
        for _ in range(self.config.post_refinement_steps):
            z = z | {self.streams[0]: self.conclude(z, info)}
        return z[self.streams[0]]

    def answer(self, x: Tensor, info: SequenceInfo, steps: int) -> Tensor:
        """Return the answer's stream (B, L, D) after this many ACT steps from the start, refined,
        without halting, as `forward` computes it in evaluation. x: embedded positions (B, L, D).
        """
        z = {name: start.to(x.dtype).expand_as(x) for name, start in self.starts().items()}
        for _ in range(steps):
            z = self.recur(z, x, info)
        return self.refine(z, info)

    def halt_logits(self, z_H: Tensor, data: Batch) -> tuple[Tensor, Tensor]:
        """Return q_halt and q_continue, (B,) each, at least float32."""
        prefix = self.config.prefix_len
        if self.config.causal or self.masks_documents(data):
            # a causal first position sees nothing of the row
            pooled = mean_over(z_H[:, prefix:], real_tokens(data))
        else:
            pooled = z_H[:, 0]
        halt, proceed = at_least_float32(self.q_head(pooled)).unbind(-1)
        return halt, proceed


class AthenaTRM(Architecture):
    """The recursion under adaptive computation time (ACT)."""

    Config: type[AthenaTRMConfig] = AthenaTRMConfig
    Inner: type[AthenaTRMInner] = AthenaTRMInner
    inner: AthenaTRMInner

    def __init__(self, config_dict: dict):
        super().__init__()
        self.config = self.Config(**config_dict)
        self.inner = self.Inner(self.config).to(self.config.param_dtype)

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        return self.config.halt_max_steps

    @property
    def min_steps(self) -> int:  # type: ignore[override]
        return self.config.force_min_steps

    def regions(self) -> list[tuple[nn.Module, str]]:
        """See `Architecture`. A level in one piece has fewer calls, and what is added to its input
        costs no pass over memory. Checkpoints stay outside of what is compiled.
        """
        if self.config.use_gradient_checkpointing:
            return super().regions()
        return [(self.inner.L_level, "forward")]

    def expected_steps(self, budget: int) -> float:
        """See `Architecture`. Halting by the head is not predicted.

        A row that explores at its k-th step continues with the probability that a number drawn from
        2..halt_max_steps exceeds k.
        """
        most = self.max_steps
        first = min(max(budget or most, self.min_steps, 1), most)
        steps, reached = float(first), 1.0
        for k in range(first, most):
            reached *= self.config.halt_exploration_prob * (most - max(k, 1)) / (most - 1)
            steps += reached
        return steps

    def eval_depth(self, progress: float = 1.0) -> int:
        return self.config.max_eval_steps

    @property
    def row_depth(self) -> str | None:  # type: ignore[override]
        return self.config.eval_halting if self.config.eval_halting in ("act", "budget") else None

    def row_options(
        self, progress: float, rng: np.random.Generator, rows: int
    ) -> dict[str, np.ndarray]:
        """Draw `explore`, the minimum number of ACT steps of each row, int32.

        With probability `halt_exploration_prob` it is uniform in 2..halt_max_steps inclusive;
        otherwise it is 0.
        """
        chance, most = self.config.halt_exploration_prob, self.config.halt_max_steps
        if chance == 0:
            return {}
        if most < 2:
            return {"explore": np.zeros(rows, np.int32)}
        # Raw bits, one pair per row, so that the numbers equal those of earlier versions.
        coin, steps = rng.bit_generator.random_raw(2 * rows).reshape(rows, 2).T
        explores = (coin >> np.uint64(11)) * 2.0**-53 < chance
        demanded = np.where(explores, 2 + steps % np.uint64(most - 1), 0)
        return {"explore": demanded.astype(np.int32)}

    @classmethod
    def fix_depth(
        cls, options: Mapping[str, Any], steps: int | None, refinement: int | None
    ) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if steps is not None:
            changes = {"eval_halting": "fixed", "eval_steps": steps}
        elif options.get("eval_halting") != "fixed":
            changes = {"eval_halting": "max"}
        return changes if refinement is None else changes | {"post_refinement_steps": refinement}

    def notes(self) -> list[str]:
        if not self.config.post_refinement_steps or self.config.post_refinement_train:
            return []
        return [
            "the refinement passes are never trained (post_refinement_train=false); evaluations "
            "also report metrics without them, under unrefined/"
        ]

    def empty_latents(self, batch: Batch) -> Latents:
        rows, length = batch["inputs"].shape
        shape = (rows, self.config.prefix_len + length, self.config.hidden_size)
        options = dict(dtype=self.config.dtype, device=batch["inputs"].device)
        return {name: torch.zeros(shape, **options) for name in self.inner.streams}

    def fresh_latents(self) -> Latents:
        return self.inner.starts()

    def forward(self, carry: Carry, batch: Batch) -> tuple[Carry, Batch]:
        """Take one ACT step of every row; free rows first take their row of `batch`.

        Returns the new carry and outputs: readout (B, S, D); q_halt_logits, q_continue_logits
        (B,) at least float32; and, if enabled, target_q_continue (B,), reasoning_logits,
        unrefined_logits.
        """
        carry = self.admit(carry, batch)
        data, inner = carry.current_data, self.inner
        info, before = carry.info or inner.sequence_info(data), carry.latents
        z = inner.recur(before, inner.embed(data), info)
        if not self.training:  # a row that has halted keeps its state
            done = carry.halted.view(-1, 1, 1)
            z = {name: torch.where(done, before[name], after) for name, after in z.items()}
        q_halt, q_continue = inner.halt_logits(z[inner.streams[0]], data)
        steps = torch.where(carry.halted, carry.steps, carry.steps + 1)
        halted = carry.halted | self.halts(steps, q_halt, q_continue, data, batch.get("explore"))
        outputs = self._readout(z, halted, info)
        outputs |= {"q_halt_logits": q_halt, "q_continue_logits": q_continue}
        new = replace(
            carry,
            latents={name: after.detach() for name, after in z.items()},
            steps=steps,
            halted=halted.detach(),
            info=info if self._keeps_info(halted.device) else None,
        )
        if self.training and not self.config.no_ACT_continue:
            outputs["target_q_continue"] = self._continue_target(new, data, info)
        return new, outputs

    def _keeps_info(self, device: torch.device) -> bool:
        """Return whether later steps may reuse positions and mask, which holds in evaluation, where
        no row is admitted after the first step. On XLA, sharing would compile another program for
        later steps.
        """
        return not self.training and device.type != "xla"

    @torch.no_grad()
    def halts(
        self, steps: Tensor, q_halt: Tensor, q_continue: Tensor, data: Batch, explore: Tensor | None
    ) -> Tensor:
        """Return the rows that stop after `steps`, which includes this step, (B,) bool."""
        config = self.config
        says = q_halt > 0 if config.no_ACT_continue else q_halt > q_continue
        never = torch.zeros_like(steps, dtype=torch.bool)
        spent = steps >= data["iteration_targets"] if "iteration_targets" in data else never
        if self.training:
            wants = (says | spent) & (steps >= config.force_min_steps)
            if explore is not None:
                wants &= steps >= explore
        else:
            wants = {"act": says, "budget": spent}.get(config.eval_halting, never)
        return wants | (
            steps >= (config.halt_max_steps if self.training else config.max_eval_steps)
        )

    def _readout(self, z: Latents, halted: Tensor, info: SequenceInfo) -> Outputs:
        config, inner = self.config, self.inner
        outputs = Outputs(inner.predict)
        answer = unrefined = z[inner.streams[0]]
        refines = config.post_refinement_steps > 0  # reading `halted` waits for the device
        if refines and (config.post_refinement_train if self.training else maybe_any(halted)):
            # the carry stays unrefined: only the logits of rows that have halted change
            answer = torch.where(halted.view(-1, 1, 1), inner.refine(z, info), unrefined)
            if not self.training:
                outputs["unrefined_logits"] = inner.logits(unrefined)
        outputs["readout"] = answer[:, config.prefix_len :]
        if config.enable_reasoning_stream is True:
            read = z[inner.streams[-1]][:, config.prefix_len :][:, : config.reasoning_seq_len]
            outputs["reasoning_logits"] = inner.reasoning_head(read)
        return outputs

    @torch.no_grad()
    def _continue_target(self, carry: Carry, data: Batch, info: SequenceInfo) -> Tensor:
        """Return TRM's bootstrapped Q-learning target, the value predicted by the next step,
        (B,).
        """
        z = self.inner.recur(carry.latents, self.inner.embed(data), info)
        halt, proceed = self.inner.halt_logits(z[self.inner.streams[0]], data)
        last = carry.steps >= self.config.halt_max_steps
        return torch.sigmoid(torch.where(last, halt, torch.maximum(halt, proceed)))
