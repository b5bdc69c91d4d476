r"""Build a corpus of prompts and responses from JSON lines.

    python -m dataset.build_text_dataset --tokenizer-json tok.json --input-files qa.jsonl.zst \
        --output-dir data/qa --max-context-tokens 256 --max-response-tokens 256

Each line is `{"prompt": ..., "response": ..., "meta": {"domain": ..., "iteration_budget": ...,
"complexity": ...}}`; `meta` and its keys are optional, and `--prompt-key question --response-key
answer` reads the texts from other keys. Each example becomes one causal row of prompt, response
and eos, with the prompt's labels ignored. Examples with the same prompt go to the same split.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.common import BLANK_IDENTIFIER
from dataset.corpus import (
    CorpusSplit,
    DocumentRouter,
    add_layout_option,
    check_iterations,
    finish_corpus,
    group_runs,
    open_splits,
    print_summary,
)
from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.text_sources import Source, find_sources
from dataset.output.array_writer import write_json
from dataset.output.corpus_folder import (
    add_output_options,
    check_output_dir,
    create_corpus,
    resolve_output,
)
from dataset.packing.windows import PackOptions, make_rows
from dataset.tokens.sizes import bytes_of
from dataset.tokens.tokenization import TextTokenizer, add_tokenizer_options
from utils.core.console import command_parser, run_cli, seed_number
from utils.core.errors import UserError

BATCH_CHARS = 2_000_000


@dataclass(frozen=True)
class Example:
    """One validated line."""

    prompt: str
    response: str
    domain: str
    budget: int


class ExampleReader:
    """Parses JSON objects into examples; `clipped_budgets` counts budgets out of bounds."""

    def __init__(self, reader: DocumentReader, args: argparse.Namespace) -> None:
        self._reader = reader
        self._bounds = (args.min_iterations, args.max_iterations)
        self._keys = {args.prompt_key: "--prompt-key", args.response_key: "--response-key"}
        self.clipped_budgets = 0

    def examples(self, source: Source) -> Iterator[Example]:
        """Yield the examples of one source."""
        found, bad_lines = False, self._reader.bad_lines
        for number, record in self._reader.records(source):
            try:
                example = self._parse(record, source.label)
            except UserError as error:
                self._reader.skip_bad_line(source, number, str(error))
                continue
            found = True
            yield example
        self._reader.end_source(source, found, self._reader.bad_lines - bad_lines)

    def _parse(self, record: dict[str, Any], label: str) -> Example:
        meta = record.get("meta")
        meta = {} if meta is None else meta
        if not isinstance(meta, dict):
            raise UserError("key 'meta' is not an object")
        domain = meta.get("domain", label)
        if not isinstance(domain, str) or not domain:
            raise UserError(f"meta.domain is {domain!r}, but must be a non-empty string")
        if domain == BLANK_IDENTIFIER:
            raise UserError(
                f"meta.domain is {domain!r}, which is reserved for rows without a domain"
            )
        prompt, response = (_get_text(record, *key) for key in self._keys.items())
        return Example(prompt, response, domain, self._compute_budget(meta))

    def _compute_budget(self, meta: dict[str, Any]) -> int:
        low, high = self._bounds
        budget = _get_number(meta, "iteration_budget")
        if budget is None:
            budget = low + (_get_number(meta, "complexity") or 0)
        clipped = min(max(math.floor(budget), low), high)
        self.clipped_budgets += clipped != math.floor(budget)
        return clipped


def _get_text(record: dict[str, Any], key: str, option: str) -> str:
    if key not in record:
        present = ", ".join(sorted(record)[:10]) or "none"
        raise UserError(f"no key {key!r} (keys: {present}; see {option})")
    value = record[key]
    if not isinstance(value, str) or not value:
        raise UserError(f"key {key!r} is {'not a string' if value != '' else 'an empty string'}")
    return value


def _get_number(meta: dict[str, Any], key: str) -> float | None:
    value = meta.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"meta.{key} is {value!r}, but must be numeric")
    if not abs(value) < 2**63:  # nan, too
        raise UserError(f"meta.{key} is {str(value)[:40]}, which is out of range")
    return value


class ExampleRows:
    """Turns examples into rows and writes each to the split of its prompt."""

    def __init__(
        self,
        args: argparse.Namespace,
        tokenizer: TextTokenizer,
        splits: dict[str, CorpusSplit],
    ) -> None:
        self._context = args.max_context_tokens
        self._response = args.max_response_tokens
        self._tokenizer = tokenizer
        self._splits = splits
        self.domains: list[str] = []
        self.truncated_prompts = 0
        self.truncated_responses = 0
        self.empty_examples = 0
        self._tokens_written = 0

    def add(self, batch: list[tuple[str, Example]]) -> None:
        """Tokenize and write (split, example) pairs, in order."""
        prompts = self._tokenizer.encode_tokens([example.prompt for _, example in batch])
        responses = self._tokenizer.encode_tokens([example.response for _, example in batch])
        keys: list[tuple[str, int]] = []
        rows: list[tuple[np.ndarray, int, int]] = []
        for (split, example), prompt, response in zip(batch, prompts, responses, strict=True):
            if example.domain not in self.domains:
                self.domains.append(example.domain)
            domain = self.domains.index(example.domain)
            for text, part in ((example.prompt, prompt), (example.response, response)):
                if not len(part):  # a normalizer may remove all of a text
                    self._splits[split].count_lost_text(domain, len(text.encode()))
            tokens, prompt_length = self._make_tokens(prompt, response)
            if len(tokens) < 2:
                self.empty_examples += 1
                continue
            kept_bytes = int(bytes_of(tokens, self._tokenizer.byte_lengths).sum(dtype=np.int64))
            self._splits[split].count_document(domain, kept_bytes, len(tokens))
            self._splits[split].count_unencodable(domain, tokens)
            keys.append((split, domain))
            rows.append((tokens, prompt_length, example.budget))
        for (split, domain), numbers in group_runs(keys):
            self._write(split, domain, [rows[number] for number in numbers])

    def _make_tokens(self, prompt: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the tokens of a row, at most S + 1, and the number of prompt tokens.

        A truncated response gets no eos: the model must not learn to stop there.
        """
        self.truncated_prompts += len(prompt) > self._context
        prompt = prompt[max(0, len(prompt) - self._context) :]
        if len(response) > self._response:
            self.truncated_responses += 1
            end = response[: self._response]
        else:
            end = self._tokenizer.append_eos(response, [len(response)])
        return np.concatenate([prompt, end]), len(prompt)

    def _write(self, split: str, domain: int, run: list[tuple[np.ndarray, int, int]]) -> None:
        tokenizer, seq_len = self._tokenizer, self._context + self._response
        lengths = np.array([len(tokens) for tokens, _, _ in run])
        prompts = np.array([prompt_length for _, prompt_length, _ in run])
        options = PackOptions(
            seq_len=seq_len,
            stride=seq_len,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            ignore_label_id=tokenizer.ignore_label_id,
            score_once=False,
        )
        rows = make_rows(
            options,
            np.concatenate([tokens for tokens, _, _ in run]),
            self._tokens_written,
            np.cumsum(lengths) - lengths,
            lengths,
            # The prompt's last token predicts the response's first; a row's first is never a label.
            np.maximum(prompts, 1) - 1,
        )
        self._tokens_written += int(lengths.sum())
        self._splits[split].write(domain, rows, np.array([budget for _, _, budget in run]))


def batch_by_split(
    sources: list[Source], reader: ExampleReader, router: DocumentRouter, dedup: bool
) -> Iterator[list[tuple[str, Example]]]:
    """Yield batches of (split, example).

    The prompt determines the split; prompt and response together determine duplicates.
    """
    batch, size = [], 0
    for source in sources:
        for example in reader.examples(source):
            both = f"{len(example.prompt)}\n{example.prompt}{example.response}"
            if dedup and router.is_copy(both.encode()):
                continue
            batch.append((router.assign_split(example.prompt.encode()), example))
            size += len(both)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def parse_weights(given: list[str]) -> dict[str, float]:
    """Parse `name=weight` arguments."""
    weights = {}
    for argument in given:
        name, _, value = argument.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not 0 <= weight < math.inf:
            raise UserError(
                f"--domain-weights {argument!r} is not of the form NAME=WEIGHT with WEIGHT >= 0."
            )
        if name in weights:
            raise UserError(f"--domain-weights lists {name!r} twice; list it once.")
        weights[name] = weight
    if weights and not any(weights.values()):
        raise UserError("--domain-weights are all 0; at least one must be positive.")
    return weights


def check_options(args: argparse.Namespace) -> None:
    """Check the options, before any file is opened."""
    for option in ("max_context_tokens", "max_response_tokens"):
        if (value := getattr(args, option)) < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    if args.prompt_key == args.response_key:
        raise UserError(
            f"--prompt-key and --response-key are both {args.prompt_key!r}; they must differ."
        )
    if not 0 <= args.train_ratio <= 1:
        raise UserError(f"--train-ratio is {args.train_ratio}; it must be between 0 and 1.")
    check_iterations(args)
    check_output_dir(resolve_output(args.output_dir), args.overwrite)


def build(args: argparse.Namespace) -> None:
    """Build the corpus that the command line describes, atomically."""
    started = time.perf_counter()
    check_options(args)
    weights = parse_weights(args.domain_weights)
    tokenizer = TextTokenizer(
        args.tokenizer_json, args.eos_token, args.pad_token, args.workers, args.tokenizer_library
    )
    sources = [source for group in find_sources(args.input_files, "jsonl") for source in group]
    if plain := [source for source in sources if source.format != "jsonl"]:
        kind = {"text": "plain text", "parquet": "Parquet"}[plain[0].format]
        raise UserError(f"{plain[0]} is {kind}; prompts and responses must be JSON lines.")
    seq_len = args.max_context_tokens + args.max_response_tokens
    size = sum(source.size for source in sources)
    with (
        create_corpus(args.output_dir, args.overwrite) as workspace,
        tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        folder = workspace.folder
        tokenizer.save(folder / "tokenizer.json")
        router = DocumentRouter(args.seed, args.train_ratio, False, workspace.journal)
        lines = DocumentReader(ReadOptions(max_bad_lines=args.max_bad_lines), bar.update)
        reader = ExampleReader(lines, args)
        splits = open_splits(args, folder, tokenizer, seq_len)
        rows = ExampleRows(args, tokenizer, splits)
        for batch in batch_by_split(sources, reader, router, args.dedup == "exact"):
            rows.add(batch)
        lines.check_sources()
        if unknown := weights.keys() - set(rows.domains):
            raise UserError(
                f"--domain-weights lists unknown domains {', '.join(sorted(unknown))}; the domains "
                f"are {', '.join(rows.domains)}."
            )
        if not splits["train"].writer.rows and args.train_ratio > 0:
            raise UserError(
                "no examples were assigned to the training split; raise --train-ratio (now "
                f"{args.train_ratio})."
            )
        skipped = {
            "duplicates": router.duplicates,
            "bad_lines": lines.bad_lines,
            "examples_without_tokens": rows.empty_examples,
        }
        report = {
            "inputs": [{"file": str(s), "bytes": s.size} for s in sources],
            "skipped": skipped,
            "truncated_prompts": rows.truncated_prompts,
            "truncated_responses": rows.truncated_responses,
            "clipped_budgets": reader.clipped_budgets,
        }
        report = finish_corpus(
            args, folder, splits, tokenizer, rows.domains, seq_len, report, domain_weights=weights
        )
        write_json(folder / "build_report.json", report)
    for name in ("truncated_prompts", "truncated_responses", "clipped_budgets"):
        if report[name]:
            print(f"{report[name]:,} {name.replace('_', ' ')}")
    print_summary(args.output_dir, splits, skipped, time.perf_counter() - started)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m dataset.build_text_dataset", __doc__)
    add_output_options(parser)
    add_tokenizer_options(parser)
    add_layout_option(parser)
    add = parser.add_argument
    add(
        "--input-files",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="JSON lines files, as described above",
    )
    add("--prompt-key", default="prompt", help="key of the prompt (default: prompt)")
    add("--response-key", default="response", help="key of the response (default: response)")
    add(
        "--max-context-tokens",
        type=int,
        default=1024,
        help="maximum prompt length; longer prompts are truncated at the start (default: 1024)",
    )
    add(
        "--max-response-tokens",
        type=int,
        default=1024,
        help="maximum response length; longer responses are truncated at the end (default: 1024)",
    )
    add("--train-ratio", type=float, default=0.98, help="(default: 0.98)")
    add("--seed", type=seed_number, default=7, help="selects the test prompts (default: 7)")
    add("--min-iterations", type=int, default=4, help="(default: 4)")
    add("--max-iterations", type=int, default=48, help="(default: 48)")
    add(
        "--domain-weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=WEIGHT",
        help="relative share of each domain in training; unlisted domains get 1 (default: by "
        "size); overridden by domain_weights of pretrain.py",
    )
    add("--identifiers", choices=("none", "domain"), default="domain", help="(default: domain)")
    add("--dedup", choices=("exact", "none"), default="exact", help="(default: exact)")
    add(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="N",
        help="bad lines to skip before failing (default: 0)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module docstring."""
    run_cli(lambda: build(parse_args(argv)))


if __name__ == "__main__":
    main()
