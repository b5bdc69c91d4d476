"""A whole update, averages included, against plain loops in float64."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from kernel_tools import can_run_kernels
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.base import Architecture
from utils.backend.state import load_optimizer_state, optimizer_state
from utils.config.schema import OptimizerConfig
from utils.training.ema import EMA, AverageUpdate
from utils.training.optimizers import create_optimizers
from utils.training.optimizers.adam_atan2 import AdamATan2
from utils.training.optimizers.adamw import FusedAdamW
from utils.training.optimizers.muon import StackedMuon, orthogonalize
from utils.training.state import TrainState

BETAS, RATES, DECAYS, EMA_RATE = (0.9, 0.95), (1e-2, 3e-3), (0.1, 0.0), 0.9
ADAM = {
    "adam_atan2": lambda groups, lr: AdamATan2(groups, lr, BETAS),
    "adam_atan2, together": lambda groups, lr: AdamATan2(groups, lr, BETAS, foreach=True),
    "adamw": lambda groups, lr: FusedAdamW(groups, lr=lr, betas=BETAS, eps=1e-8),
}


def weights(turned: bool = False) -> list[nn.Parameter]:
    """Smaller and larger than what is updated at once; the last two have few gradients or none.

    turned: two are not contiguous.
    """
    drawn = [torch.randn(3), torch.randn(1), torch.randn(700, 750), torch.randn(6, 5)]
    drawn += [torch.randn(70, 50), torch.randn(8, 4), torch.randn(2, 2)]
    return [nn.Parameter(x.T if turned and k in (3, 4) else x) for k, x in enumerate(drawn)]


def draw_gradients(step: int, parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = torch.randn_like(p)
    parameters[0].grad[0] = 0.0  # as in rows of an embedding that no text has used
    parameters[1].grad = None if step % 2 else parameters[1].grad
    parameters[2].grad = torch.randn(750, 700).T  # in another order of memory
    parameters[-2].grad = None if step != 3 else parameters[-2].grad
    parameters[-1].grad = None


def build_state(
    make: Callable[[list[dict], float], torch.optim.Optimizer], parameters: list[nn.Parameter]
) -> TrainState:
    """Two optimizers with a learning rate each, of two groups with a weight decay each."""
    optimizers = []
    for i, lr in enumerate(RATES):
        own = parameters[i::2]
        halves = (own[::2], own[1::2])
        groups = [dict(params=p, weight_decay=d) for p, d in zip(halves, DECAYS, strict=True)]
        optimizers.append(make(groups, lr))
    return state_of(optimizers, list(RATES), parameters)


def state_of(optimizers, rates, parameters) -> TrainState:
    named = [(str(i), p) for i, p in enumerate(parameters)]
    return TrainState(
        model=nn.Module(),  # type: ignore[arg-type]
        step_model=nn.Module(),
        optimizers=optimizers,
        base_lrs=rates,
        ema=EMA(named, EMA_RATE, warmup=True),
        halted=np.ones(1, bool),
        parameters=parameters,
    )


def angle(m: Tensor, root: Tensor) -> Tensor:
    return torch.atan2(m, root)


def quotient(m: Tensor, root: Tensor) -> Tensor:
    return m / (root + 1e-8)


class Reference:
    """A weight, its moments and its average in float64."""

    def __init__(self, p: Tensor, direction, lr: float, decay: float):
        self.p = p.detach().double().clone()
        self.m, self.v, self.average = (torch.zeros_like(self.p) for _ in range(3))
        self.average += self.p
        self.direction, self.lr, self.decay, self.t = direction, lr, decay, 0

    def update(self, grad: Tensor | None, factor: float, rate: float) -> None:
        if grad is not None:
            (beta1, beta2), g, lr = BETAS, grad.double(), self.lr * factor
            self.t += 1
            self.m = beta1 * self.m + (1 - beta1) * g
            self.v = beta2 * self.v + (1 - beta2) * g**2
            root = self.v.sqrt() / math.sqrt(1 - beta2**self.t)
            step = self.direction(self.m, root) * lr / (1 - beta1**self.t)
            self.p = self.p * (1 - lr * self.decay) - step
        self.average = rate * self.average + (1 - rate) * self.p


def references(parameters: list[nn.Parameter], direction) -> list[Reference]:
    """As `build_state` divides the weights."""
    return [
        Reference(p, direction, RATES[i % 2], DECAYS[i // 2 % 2]) for i, p in enumerate(parameters)
    ]


def steps(state: TrainState, count: int = 5) -> Iterator[float]:
    """Update; yield the factor of each learning rate."""
    for step in range(count):
        draw_gradients(step, state.parameters)
        factor = 1.0 - step / 10
        state.update(factor)
        yield factor


@pytest.mark.parametrize("turned", [False, True], ids=["", "not contiguous"])
@pytest.mark.parametrize("name", ADAM)
def test_an_update_and_its_averages_follow_their_formulas(name, turned):
    parameters = weights(turned)
    expected = references(parameters, quotient if name == "adamw" else angle)
    state = build_state(ADAM[name], parameters)
    for t, factor in enumerate(steps(state)):
        for p, one in zip(parameters, expected, strict=True):
            one.update(p.grad, factor, min(EMA_RATE, (1 + t) / (10 + t)))
    for i, (p, one) in enumerate(zip(parameters, expected, strict=True)):
        for found, exact in ((p.detach(), one.p), (state.ema.shadow[str(i)], one.average)):
            torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    assert state.ema.updates == 5


@pytest.mark.parametrize("name", ADAM)
def test_averages_taken_along_have_the_same_bits(name, monkeypatch):
    """As if each optimizer had left them all to the average's own update."""
    found = []
    for takes in (None, False):
        torch.manual_seed(7)
        state = build_state(ADAM[name], weights())
        for optimizer in state.optimizers if takes is False else ():
            monkeypatch.setattr(optimizer, "takes_averages", False, raising=False)
        list(steps(state))
        found.append([*state.parameters, *state.ema.shadow.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_average_of_narrow_weights_is_kept_in_float32():
    weight = nn.Parameter(torch.randn(5).bfloat16())
    state = state_of([AdamATan2([weight], 0.1, BETAS)], [0.1], [weight])
    before = weight.detach().float()
    weight.grad = torch.randn_like(weight)
    state.update(1.0)
    expected = before.lerp(weight.detach().float(), 0.9)
    assert torch.equal(state.ema.shadow["0"], expected) and expected.dtype == torch.float32


class Stacks(Architecture):
    """Matrices of three shapes in its blocks, one of them tall; a head and norms outside."""

    def __init__(self):
        super().__init__()
        sizes = [(24, 16), (16, 24), (24, 16), (24, 16), (16, 16), (16, 24)]
        self.inside = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in sizes)
        self.outside = nn.Linear(16, 30)

    def blocks(self):
        return list(self.inside)


def muon_of(model: Stacks, decay: float = 0.1) -> list[torch.optim.Optimizer]:
    named = OptimizerConfig(name="muon")
    return create_optimizers(
        named, model, lr=0.02, betas=BETAS, weight_decay=decay, decay_all=False
    )


def test_muon_orthogonalizes_matrices_together_as_torch_does_one_by_one():
    models = [Stacks(), Stacks()]
    models[1].load_state_dict(models[0].state_dict())
    muon, _ = muon_of(models[0])
    plain = torch.optim.Muon(
        models[1].inside.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(4):
        for k, (p, q) in enumerate(
            zip(models[0].inside.parameters(), models[1].inside.parameters(), strict=True)
        ):
            p.grad = None if k == 2 and step % 2 else torch.randn_like(p)
            q.grad = p.grad
        before = [p.detach().clone() for p in models[0].inside.parameters()]
        muon.step()
        plain.step()
        moved = max(
            (a - p).norm() for a, p in zip(before, models[0].inside.parameters(), strict=True)
        )
        assert moved > 0.05
    for p, q in zip(models[0].inside.parameters(), models[1].inside.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # a bfloat16 of an update of 0.02
        torch.testing.assert_close(
            muon.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"]
        )


def test_muon_makes_updates_orthogonal():
    """Of each matrix, whatever the gradients of the others in its stack."""
    model = Stacks()
    muon, _ = muon_of(model, decay=0.0)
    before = [p.detach().clone() for p in model.inside.parameters()]
    for k, p in enumerate(model.inside.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (3 * k - 6)
    muon.step()
    for old, p in zip(before, model.inside.parameters(), strict=True):
        values = torch.linalg.svdvals((old - p.detach()).double()) / (
            0.02 * 0.2 * max(p.shape) ** 0.5
        )
        assert values.min() > 0.6 and values.max() < 1.3, values


@pytest.mark.parametrize("kind", ["adamw", "adam_atan2"])
def test_moments_that_were_not_of_a_fused_adamw_load(kind):
    """Those of an earlier version of Athena, of a run on another device, or of adam_atan2."""
    grads = torch.randn(4, 2, 3)

    def updated(model: nn.Linear, optimizer: torch.optim.Optimizer, grads: Tensor) -> None:
        for grad in grads:
            model.weight.grad = grad.clone()
            optimizer.step()

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, betas=BETAS, foreach=False)

    def fused(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": list(model.parameters())}]
        return FusedAdamW(groups, lr=0.01, betas=BETAS, eps=1e-8)

    model = nn.Linear(3, 2, bias=False)
    old = plain(model) if kind == "adamw" else AdamATan2(model.parameters(), 0.01, BETAS)
    updated(model, old, grads[:2])
    saved = copy.deepcopy(optimizer_state(model, old))
    resumed = copy.deepcopy(model)
    other = copy.deepcopy(model)
    new, reference = fused(resumed), plain(other)
    load_optimizer_state(resumed, new, copy.deepcopy(saved))
    load_optimizer_state(other, reference, copy.deepcopy(saved))
    assert new.param_groups[0]["fused"]
    updated(resumed, new, grads[2:])
    updated(other, reference, grads[2:])
    torch.testing.assert_close(resumed.weight, other.weight, rtol=1e-6, atol=1e-7)
    assert new.state[resumed.weight]["step"] == 4


@pytest.mark.parametrize("limit", [None, 0.5])
def test_gradients_are_clipped_to_a_limit_alone(limit):
    parameters = weights()
    state = state_of([], [], parameters)
    draw_gradients(0, parameters)
    before = [None if p.grad is None else p.grad.double().clone() for p in parameters]
    exact = sum((g**2).sum() for g in before if g is not None).sqrt()
    norm = state.clip_gradients(limit)
    assert norm.item() == pytest.approx(exact.item(), rel=1e-5)
    factor = 1.0 if limit is None else limit / exact
    for p, old in zip(parameters, before, strict=True):
        if old is not None:
            torch.testing.assert_close(p.grad.double(), old * factor, rtol=1e-4, atol=0)


class Operations(TorchDispatchMode):
    """Counts operations: each costs a GPU's host a launch."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adam_atan2, together", "adamw", "muon"])
def test_an_update_takes_as_many_operations_for_forty_weights_as_for_four(name):
    def operations(count: int) -> int:
        parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(count)]
        if name == "muon":
            made = StackedMuon(parameters, lr=0.1)
        else:
            made = ADAM[name]([{"params": parameters, "weight_decay": 0.1}], 0.1)
        state = state_of([made], [0.1], parameters)
        for p in parameters:
            p.grad = torch.randn_like(p)
        state.update(1.0)  # creates the moments
        with Operations() as counted:
            state.clip_gradients(1.0)
            state.update(1.0)
            state.drop_gradients()
        return counted.count

    assert operations(40) == operations(4)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_adam_atan2_is_its_formula_for_gradients_of_any_size(native, rate, monkeypatch):
    if not native:
        monkeypatch.setattr("utils.training.optimizers.adam_atan2.cpu_kernels", lambda: None)
    elif not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    count, lr, decay = 1003, 1e-2, 0.1
    sizes = 10.0 ** torch.randint(-15, 15, (3, count))
    gradients = torch.randn(3, count) * sizes
    gradients[:, :5] = 0.0
    weight = nn.Parameter(torch.randn(count))
    p, shadow = weight.detach().double(), weight.detach().clone()
    average = shadow.double()
    m, v = torch.zeros(2, count, dtype=torch.float64)
    optimizer = AdamATan2([weight], lr, BETAS, decay)
    for step, grad in enumerate(gradients, 1):
        weight.grad = grad
        optimizer.step(averages=AverageUpdate({weight: shadow}, rate))
        m = m.lerp(grad.double(), 1 - BETAS[0])
        v = v * BETAS[1] + (1 - BETAS[1]) * grad.double() ** 2
        root = v.sqrt() / math.sqrt(1 - BETAS[1] ** step)
        p = p * (1 - lr * decay) - lr / (1 - BETAS[0] ** step) * torch.atan2(m, root)
        average = average.lerp(p, rate)
    torch.testing.assert_close(weight.detach().double(), p, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shadow.double(), average, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [(2, 96, 64), (1, 64, 160), (3, 32, 32), (1, 160, 160), (2, 64, 48)]
)
def test_muons_iterations_are_those_of_float64(shape, threads, set_threads):
    """By the kernel, if this CPU has one for the shape, and by PyTorch."""
    coefficients = (3.4445, -4.775, 2.0315)
    stack = torch.randn(shape)
    right = stack.double()
    right = right / right.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        a, b, c = coefficients
        gram = right @ right.mT
        right = a * right + (b * gram + c * gram @ gram) @ right
    set_threads(threads)
    found = orthogonalize(stack, coefficients, 5, 1e-7)
    assert found.dtype == torch.bfloat16
    assert (found.double() - right).norm() <= 0.03 * right.norm()
    assert (found.double() - right).abs().max() <= 0.05 * right.abs().max()
