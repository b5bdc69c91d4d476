r"""Train a byte-level BPE tokenizer on the same kinds of input as the corpus builder.

    python -m dataset.train_tokenizer --input-files data/demo/train --vocab-size 1024 \
        --output tok.json --documents file

Text is cut as GPT-2 cuts it (letters, digits, the rest); all 256 bytes are tokens, so every text
can be encoded. The same input gives the same file.
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

SPECIAL_TOKENS = ("<|pad|>", "<|eos|>")
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens; pad has id 0, eos id 1."""
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
    """Read the inputs, train, and put the file in place at once."""
    output: Path = args.output
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file, such as {output}/tok.json.")
    sources = [source for group in find_sources(args.input_files, args.format) for source in group]
    if any(not s.is_pipe and output.resolve() == s.path.resolve() for s in sources):
        raise UserError(f"--output {output} is one of the inputs; name another file.")
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
        print(f"The text gave only {learned} tokens of the {args.vocab_size} asked for.")
    print(f"wrote {output}: {learned} tokens, pad 0, eos 1")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m dataset.train_tokenizer", __doc__)
    add_input_options(parser)
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32000,
        help="tokens, bytes and special ones included (default: 32000)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="tokenizer.json to write"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    run_cli(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    main()
