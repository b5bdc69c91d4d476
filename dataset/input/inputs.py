"""Which files a corpus is built from: their domains, which are held out, and in which order."""

import argparse
import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.common import BLANK_IDENTIFIER
from dataset.input.text_sources import Source, find_sources
from utils.core.errors import UserError


@dataclass(frozen=True)
class Input:
    """One source with what the command line says about it."""

    source: Source
    domain: int
    held_out: bool


def plan_inputs(args: argparse.Namespace) -> tuple[list[Input], list[str]]:
    """Inputs in reading order (held-out files first) and the names of the domains."""
    groups = find_sources(args.input_files, args.format)
    sources = [source for group in groups for source in group]
    held_out, extra_groups = _held_out(args, sources)
    labels = _labels(args.domain_labels, groups, extra_groups)
    if BLANK_IDENTIFIER in labels.values():
        raise UserError(
            f"a domain cannot be named {BLANK_IDENTIFIER}, which stands for none; give another "
            "name with --domain-labels."
        )
    domains = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
    inputs = [Input(source, domains[label], source in held_out) for source, label in labels.items()]
    return sorted(inputs, key=lambda entry: not entry.held_out), list(domains)


def _held_out(
    args: argparse.Namespace, sources: list[Source]
) -> tuple[set[Source], list[list[Source]]]:
    """Sources that are wholly test, and those among them that are not inputs, per argument."""
    by_path = {source.path.resolve(): source for source in sources if not source.is_stdin}
    held_out: set[Source] = set()
    extra_groups = []
    for pattern in args.test_files or []:
        named = [s for s in sources if pattern in (s.path.name, str(s.path))]  # data[1].txt, say
        matches = [
            source
            for source in named or sources
            if not Path(pattern).is_file()  # else that very file, and none of its name elsewhere
            and (
                source in named
                or fnmatch.fnmatchcase(source.path.name, pattern)
                or fnmatch.fnmatchcase(str(source.path), pattern)
            )
        ]
        extra = []
        if not matches or Path(pattern).exists():
            for source in find_sources([pattern], args.format)[0]:
                known = by_path.get(source.path.resolve())
                matches.append(known or source)
                if known is None and source not in held_out:
                    extra.append(source)
        held_out.update(matches)
        extra_groups.append(extra)
    return held_out, extra_groups


def _labels(
    given: list[str] | None, groups: list[list[Source]], extra_groups: list[list[Source]]
) -> dict[Source, str]:
    """Domain of each source: one label per argument or per file; else the file's stem."""
    sources = [source for group in groups for source in group]
    extras = [source for group in extra_groups for source in group]
    labels = {source: source.label for source in sources + extras}
    if not given:
        return labels
    if "" in given:
        raise UserError("--domain-labels names a domain ''; a name is needed.")
    if len(given) == len(groups) + len(extra_groups) and extras:
        groups = groups + extra_groups
    if len(given) == len(groups):
        labels.update(
            (source, label) for group, label in zip(groups, given, strict=True) for source in group
        )
    elif len(given) == len(sources):
        labels.update(zip(sources, given, strict=True))
    else:
        raise UserError(
            f"--domain-labels names {len(given)} ({', '.join(given[:5])}); give one for each of "
            f"the {len(groups)} --input-files arguments or for each of their {len(sources)} files."
        )
    if len(set(given)) == 1:  # a corpus of one domain: files held out beside it are of it too
        labels.update((source, given[0]) for source in extras)
    return labels


def describe_inputs(inputs: list[Input], domains: list[str]) -> list[dict[str, Any]]:
    """What the report says of the inputs, in reading order."""
    return [
        {
            "file": str(entry.source),
            "bytes": entry.source.size,
            "domain": domains[entry.domain],
            "held_out": entry.held_out,
        }
        for entry in inputs
    ]
