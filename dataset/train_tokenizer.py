r"""Train a byte-level BPE tokenizer on the inputs that the corpus builder accepts.

    python -m dataset.train_tokenizer --input-files data/demo/train --vocab-size 1024 \
        --output tok.json --documents file

Text is pre-tokenized as in GPT-2 (letters, digits, other characters). All 256 bytes are tokens, so
any text can be encoded. The same input produces the same file.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.text_sources import add_input_options, find_sources
from utils.core.atomic import write_result
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError
from utils.core.plugins import use_plugins

SPECIAL_TOKENS = ("<|pad|>", "<|eos|>")
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with at most `vocab_size` tokens; pad has id 0 and eos id 1."""
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            f"--vocab-size is {vocab_size}; it must be at least {SMALLEST_VOCAB}: 256 bytes and "
            f"{' '.join(SPECIAL_TOKENS)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def run(args: argparse.Namespace) -> None:
    """Read the inputs, train, and write the tokenizer atomically."""
    use_plugins(args.plugins)
    output: Path = args.output
    if output.is_dir():
        raise UserError(
            f"--output {output} is a directory; pass a file, such as {output}/tok.json."
        )
    sources = [source for group in find_sources(args.input_files, args.format) for source in group]
    if any(not s.is_pipe and output.resolve() == s.path.resolve() for s in sources):
        raise UserError(f"--output {output} is one of the inputs; pass another file.")
    options = ReadOptions(args.documents, args.text_key, args.max_bad_lines)
    size = sum(source.size for source in sources)
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        reader = DocumentReader(options, bar.update)
        texts = (text for source in sources for text in reader.texts(source))
        tokenizer = train_tokenizer(texts, args.vocab_size)
        reader.check_sources()
    with write_result(output, f"--output {output}") as part:
        part.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    learned = tokenizer.get_vocab_size()
    if learned < args.vocab_size:
        print(f"The text yielded only {learned} of the {args.vocab_size} requested tokens.")
    print(f"wrote {output}: {learned} tokens, pad 0, eos 1")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m dataset.train_tokenizer", __doc__)
    add_input_options(parser)
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32000,
        help="number of tokens, including bytes and special tokens (default: 32000)",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="path of the tokenizer.json to write",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module docstring."""
    run_cli(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    main()
