"""Plan the inputs of a corpus: their domains, which are held out, and their order."""

import argparse
import fnmatch
from dataclasses import dataclass
from pathlib import Path

from dataset.common import BLANK_IDENTIFIER
from dataset.input.text_sources import Source, find_sources
from utils.core.errors import UserError


@dataclass(frozen=True)
class Input:
    """One source with its domain and split."""

    source: Source
    domain: int
    held_out: bool


def plan_inputs(args: argparse.Namespace) -> tuple[list[Input], list[str]]:
    """Return the inputs in reading order (held-out files first) and the domain names."""
    groups = find_sources(args.input_files, args.format)
    sources = [source for group in groups for source in group]
    held_out, extra_groups = _find_held_out(args, sources)
    labels = _assign_labels(args.domain_labels, groups, extra_groups)
    if BLANK_IDENTIFIER in labels.values():
        raise UserError(
            f"a domain cannot be named {BLANK_IDENTIFIER}, reserved for rows without a domain; "
            "choose another name with --domain-labels."
        )
    domains = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
    inputs = [Input(source, domains[label], source in held_out) for source, label in labels.items()]
    return sorted(inputs, key=lambda entry: not entry.held_out), list(domains)


def _find_held_out(
    args: argparse.Namespace, sources: list[Source]
) -> tuple[set[Source], list[list[Source]]]:
    """Return all held-out sources and, for each argument, the ones that are not inputs."""
    by_path = {source.path.resolve(): source for source in sources if not source.is_stdin}
    held_out: set[Source] = set()
    extra_groups = []
    for pattern in args.test_files or []:
        named = [s for s in sources if pattern in (s.path.name, str(s.path))]  # data[1].txt, say
        matches = [
            source
            for source in named or sources
            if not Path(
                pattern
            ).is_file()  # otherwise exactly that file, not others of the same name
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


def _assign_labels(
    given: list[str] | None, groups: list[list[Source]], extra_groups: list[list[Source]]
) -> dict[Source, str]:
    """Return the domain of each source: the label of its argument or file, or the file's stem."""
    sources = [source for group in groups for source in group]
    extras = [source for group in extra_groups for source in group]
    labels = {source: source.label for source in sources + extras}
    if not given:
        return labels
    if "" in given:
        raise UserError("--domain-labels contains an empty name ''; names must not be empty.")
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
            f"--domain-labels has {len(given)} labels ({', '.join(given[:5])}); pass one per "
            f"--input-files argument ({len(groups)}) or one per file ({len(sources)})."
        )
    if len(set(given)) == 1:  # a corpus of one domain: extra held-out files belong to it too
        labels.update((source, given[0]) for source in extras)
    return labels
