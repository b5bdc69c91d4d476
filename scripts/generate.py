r"""Continue texts with a trained model.

    python scripts/generate.py checkpoint=checkpoints/athena/quickstart prompt="HAMLET." \
        max_new_tokens=200 temperature=0.8 top_k=50
    python scripts/generate.py checkpoint=checkpoints/athena/quickstart prompts_file=prompts.txt
    python scripts/generate.py checkpoint=checkpoints/athena/quickstart interactive=true

A single text is printed as it is generated; texts from a file are printed as JSON lines, one batch
at a time. Notes go to standard error. Every token is computed with the same number of ACT steps;
keys and values of earlier tokens are cached, for every pass of the recursion.
"""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import orjson
from pydantic import Field, field_validator
from tqdm import tqdm

from dataset.input.document_reader import decode_line, parse_json_object, read_lines
from dataset.input.text_sources import find_source
from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from models.inference.sampling import PositiveInt, Sampling
from utils.backend import select_backend
from utils.config.key_values import parse_key_values, run_command
from utils.config.schema import Folders
from utils.core.errors import UserError
from utils.core.plugins import use_plugins

TEXTS = ("prompt", "stop")  # values that are taken literally


class Options(Sampling):
    """The arguments, each given as key=value."""

    checkpoint: str = Field(description="a checkpoint, or a run's folder (its newest checkpoint)")
    plugins: Folders = Field(
        [], description="directories of the model's own classes, as in training"
    )
    prompt: str | None = Field(None, description="the text to continue")
    prompts_file: Path | None = Field(
        None,
        description="one prompt per line, or JSON lines with the key prompt; may be "
        "compressed; - for stdin",
    )
    interactive: bool = Field(False, description="read prompts interactively")
    stop: list[str] = Field(
        [], description=r'string that ends the continuation, or several: ["\n\n", "THE END"]'
    )
    batch_size: PositiveInt = Field(
        16, description="number of texts of prompts_file to generate at once"
    )
    steps: PositiveInt | None = Field(
        None, description="ACT steps per token; null: as many as in evaluation"
    )
    post_refinement_steps: int | None = Field(
        None, ge=0, description="passes over z_H after the last step; null: as configured"
    )
    cache: bool = Field(True, description="cache keys and values; false: recompute them, slowly")
    cache_cycles: PositiveInt | None = Field(
        None,
        description="cache only this many last outer cycles, which is an approximation; "
        "null: all, which is exact",
    )
    weights: Literal["ema", "raw"] = Field("ema", description="averaged or final weights")
    identifier: str | None = Field(
        None, description="identifier embedding, by name; null: the only one, or the blank one"
    )
    device_type: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="where to run")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_a_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("["):
            try:
                return orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise ValueError(
                    f'is not a JSON list such as ["\\n\\n", "THE END"] ({error})'
                ) from None
        return [value.replace("\\n", "\n").replace("\\t", "\t")]

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError(
                "contains an empty text, which would end every continuation immediately"
            )
        return value


def parse(arguments: Sequence[str]) -> Options:
    """Parse key=value arguments. Raises a UserError that lists every mistake."""
    options = parse_key_values(Options, arguments, verbatim=TEXTS)
    sources = [options.prompt is not None, options.prompts_file is not None, options.interactive]
    if sum(sources) != 1:
        raise UserError("set one of prompt=TEXT, prompts_file=FILE and interactive=true")
    if options.prompt == "":
        raise UserError("prompt is empty; give the beginning of the text")
    return options


def note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)


def load(options: Options) -> LanguageModel:
    """Load the model, and print notes on it."""
    use_plugins(options.plugins)
    backend, _ = select_backend(options.device_type)
    model = load_language_model(
        options.checkpoint,
        options.weights,
        steps=options.steps,
        refinement=options.post_refinement_steps,
        backend=backend,
        identifier=options.identifier,
        rows=options.batch_size,
    )
    names = [name for i, name in enumerate(model.identifiers) if i != model.identifier]
    blank = model.identifier == model.metadata.blank_identifier_id
    if options.identifier is None and blank and names and model.config.puzzle_emb_ndim:
        note(f"using the blank identifier, because none is given; known: {', '.join(names[:5])}")
    for sentence in model.model.notes():
        note(sentence)
    return model


def check_cache(options: Options, model: LanguageModel, rows: int) -> None:
    """Print the size of the cache; raise UserError if the device has too little memory."""
    if not options.cache:
        return
    need = model.cache_bytes(rows, options.cache_cycles)
    free = model.backend.available_memory()
    texts = f"{rows} texts" if rows > 1 else "a text"
    size = f"keys and values of {texts} take {need / 1e6:,.1f} MB"
    if need > free:
        raise UserError(
            f"{size}, but {free / 1e6:,.0f} MB are free; use fewer texts at once (batch_size), "
            "fewer steps, cache_cycles=1 (an approximation), or cache=false (slow)"
        )
    note(size)


def encode(model: LanguageModel, prompt: str) -> list[int]:
    ids = model.encode(prompt) or model.opening()
    if len(ids) > model.window:
        note(f"a prompt has {len(ids)} tokens, of which the model sees the last {model.window}")
    return ids


def settings(options: Options) -> dict[str, Any]:
    """Return the arguments of `LanguageModel.write`."""
    return {
        "how": Sampling(**{name: getattr(options, name) for name in Sampling.model_fields}),
        "cached": options.cache,
        "cache_cycles": options.cache_cycles,
        "stop": options.stop,
    }


def write_one(options: Options, model: LanguageModel, prompt: str) -> None:
    """Print the prompt, and its continuation as it is generated."""
    ids = encode(model, prompt)
    print(prompt, end="", flush=True)
    how = settings(options)
    done = model.write([ids], show=lambda _, piece: print(piece, end="", flush=True), **how)[0]
    print()
    if done.ended:
        found = len(done.ids) < options.max_new_tokens and not options.stop
        note("the model ended the text here" if found else "the text ends here")


def talk(options: Options, model: LanguageModel) -> None:
    """Read a prompt and print its continuation, until the input ends."""
    note("write the beginning of a text and press Enter; Ctrl-D ends")
    lines = input_lines()
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        if (line := next(lines, None)) is None:
            print(file=sys.stderr)
            return
        try:
            prompt = decode_line(line, 1)
        except ValueError as error:
            note(f"line skipped: {error}")
            continue
        if prompt:
            write_one(options, model, prompt)


def input_lines() -> Iterator[bytes]:
    """Yield the lines of standard input as they come."""
    if not sys.stdin.isatty():
        yield from (line for _, line in read_lines(find_source("-", "text", "interactive")))
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    with suppress(EOFError):
        while True:  # input() allows editing the line
            yield input().encode("utf-8", "surrogateescape")


def prompts_of(path: Path) -> Iterator[str]:
    """Yield the prompts of a file; skip empty lines."""
    try:
        source = find_source(str(path), "text", "prompts_file")
        if source.format == "parquet":
            raise UserError("give lines of text, or JSON lines with a key prompt")
    except UserError as error:
        raise UserError(f"prompts_file={path} cannot be read: {error}") from None
    for number, line in read_lines(source):
        try:
            prompt: Any = decode_line(line, number)
            if source.format == "jsonl" and (prompt := prompt.strip()):
                prompt = parse_json_object(line, number).get("prompt")
                if not isinstance(prompt, str):
                    raise ValueError('the value of "prompt" is missing or not a string')
        except ValueError as error:
            raise UserError(f"{source}, line {number:,}: {error}") from None
        if prompt:
            yield prompt


def write_many(options: Options, model: LanguageModel, prompts: list[str]) -> None:
    """Print a JSON line {prompt, text, ended} for each prompt, in order."""
    ids = [encode(model, prompt) for prompt in prompts]
    numbers = iter(range(len(prompts)))
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # the encoding of JSON
    with tqdm(total=len(prompts), unit="text", disable=None) as bar:
        while rows := list(islice(numbers, options.batch_size)):
            done = model.write([ids[i] for i in rows], rows=rows, **settings(options))
            for i, written in zip(rows, done, strict=True):
                record = {"prompt": prompts[i], "text": written.text, "ended": written.ended}
                line = orjson.dumps(record).decode()
                try:
                    line.encode(sys.stdout.encoding or "utf-8")
                except UnicodeEncodeError:
                    line = json.dumps(
                        record, separators=(",", ":")
                    )  # ASCII, so that nothing is lost
                print(line, flush=True)
            bar.update(len(rows))


def run(options: Options) -> None:
    """Load the model, and continue the given prompts."""
    prompts = []
    if options.prompts_file is not None and not (prompts := list(prompts_of(options.prompts_file))):
        raise UserError(f"prompts_file={options.prompts_file} contains no prompt")
    model = load(options)
    check_cache(options, model, min(options.batch_size, len(prompts)) if prompts else 1)
    if prompts:
        write_many(options, model, prompts)
    elif options.interactive:
        talk(options, model)
    else:
        write_one(options, model, options.prompt or "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(
        Options,
        __doc__,
        lambda arguments: run(parse(arguments)),
        argv,
        closed_status=0,
        check_arguments=False,
    )


if __name__ == "__main__":
    main()
