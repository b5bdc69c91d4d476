"""Open several corpora read-only as one, with shared names and global numbering.

Handles the joining, so that the stream only sees row and group numbers. A corpus may contain
several sets (TRM); each set of each corpus is one `CorpusPart`, and the parts are concatenated.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.common import (
    BLANK_IDENTIFIER,
    IGNORE_LABEL_ID,
    DatasetMetadata,
    find_split,
    load_metadata,
    verify_arrays,
)
from utils.core.errors import UserError
from utils.core.functions import suggest
from utils.corpus.domain_index import DomainIndex
from utils.corpus.part import LARGE_CORPUS, CorpusPart
from utils.corpus.row_file import REBUILD, ArrayFolder

NO_DOMAIN = "<none>"
"""Domain of a corpus without domains, if it is joined with corpora that have domains."""


class Corpora:
    """One split of several corpora, opened read-only as one.

    Sequence length, vocabulary size, padding and eos must agree. Identifiers and domains are
    matched by name and numbered in order of first appearance; the blank identifier is 0.

    Args:
        data_paths: corpus directories, in Athena's layouts (npy, stream) or in TRM's.
        split: "train" or "test". A train split without rows is an error.
        verify: whether to verify checksums; None: only for corpora of at most 2 GiB.
        like: corpora whose numbering of identifiers and domains is reused. A test split from other
            directories must be opened like the training split, or its rows would get the wrong
            embeddings. Identifiers unknown there become blank.
    """

    def __init__(
        self,
        data_paths: Sequence[str],
        split: str = "train",
        *,
        verify: bool | None = None,
        like: "Corpora | None" = None,
    ):
        if not data_paths:
            raise UserError("data_paths is empty; pass at least one corpus directory.")
        self.data_paths: list[str]
        self.metadata: DatasetMetadata
        roots = [_check_folder(path) for path in data_paths]
        folders = [find_split(root, split) for root in roots]
        metadata = [load_metadata(folder) for folder in folders]
        _check_agreement(folders, metadata)
        if like is not None:
            _check_agreement([Path(like.data_paths[0]), folders[0]], [like.metadata, metadata[0]])
        self.data_paths = [str(root) for root in roots]
        self.identifiers, identifier_maps = _join_identifiers(roots, metadata, like)
        self.domains, domain_maps = _join_domains(metadata, like)
        self._parts: list[CorpusPart] = []
        self.num_rows = self.num_groups = 0
        opened = zip(folders, metadata, identifier_maps, domain_maps, strict=True)
        for folder, meta, identifier_map, domain_map in opened:
            groups_before, size = self.num_groups, 0
            for name in meta.sets:
                files = ArrayFolder(folder, name, random_access=split == "train")
                firsts = (self.num_rows, self.num_groups)
                part = CorpusPart(files, meta, identifier_map, domain_map, *firsts)
                self._parts.append(part)
                self.num_rows += part.num_rows
                self.num_groups += part.num_groups
                size += part.nbytes
            found = self.num_groups - groups_before
            if found != meta.total_groups:
                raise UserError(
                    f"{folder} has {found} groups, but its dataset.json says "
                    f"{meta.total_groups}: the files do not match; {REBUILD}."
                )
            if verify or (verify is None and size <= LARGE_CORPUS):
                verify_arrays(folder, meta)
        self._row_ends = np.cumsum([part.num_rows for part in self._parts])
        self._group_ends = np.cumsum([part.num_groups for part in self._parts])
        if split == "train" and (self.num_rows == 0 or self.num_groups == 0):
            raise UserError(
                f"{', '.join(self.data_paths)}: the train split has no rows; "
                "build it with more text or a higher train ratio, or use it as data_paths_test."
            )
        self.metadata = _join_metadata(metadata, self.identifiers, self.domains)
        self.has_targets = any(part.has_targets for part in self._parts)
        self.has_scored_bytes = any(part.has_scored_bytes for part in self._parts)
        self.max_target = max((part.max_target for part in self._parts), default=0)
        self.one_row_a_group = all(part.one_row_a_group for part in self._parts)
        """Whether every group is a single row with the same number."""
        widths = {p.reasoning_width for p in self._parts if p.reasoning_width is not None}
        if len(widths) > 1:
            raise UserError(
                f"the corpora have reasoning_labels.npy of different widths: {sorted(widths)}."
            )
        self.reasoning_width = max(widths, default=0)
        digest = hashlib.sha256(json.dumps([self.identifiers, self.domains]).encode())
        for part in self._parts:
            part.update_fingerprint(digest)
        self.fingerprint = digest.hexdigest()

    def _group_by_part(
        self, indices: np.ndarray, ends: np.ndarray
    ) -> Iterator[tuple[CorpusPart, np.ndarray | slice]]:
        """Yield each part that contains some of `indices`, and their positions in `indices`."""
        if len(self._parts) == 1:
            yield self._parts[0], slice(None)
            return
        owner = np.searchsorted(ends, indices, side="right")
        for number in np.unique(owner):
            yield self._parts[number], np.flatnonzero(owner == number)

    def rows(self, indices: np.ndarray, tokens: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return rows by global number.

        Args:
            tokens: optional buffer for inputs and labels, (2, n, S) int32.

        Returns:
            `inputs` and `labels` (n, S), `puzzle_identifiers`, `iteration_targets` (0: none) and
            `domain_ids` (n,), all int32; `reasoning_labels` (n, R) if any corpus has them;
            `scored_bytes` (n,) int64 if any corpus has them, with -1 for rows of others. Ignored
            labels are IGNORE_LABEL_ID; identifiers and domains are the joined ones.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if tokens is None:
            tokens = np.empty((2, indices.size, self.metadata.seq_len), np.int32)
        if len(self._parts) == 1:
            return self._read_part(self._parts[0], indices, tokens)
        out = self._read_part(self._parts[0], indices[:0], tokens[:, :0])
        out = {name: np.empty((indices.size, *v.shape[1:]), v.dtype) for name, v in out.items()}
        out |= {"inputs": tokens[0], "labels": tokens[1]}
        for part, where in self._group_by_part(indices, self._row_ends):
            local = indices[where] - part.first_row
            own = np.empty((2, local.size, self.metadata.seq_len), np.int32)
            for name, values in self._read_part(part, local, own).items():
                out[name][where] = values
        return out

    def _read_part(
        self, part: CorpusPart, rows: np.ndarray, tokens: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the result of `rows` for local row numbers of one part."""
        out = part.read(rows, *tokens)
        if self.reasoning_width and "reasoning_labels" not in out:
            shape = (rows.size, self.reasoning_width)
            out["reasoning_labels"] = np.full(shape, IGNORE_LABEL_ID, np.int32)
        if self.has_scored_bytes and "scored_bytes" not in out:
            out["scored_bytes"] = np.full(rows.size, -1, np.int64)
        return out

    def highest_reasoning_label(self) -> int:
        """Return the largest id in reasoning_labels.npy, reading all of it; -1 without any."""
        return max((part.highest_reasoning_label() for part in self._parts), default=-1)

    def recorded_weights(self) -> dict[str, float] | None:
        """Return the domain_weights that a single corpus was built with; None without any.

        Domains without a weight get 1, domains without rows 0. Joined corpora have none.
        """
        recorded = self.metadata.domain_weights
        if not recorded:
            if any(part.metadata.domain_weights for part in self._parts):
                warnings.warn(
                    "the corpora are mixed in proportion to their size, ignoring the weights "
                    "recorded at build time; set domain_weights to change this",
                    stacklevel=2,
                )
            return None
        sizes = self.domain_index.sizes.tolist()
        return {
            name: recorded.get(name, 1.0) if size else 0.0
            for name, size in zip(self.domains, sizes, strict=True)
        }

    def puzzles(self, groups: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row and the number of rows of one puzzle of each group.

        Args: groups (n,) int64; choice (n,) uint64, taken modulo the group's size.
        """
        start, size = np.empty(groups.size, np.int64), np.empty(groups.size, np.int64)
        for part, where in self._group_by_part(groups, self._group_ends):
            local = groups[where] - part.first_group
            first, size[where] = part.puzzles(local, choice[where])
            start[where] = first + part.first_row
        return start, size

    @property
    def relabels(self) -> bool:
        """Whether the ids of any rows may be permuted."""
        return any(part.metadata.relabel_ids for part in self._parts)

    def relabel_ranges(self, indices: np.ndarray) -> np.ndarray:
        """Return the half-open range of ids to permute in each row, (n, 2); (0, 0) for none."""
        ranges = np.zeros((indices.size, 2), np.int64)
        for part, where in self._group_by_part(indices, self._row_ends):
            ranges[where] = part.metadata.relabel_ids or (0, 0)
        return ranges

    def group_domains(self, groups: np.ndarray) -> np.ndarray:
        """Return the domain of the first row of each group (n,), (n,) int32."""
        domains = np.empty(groups.size, np.int32)
        for part, where in self._group_by_part(groups, self._group_ends):
            domains[where] = part.group_domains(groups[where] - part.first_group)
        return domains

    @cached_property
    def domain_index(self) -> DomainIndex:
        """Index of the groups of each domain."""
        return DomainIndex(self.group_domains, self.num_groups, max(1, len(self.domains)))

    def set_rows(self) -> dict[str, list[range]]:
        """Return the global rows of each set: one range per corpus that has the set."""
        ranges: dict[str, list[range]] = {}
        for part in self._parts:
            rows = range(part.first_row, part.first_row + part.num_rows)
            ranges.setdefault(part.set_name, []).append(rows)
        return ranges


def _check_folder(path: str | Path) -> Path:
    root = Path(path)
    if root.is_dir():
        return root
    if root.exists():
        raise UserError(
            f"data path {root} exists but must be a directory; pass a corpus written by a builder."
        )
    parent = root.parent
    if not parent.is_dir():
        raise UserError(f"data path {root} does not exist, nor does its parent directory.")
    corpora = [entry.name for entry in parent.iterdir() if (entry / "train").is_dir()]
    advice = suggest(root.name, corpora) if corpora else f"{parent} contains no corpus."
    raise UserError(f"data path {root} does not exist; {advice}")


def _check_agreement(folders: Sequence[Path], metadata: Sequence[DatasetMetadata]) -> None:
    for name in ("seq_len", "vocab_size", "pad_id", "eos_id"):
        for folder, other in zip(folders[1:], metadata[1:], strict=True):
            mine, theirs = getattr(metadata[0], name), getattr(other, name)
            if mine != theirs:
                raise UserError(
                    f"{name} is {mine} in {folders[0]} but {theirs} in {folder}; joined corpora "
                    "must be built with the same tokenizer and --seq-len."
                )


def _join_identifiers(
    roots: Sequence[Path], metadata: Sequence[DatasetMetadata], like: Corpora | None
) -> tuple[list[str], list[np.ndarray]]:
    """Return the joined names and, per corpus, the map from its identifiers to joined ones."""
    names = list(like.identifiers) if like else [BLANK_IDENTIFIER]
    number = {name: index for index, name in enumerate(names)}
    maps, unknown = [], 0
    for root, meta in zip(roots, metadata, strict=True):
        own = _load_identifier_names(root, meta, alone=len(roots) == 1)
        lookup = np.zeros(max(1, len(own)), np.int32)
        for index, name in enumerate(own):
            if index == meta.blank_identifier_id:
                continue
            if name not in number and like is None:
                number[name] = len(names)
                names.append(name)
            unknown += name not in number
            lookup[index] = number.get(name, 0)
        maps.append(lookup)
    if unknown:
        warnings.warn(
            f"{unknown} identifiers were never trained; their rows use the blank identifier.",
            stacklevel=3,
        )
    return names, maps


def _load_identifier_names(root: Path, metadata: DatasetMetadata, alone: bool) -> list[str]:
    path, count = root / "identifiers.json", metadata.num_puzzle_identifiers
    if not path.is_file():
        if count <= 1:
            return [BLANK_IDENTIFIER]
        if alone:  # nothing to match; the directory name distinguishes them from other corpora's
            return [f"{root.name}#{index}" for index in range(count)]
        raise UserError(
            f"{path} is missing, but joined corpora match identifiers by name; {REBUILD}."
        )
    try:
        names = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {REBUILD}.") from error
    if not isinstance(names, list) or len(names) < count:
        found = len(names) if isinstance(names, list) else type(names).__name__
        raise UserError(f"{path} must list {count} names, but has {found}; {REBUILD}.")
    return [str(name) for name in names[:count]]


def _join_domains(
    metadata: Sequence[DatasetMetadata], like: Corpora | None
) -> tuple[list[str], list[np.ndarray]]:
    names = list(like.domains) if like else []
    named = bool(names) or any(meta.domains for meta in metadata)
    maps = []
    for meta in metadata:
        own = meta.domains or ([NO_DOMAIN] if named else [])
        names += [name for name in dict.fromkeys(own) if name not in names]
        maps.append(np.array([names.index(name) for name in own] or [0], np.int32))
    return names, maps


def _join_metadata(
    metadata: Sequence[DatasetMetadata], identifiers: list[str], domains: list[str]
) -> DatasetMetadata:
    def collect(name: str) -> list:
        return [getattr(meta, name) for meta in metadata]

    def total(name: str) -> int | None:
        return None if None in collect(name) else sum(collect(name))

    lowest = [value for value in collect("min_iterations") if value is not None]
    highest = [value for value in collect("max_iterations") if value is not None]
    total_puzzles = sum(collect("total_puzzles"))
    examples = sum(meta.mean_puzzle_examples * meta.total_puzzles for meta in metadata)
    same_range = len(set(collect("relabel_ids"))) == 1
    update = {
        "blank_identifier_id": 0,
        "num_puzzle_identifiers": len(identifiers),
        "total_groups": sum(collect("total_groups")),
        "total_puzzles": total_puzzles,
        "mean_puzzle_examples": examples / total_puzzles if total_puzzles else 1.0,
        "sets": list(dict.fromkeys(name for sets in collect("sets") for name in sets)),
        "min_iterations": min(lowest, default=None),
        "max_iterations": max(highest, default=None),
        "domains": domains,
        "relabel_ids": metadata[0].relabel_ids if same_range else None,
        "checksums": metadata[0].checksums if len(metadata) == 1 else {},
        "domain_weights": metadata[0].domain_weights if len(metadata) == 1 else {},
        **{name: total(name) for name in ("tokens", "documents", "scored_bytes")},
    }
    return metadata[0].model_copy(update=update)
