r"""Benchmark generation with a cache of keys and values, and the loss from sharing it.

    python scripts/benchmarks/generate.py checkpoint=checkpoints/athena/my_run \
        text_file=held_out.txt

Continues windows of a text with and without a cache, in alternating rounds, and reports medians;
then reads the same windows token by token in float32, as generation does, and compares the
probabilities of the true tokens: without a cache, with all keys and values, and with those of fewer
outer cycles.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from pydantic import Field

from models.inference.generation import Decoder
from models.inference.key_value_cache import lay_out
from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from models.inference.sampling import PositiveInt, Sampling
from utils.backend import select_backend
from utils.config.key_values import CommandKeys, parse_key_values, run_command
from utils.config.schema import Folders
from utils.core.errors import UserError
from utils.core.plugins import use_plugins


def windows(model: LanguageModel, path: Path, rows: int, length: int) -> list[list[int]]:
    """Return `rows` pieces of `length` tokens, spread over the text."""
    try:
        ids = model.encode(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text_file={path} cannot be read: {error}") from None
    if len(ids) < rows * length:
        raise UserError(f"{path} has {len(ids)} tokens; {rows} windows of {length} need more")
    step = len(ids) // rows
    return [ids[i * step : i * step + length] for i in range(rows)]


def decoder(model: LanguageModel, rows: int, **options) -> Decoder:
    identifiers = torch.full((rows,), model.identifier, device=model.device)
    return Decoder(model.head, identifiers, model.steps, **options)


@torch.no_grad()
def read(model: LanguageModel, texts: list[list[int]], prompt: int, **options) -> torch.Tensor:
    """Return logits (B, tokens after the prompt, V), read token by token."""
    reader = decoder(model, len(texts), **options)
    found = [reader.begin([text[:prompt] for text in texts])]
    for n in range(prompt, len(texts[0]) - 1):
        found.append(reader.extend([text[n] for text in texts]))
    return torch.stack([logits.double().cpu() for logits in found], dim=1)


def nats(logits: torch.Tensor, texts: list[list[int]], prompt: int) -> float:
    """Return the mean nats of the true tokens after the prompt."""
    labels = torch.tensor([text[prompt:] for text in texts])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def seconds(model: LanguageModel, prompts: list[list[int]], new: int, **options) -> float:
    how = Sampling(max_new_tokens=new, temperature=1.0)
    begun = time.perf_counter()
    model.write(prompts, how, **options)
    return time.perf_counter() - begun


def compare_speed(model: LanguageModel, texts: list[list[int]], prompt: int, rounds: int) -> None:
    """Print tokens per second, for one text and for all texts at once."""
    kinds: dict[str, dict[str, Any]] = {
        "computed again": {"cached": False},
        "kept": {},
        "kept of the last cycle": {"cache_cycles": 1},
    }
    sizes = list(dict.fromkeys((1, len(texts))))
    new, speeds = len(texts[0]) - prompt, dict[tuple[str, int], list[float]]()
    for _ in range(rounds):
        for name, options in kinds.items():
            for rows in sizes:
                took = seconds(model, [text[:prompt] for text in texts[:rows]], new, **options)
                speeds.setdefault((name, rows), []).append(rows * new / took)
    print("| keys and values | memory | texts at once | tokens/s | gain |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for (name, rows), own in speeds.items():
        speed = statistics.median(own)
        gain = speed / statistics.median(speeds["computed again", rows])
        cycles = kinds[name].get("cache_cycles")
        size = 0 if name == "computed again" else model.cache_bytes(rows, cycles)
        print(f"| {name} | {size / 1e6:,.1f} MB | {rows} | {speed:,.1f} | {gain:.1f} x |")


def compare_probabilities(
    model: LanguageModel, precise: LanguageModel, texts: list[list[int]], prompt: int
) -> None:
    """Print the nats of the true tokens by the number of outer cycles that the cache keeps.

    precise: the model in float64, to compare with the model's own rounding errors.
    """
    total = lay_out(model.model.inner, model.steps).cycles
    reference = read(model, texts, prompt, cached=False)
    exact = nats(reference, texts, prompt)
    print("\n| outer cycles kept | memory of a text | nats per token | loss | largest difference |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(f"| none: computed again | | {exact:.4f} | | of {reference.abs().max():.0f} |")
    fewer = [2**n for n in range(total.bit_length()) if 2**n < total]
    for kept in (None, *reversed(fewer)):
        found = read(model, texts, prompt, cache_cycles=kept)
        cost, off = nats(found, texts, prompt), (found - reference).abs().max()
        name = f"all {total}: exact" if kept is None else f"{kept}: shared"
        size = model.cache_bytes(1, kept) / 1e6
        print(f"| {name} | {size:,.1f} MB | {cost:.4f} | {cost - exact:+.4f} | {off:.1e} |")
    truth = read(precise, texts, prompt, cached=False)
    cost, off = nats(truth, texts, prompt), (truth - reference).abs().max()
    print(f"| none, in float64 | | {cost:.4f} | {cost - exact:+.4f} | {off:.1e} |")
    off = (read(precise, texts, prompt) - truth).abs().max()
    print(f"| all, in float64, compared with none in float64 | | | | {off:.1e} |")


class Options(CommandKeys):
    """The arguments, each given as key=value."""

    checkpoint: str = Field(description="a checkpoint, or the folder of a run")
    plugins: Folders = Field([], description="directories of the model's own classes")
    text_file: Path = Field(description="held-out text, read as windows")
    rows: PositiveInt = Field(8, description="number of texts at once")
    prompt: PositiveInt = Field(32, description="tokens given")
    new_tokens: PositiveInt = Field(96, description="tokens written")
    steps: PositiveInt | None = Field(None, description="ACT steps; null: as evaluated")
    rounds: PositiveInt = Field(3, description="repeats")
    device_type: Literal["auto", "cuda", "mps", "cpu"] = Field(
        "auto", description="auto | cuda | mps | cpu"
    )


def run(arguments: Sequence[str]) -> None:
    args = parse_key_values(Options, arguments)
    use_plugins(args.plugins)
    backend, _ = select_backend(args.device_type)
    model = load_language_model(args.checkpoint, backend=backend, steps=args.steps)
    model.metadata = model.metadata.model_copy(update={"eos_id": None})  # no text ends early
    length = min(model.window, args.prompt + args.new_tokens)
    if length <= args.prompt:
        raise UserError(f"prompt={args.prompt} fills the window of {model.window} tokens")
    texts = windows(model, args.text_file, args.rows, length)
    passes = len(lay_out(model.model.inner, model.steps).slots)
    print(f"{args.prompt} tokens of each text given, {length - args.prompt} written or read; "
          f"{passes} passes of a block for a token; {backend.describe()}\n")  # fmt: skip
    compare_speed(model, texts, args.prompt, args.rounds)
    model, precise = (
        load_language_model(args.checkpoint, backend=backend, steps=args.steps, forward_dtype=dtype)
        for dtype in ("float32", "float64")
    )
    compare_probabilities(model, precise, texts, args.prompt)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
