"""Small corpora on disk and ways to run the real training on them."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from seeds import rng_for, seed_for

from dataset.build_corpus_dataset import main as build_corpus
from dataset.build_sudoku_dataset import main as build_sudoku
from dataset.train_tokenizer import main as train_tokenizer
from models.inference.language_model import LanguageModel
from pretrain import train
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import MANIFEST, Checkpoint, checkpoints_of, sha256
from utils.config.load import PretrainConfig, compose_config, load_config

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # tiny models: threads would only get in each other's way

TINY = (
    "arch=athena_trm_tiny",
    "arch.hidden_size=32",
    "arch.halt_max_steps=4",
    "arch.force_min_steps=1",
    "arch.halt_exploration_prob=0.3",
    "arch.post_refinement_steps=0",
    "arch.loss.loss_type=softmax_cross_entropy",
    "device_type=cpu",
    "lr=1e-3",
    "lr_warmup_steps=0",
    "global_batch_size=8",
    "log_interval=1",
)
IDENTIFIERS = ("arch.puzzle_emb_ndim=32", "puzzle_emb_lr=1e-2")
# For processes of their own: rows halt at different steps.
TEXT = [
    "arch=athena_trm_tiny", "arch.hidden_size=32", "arch.puzzle_emb_ndim=32",
    "arch.halt_max_steps=5", "arch.force_min_steps=1", "arch.halt_exploration_prob=0.3",
    "arch.post_refinement_steps=0", "puzzle_emb_lr=1e-2", "optimizer=adamw", "grad_clip_norm=0.5",
]  # fmt: skip
PUZZLES = [
    "arch=trm", "arch.hidden_size=32", "arch.num_heads=2", "arch.H_cycles=2", "arch.L_cycles=2",
    "arch.puzzle_emb_len=1", "arch.halt_max_steps=4", "arch.halt_exploration_prob=0.3",
    "feed=consume", "puzzle_emb_lr=1e-2", "grad_clip_norm=0.5",
]  # fmt: skip


def write_texts(folder: Path, seed: int, documents: int) -> list[Path]:
    """Two domains of pseudo-text, documents of very different length and variety."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(120)]
    files = []
    for name, share in (("poems", 120), ("lists", 12)):
        lines = [
            " ".join(rng.choice(words[: rng.integers(2, share)], rng.integers(3, 60)))
            for _ in range(documents)
        ]
        files.append(folder / f"{name}.txt")
        files[-1].write_text("\n".join(lines), "utf-8")
    return files


# A few real steps of a language model; stablemax, identifiers by domain.
LANGUAGE = """arch=athena_trm_tiny arch.hidden_size=32 arch.halt_max_steps=4
    arch.loss.loss_type=stablemax_cross_entropy device_type=cpu lr=1e-3 global_batch_size=8
    grad_accum_steps=2 max_steps=3 eval_max_batches=1"""


@pytest.fixture(scope="session")
def text_run(tmp_path_factory, text_corpus) -> Path:
    """The folder of a run that was trained on `text_corpus` for a few steps."""
    folder = tmp_path_factory.mktemp("run")
    folders = [f"data_paths=[{text_corpus}]", f"checkpoint_path={folder}"]
    config = load_config(compose_config([*LANGUAGE.split(), *folders]))
    assert train(CPUBackend(), config) == 0
    return folder


@torch.no_grad()
def next_probabilities(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """Of every token (V,), in float64, by the stablemax formula, from a forward pass alone."""
    batch = {
        "inputs": torch.tensor([ids], dtype=torch.int32),
        "puzzle_identifiers": torch.tensor([model.identifier], dtype=torch.int32),
    }
    carry = model.model.initial_carry(batch)
    for _ in range(model.steps):
        carry, outputs = model.model(carry, batch)
    x = outputs["logits"][0, -1].double()
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    return (s / s.sum()).numpy()


def altered(run: Path, target: Path, **changes) -> Path:
    """A copy of a run's checkpoint with changes to its config; `arch` is merged, unless it names
    another architecture."""
    shutil.copytree(checkpoints_of(run)[-1], target)
    config = yaml.safe_load((target / "config.yaml").read_text("utf-8"))
    arch = changes.get("arch", {})
    changes["arch"] = arch if "name" in arch else config["arch"] | arch
    config |= changes
    (target / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return sealed(target)


def sealed(checkpoint: Path) -> Path:
    """A checkpoint whose manifest says what its files are by now."""
    (checkpoint / MANIFEST).unlink()
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(checkpoint)): sha256(path) for path in files}
    (checkpoint / MANIFEST).write_text(json.dumps(digests), "utf-8")
    return checkpoint


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """Rows of 24 tokens of two domains, budgets 1..4, with a test split."""
    folder = tmp_path_factory.mktemp("text")
    files = [str(f) for f in write_texts(folder, seed=seed_for("text_corpus"), documents=60)]
    tokenizer = folder / "tok.json"
    train_tokenizer(["--input-files", *files, "--vocab-size", "300", "--output", str(tokenizer)])
    corpus = folder / "corpus"
    build_corpus(
        ["--tokenizer-json", str(tokenizer), "--input-files", *files, "--output-dir", str(corpus)]
        + "--seq-len 24 --train-ratio 0.8 --min-iterations 1 --max-iterations 6".split()
    )
    return corpus


@pytest.fixture(scope="session")
def puzzle_corpus(tmp_path_factory) -> Path:
    """4x4 sudokus in TRM's format, given five identifiers, so that their embedding
    trains, and budgets, so that rows halt at different steps."""
    corpus = tmp_path_factory.mktemp("puzzles") / "sudoku4"
    build_sudoku(
        "--size 4 --num-train 64 --num-test 16 --blanks 6 --output-dir".split() + [str(corpus)]
    )
    rng = rng_for("puzzle_corpus")
    for split in ("train", "test"):
        path = corpus / split / "all__puzzle_identifiers.npy"
        np.save(path, rng.integers(0, 5, len(np.load(path))).astype(np.int32))
        targets = rng.integers(1, 5, len(np.load(path))).astype(np.int32)
        np.save(path.with_name("all__iteration_targets.npy"), targets)
        meta = corpus / split / "dataset.json"
        changes = {"num_puzzle_identifiers": 5, "checksums": {}}
        meta.write_text(json.dumps(json.loads(meta.read_text("utf-8")) | changes), "utf-8")
    (corpus / "identifiers.json").write_text('["<blank>", "a", "b", "c", "d"]', "utf-8")
    return corpus


def make_config(corpus: Path, *overrides: str) -> PretrainConfig:
    return load_config(compose_config([*TINY, f"data_paths=[{corpus}]", *overrides]))


@pytest.fixture
def run_training(tmp_path) -> Callable[..., Path]:
    """Trains in this process; returns the run's folder."""

    def run(corpus: Path, name: str, *overrides: str, status: int = 0) -> Path:
        folder = tmp_path / name
        config = make_config(corpus, f"checkpoint_path={folder}", "run_name=test", *overrides)
        assert train(CPUBackend(), config) == status
        return folder

    return run


@pytest.fixture
def write_plugin(tmp_path, monkeypatch) -> Iterator[Callable[[str, str, str], None]]:
    """Write modules that are found in a package of the project, as files of their own."""
    written: list[str] = []

    def write(package: str, name: str, source: str) -> None:
        folder = tmp_path / "plugins" / package
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(source, "utf-8")
        module = importlib.import_module(package)
        if str(folder) not in module.__path__:
            monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])
        importlib.invalidate_caches()
        written.append(f"{package}.{name}")

    yield write
    for name in written:
        sys.modules.pop(name, None)


def start(
    *overrides: str,
    ranks: int = 1,
    script: str = "pretrain.py",
    env: dict[str, str] | None = None,
    torchrun: bool = False,
    max_restarts: int = 0,
) -> subprocess.Popen:
    """`pretrain.py` in processes of its own: as a user starts it, by torchrun if there are more."""
    command = [sys.executable]
    if ranks > 1 or torchrun:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            f"--max-restarts={max_restarts}",
        ]
    return subprocess.Popen(
        [*command, str(ROOT / script), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {}),
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks too
        process.communicate(timeout=60)
        raise
    return process.returncode, out, err


def metrics_of(run: Path, name: str) -> list[float]:
    """Every logged value of one metric, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line[name] for line in lines if name in line]


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two checkpoints differ, or that one of them lacks."""
    a, b = contents(one), contents(other)
    return sorted(a.keys() ^ b.keys() | {n for n in a.keys() & b.keys() if not a[n].equal(b[n])})


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, which must be whole."""
    opened = Checkpoint(checkpoint)
    opened.verify()
    return opened.all_tensors()


def write_run(folder: Path, *records: dict, tail: str = "") -> Path:
    """Write the log of a run that nobody trained; tail: a line that was cut off."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"time": 100.0, **record}) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + tail, "utf-8")
    return folder
