"""KL to a base: stay close to a previously trained model.

The penalty is KL(model ‖ base) over the whole vocabulary, the direction used for fine-tuning with a
reference policy. It penalises answers that are unlikely under the base, but lets the model drop
some of the base's answers, as fine-tuning should.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.base import Architecture, Batch, Carry
from models.terms.base import LoadBase, Result, Seen, Term, TermConfig
from models.token_losses import SoftmaxLogits, by_tokens
from utils.core.errors import UserError


class KLToBaseConfig(TermConfig):
    """Options of `KLToBase`."""

    weight: float = Field(gt=0, allow_inf_nan=False, description="factor on the divergence")
    base: str = Field(
        description="checkpoint of the base, or a run (its newest checkpoint)",
        json_schema_extra={"checkpoint": True},
    )
    weights: Literal["ema", "raw"] = Field("ema", description="which weights of the base")


class KLToBase(Term):
    """The divergence from a frozen base, in nats per label.

    In each row the base takes as many ACT steps as the model, up to its own maximum. Each step of
    the model costs a step of the base, without gradient, and an unchanged model has zero divergence
    at every step. The memory holds the base's latents.
    """

    Config = KLToBaseConfig
    needs = frozenset({"logits"})
    training_only = True
    saves_memory = False
    flat_keys = {"kl_to": "base", "kl_weight": "weight"}

    base: Any = None  # an Architecture, once `use` is called
    base_probabilities: SoftmaxLogits

    @property
    def ready(self) -> bool:
        return self.base is not None

    def prepare(self, load_base: LoadBase, arch: Any) -> None:
        key = f"arch.loss.terms.{self.name}.base"
        head = load_base(key, self.config.base, self.config.weights)
        if arch.causal and not head.model.config.causal:
            raise UserError(
                f"{key}={self.config.base} is not causal: it would see the tokens that this "
                "run's model predicts; name a causal base"
            )
        self.use(head.model, head.loss_type.softmax_logits)

    def check(self, arch: Any, highest: Any) -> None:
        if getattr(arch, "post_refinement_train", False) and arch.post_refinement_steps:
            raise UserError(
                f"arch.loss.terms.{self.name} compares answers before refinement, but "
                "arch.post_refinement_train=true trains refined answers: set it to false"
            )

    def use(self, base: Architecture, probabilities: SoftmaxLogits) -> None:
        """Set the base. probabilities: its loss' map from logits to probabilities."""
        self.base = base.requires_grad_(False).eval()
        self.base_probabilities = probabilities

    def models(self) -> list[nn.Module]:
        return [self.base] if self.ready else []

    @property
    def steps(self) -> int:
        """ACT steps of the base."""
        return self.base.max_steps

    @torch.no_grad()
    def begin(self, carry: Carry, most_steps: int) -> dict[str, Tensor]:
        z = self.base.initial_carry(carry.current_data).latents
        for done in range(min(self.steps, most_steps)):
            new, _ = self._step(z, torch.full_like(carry.steps, done), carry.current_data)
            further = (carry.steps > done).view(-1, 1, 1)
            z = {name: torch.where(further, new[name], held) for name, held in z.items()}
        return z

    def __call__(self, seen: Seen) -> Result:
        z, logits = self._step(dict(seen.memory), seen.carry.steps - 1, dict(seen.data))
        own, base = seen.loss_type.softmax_logits, self.base_probabilities
        loss = seen.mean_over_tokens(kl_divergence(seen.outputs["logits"], logits, own, base))
        return Result(loss, {"kl_loss": seen.over_rows(loss)}, z)

    @torch.no_grad()
    def _step(self, z: Batch, done: Tensor, data: Batch) -> tuple[Batch, Tensor]:
        """Run the next step of the base for rows that have taken `done` (B,) steps.

        Rows with 0 start from the initial latents; rows that have taken all steps of the base keep
        theirs. data: the rows' own batch entries.
        """
        options = {"depth": self.base.eval_depth()} if self.base.takes_depth else {}
        carry, outputs = self.base(
            Carry(z, done, (done == 0) | (done >= self.steps), data), data, **options
        )
        return carry.latents, outputs["logits"]


def kl_divergence(
    logits: Tensor, base_logits: Tensor, own: SoftmaxLogits, of_base: SoftmaxLogits
) -> Tensor:
    """Return Σ p · log(p / q) over the vocabulary in nats, p the model's probabilities, q the
    base's, with a gradient for `logits`.

    logits, base_logits: (..., V). own, of_base: their losses' maps from logits to probabilities.
    Returns (...), at least float32.
    """

    def of_tokens(x: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = own(x).log_softmax(-1), of_base(y).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return by_tokens(of_tokens, logits, base_logits)
