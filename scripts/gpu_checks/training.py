"""Check training: equal to the CPU, deterministic, and with one wait per step."""

import resource
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from scripts.benchmarks import rounding
from scripts.gpu_checks.kernels import documents
from scripts.gpu_checks.runs import (
    BARS,
    RUN,
    STEPS,
    TINY,
    Way,
    apart,
    different_tensors,
    read_curve,
    run,
)
from scripts.gpu_checks.session import COMPILED, EAGER, Session
from scripts.smoke_test import ROOT
from scripts.training_step import make_step
from utils.checkpoint.format import Checkpoint
from utils.config.values import assignment
from utils.core.errors import UserError
from utils.monitoring.run_log import RunMetrics
from utils.training.state import choose_kernels, create_train_state

PLAYS = ROOT / "data" / "quickstart"
SMALL = """
    arch=athena_trm_tiny arch.hidden_size=128 arch.num_heads=4 arch.L_layers=1
    arch.halt_exploration_prob=0.0
""".split()
UNMASKED = "arch.document_mask=false"
ROOM = 5e8
"""Bytes available in the memory check; training needs ten times as many."""


def check_curve(session: Session) -> None:
    """Compare twenty steps on the device with twenty on the CPU."""
    corpora = session.corpora()
    ways = session.ways() | {"two micro-batches": (EAGER, "grad_accum_steps=2")}
    for dtype, bar in list(BARS.items())[: 1 if session.tiny else None]:
        options = [corpora, *TINY, *RUN, f"arch.forward_dtype={dtype}"]
        reference = read_curve(session.train(f"cpu {dtype}", *options, device_type="cpu"))
        for name, overrides in ways.items():
            with session.check(f"{dtype}, {name}") as found:
                folder = session.train(f"{name} {dtype}", *options, *overrides)
                losses, weights = apart(reference, read_curve(folder))
                passed = max(losses, weights if dtype == "float64" else 0) <= bar
                found.update(passed=passed, losses=losses, weights=weights)


def check_resume(session: Session) -> None:
    """Check that N steps, resumed in another process, equal 2N steps bit for bit."""
    half = STEPS // 2
    saving = [f"checkpoint_interval={half}", "keep_checkpoints=null", "arch.forward_dtype=bfloat16"]
    given, ways = [session.corpora(), *TINY, *RUN, *saving], session.ways()
    if not session.tiny:
        ways["without document masks"] = (EAGER, UNMASKED)

    def train_twice(name: str) -> list[Checkpoint]:
        whole, resumed = session.folder / f"{name} whole", session.folder / f"{name} resumed"
        run(Way(session.backend.name), [*given, *ways[name]], whole)
        # compile and tune the kernels again, as in a later session
        again = (("TORCHINDUCTOR_CACHE_DIR", str(session.folder / f"{name} kernels")),)
        resume = assignment("resume", whole / f"step_{half}")
        run(Way(session.backend.name, env=again), [*given, *ways[name], resume], resumed)
        return [Checkpoint(folder / f"step_{STEPS}") for folder in (whole, resumed)]

    with ThreadPoolExecutor(len(ways)) as pool:
        for name, pair in {name: pool.submit(train_twice, name) for name in ways}.items():
            with session.check(name) as found:
                whole, resumed = (checkpoint.all_tensors() for checkpoint in pair.result())
                different = different_tensors(whole, resumed)
                found.update(passed=not different, tensors=len(whole), different=different[:5])


def check_compile(session: Session) -> None:
    """Check compiled blocks with document masks, on rows shorter than a flex block."""
    _, exact = rounding.build(SMALL, "float64")
    batch = rounding.rows(rounding.ROWS, torch.Generator().manual_seed(0))
    batch["document_starts"] = documents(*batch["inputs"].shape)
    (_, expected), *_ = rounding.run(exact, batch, 1)
    for dtype, least in {"float32": 0.9999, "bfloat16": 0.9}.items():
        with session.check(dtype) as found:
            config, head = rounding.build([*SMALL, COMPILED], dtype)
            head.load_state_dict(exact.state_dict())
            head.to(session.backend.device)
            choose_kernels(config, head, session.backend)
            create_train_state(config, head, backend=session.backend)
            moved = {name: value.to(session.backend.device) for name, value in batch.items()}
            counters.clear()
            (_, gradient), *_ = rounding.run(head, moved, 1)
            cosine = torch.cosine_similarity(expected, gradient.cpu(), 0).item()
            compiled = counters["frames"]["ok"]
            found.update(passed=cosine > least and compiled > 0, gradient_cosine=cosine)
            found["compiled_frames"] = compiled
        if session.tiny:
            return


def check_fast(session: Session) -> None:
    """Compare the losses of steps on the fast paths with those of plain steps."""
    options = [session.corpora(), *TINY, "max_steps=10", *RUN[1:], EAGER]
    for dtype, bar in {"float32": 1e-4, "bfloat16": 2e-2}.items():
        with session.check(dtype) as found:
            losses = []
            for fast in ("false", "true"):
                given = [*options, f"arch.forward_dtype={dtype}", f"fast={fast}"]
                metrics = RunMetrics(session.train(f"{dtype} {fast}", *given))
                losses.append(metrics.series("train/lm_loss")[1])
            apart = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
            found.update(passed=apart < bar, relative_difference=apart, steps=len(losses[0]))


def check_deterministic(session: Session) -> None:
    """Check that three runs of the same five steps are equal bit for bit."""
    session.backend.set_deterministic(True)
    sizes = ["global_batch_size=8", "vocab_size=300", f"seq_len={32 if session.tiny else 512}"]
    small = [*SMALL, *sizes, "arch.forward_dtype=bfloat16"]
    kinds = {name: [*small, *way] for name, way in session.ways().items()} | {
        "without document masks": [*small, EAGER, UNMASKED],
        "float32": [*small, EAGER, "arch.forward_dtype=float32"],
        "MLP over positions": [*small, EAGER, UNMASKED, "arch.mlp_t=true", "arch.causal=false"],
    }

    def weights(overrides: list[str]) -> Tensor:
        torch.manual_seed(0)
        step, state = make_step(session.config(*overrides), session.backend)
        for _ in range(5):
            step()
        return torch.cat([p.detach().flatten() for p in state.model.parameters()])

    for name, overrides in kinds.items():
        with session.check(name) as found:
            first, *others = (weights(overrides) for _ in range(3))
            found["largest_difference"] = max((first - x).abs().max().item() for x in others)
            found["passed"] = all(torch.equal(first, x) for x in others)


def check_waits(session: Session) -> None:
    """Check, by torch's own count, that a step waits for the device once."""
    given = [session.corpora(), *TINY, "log_interval=100", "checkpoint_interval=null"]
    names = session.ways() | {
        "two micro-batches, Muon, trained refinement": (
            EAGER, "feed=present", "optimizer=muon", "grad_accum_steps=2",
            "arch.post_refinement_steps=1", "arch.post_refinement_train=true",
        ),
        "plateau, AdamW": (EAGER, "arch.loss.halt_target=plateau", "optimizer=adamw"),
    }  # fmt: skip

    def count(name: str, steps: int, overrides: tuple[str, ...]) -> Counter[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if session.on_cuda:
                torch.cuda.set_sync_debug_mode("warn")
            end = (f"max_steps={steps}", "eval_max_batches=1")
            session.train(f"{name} {steps}", *given, *end, *overrides)
        found = (w for w in caught if "synchronizing" in str(w.message))
        return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)

    for name, overrides in names.items():
        with session.check(name) as found:
            # the start and the end of a run wait equally often in both
            places = count(name, 8, overrides) - count(name, 4, overrides)
            found.update(waits_a_step=places.total() / 4, at=dict(places))
            if session.on_cuda:  # nothing waits on a CPU
                found["passed"] = places.total() == 4


def train_on_plays(session: Session) -> None:
    """Train on plays for most of a minute; check that the loss falls and is evaluated."""
    given = [assignment("data_paths", [PLAYS]), "max_seconds=45", "log_interval=5"]
    if session.tiny or not PLAYS.is_dir():
        given[0] = session.corpora()
    if session.tiny:
        given += [EAGER, "max_steps=8", "lr_warmup_steps=2", "log_interval=1", "eval_max_batches=2"]
    with session.check("loss") as found:
        metrics = RunMetrics(session.train("run", "experiment=quickstart", *given))
        losses = metrics.series("train/lm_loss")[1]
        found.update(passed=losses[-1] < losses[0], first=losses[0], last=losses[-1])
        found.update(steps=metrics.records[-1]["step"], mfu=metrics.last("train/mfu"))
        found["tokens_a_second"] = statistics.median(metrics.series("train/tokens_per_s")[1])
        if metrics.headline is None:
            raise RuntimeError("no evaluation was logged")
        found["held_out"] = f"{metrics.last(metrics.headline.key):.4g} {metrics.headline.label}"


def check_memory(session: Session) -> None:
    """Check that too large a batch gives an error that names the key to lower."""
    rows = ["global_batch_size=4096", "micro_batch_size=4096"]
    with session.check("out of memory") as found:
        corpora, message = session.corpora(), "no error: it fits"
        try:
            with little_memory(session.on_cuda):
                session.train("run", corpora, *TINY, *RUN, EAGER, UNMASKED, *rows)
        except UserError as error:
            message = str(error)
        named = all(word in message for word in ("out of memory", "micro_batch_size"))
        found.update(passed=named and "\n" not in message, message=message)


@contextmanager
def little_memory(on_cuda: bool) -> Iterator[None]:
    """Limit this process to ROOM more bytes on its device."""
    if on_cuda:
        whole = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(ROOM / whole)
        yield
        return
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(ROOM), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
