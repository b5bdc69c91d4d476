"""Count exactly solved grids, optionally by a vote over several views of each puzzle."""

import math
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata
from evaluators.interface import Batch, Examiner
from models.inference.language_model import LanguageModel
from utils.config.schema import PositiveInt
from utils.core.errors import UserError


class View:
    """A view of a grid, with permuted cells and renamed ids."""

    def __init__(self, cells: np.ndarray, names: np.ndarray):
        """Store cells (S,), each cell's original position, and names (V,), the new id of each
        id.
        """
        self.cells, self.names = cells, names

    def show(self, rows: np.ndarray) -> np.ndarray:
        """Return grids (N, S) in this view."""
        return self.names[rows[:, self.cells]]

    def undo(self, rows: np.ndarray) -> np.ndarray:
        """Return the original grids (N, S) of grids in this view."""
        return np.argsort(self.names)[rows][:, np.argsort(self.cells)]


class ExactMatchEvaluator(Examiner):
    """Figures over all rows and ranks, below <prefix>/:

    exact_accuracy         share of rows in which every scored cell is right
    cell_accuracy          share of scored cells that are right
    voted/exact_accuracy   the same for the answer that gets most votes of a row's views, as in
                           TRM for ARC; ties are broken by the halting head's confidence
    voted/within_two       share of rows whose right answer has most or second most votes
    voted/agreement        share of views that voted for the winning answer

    Each row is shown in `views` renamings of the ids in the corpus' relabel_ids (a sudoku's
    digits), the first of which changes nothing, and each of these in all transformations of
    `geometry`: flips, or all eight rotations and reflections (dihedral). Choose only
    transformations that keep the puzzle valid: a sudoku with non-square boxes may be flipped, but
    not rotated.
    """

    class Config(BaseModel, extra="forbid"):
        views: PositiveInt = Field(1, description="number of ways to rename the ids in relabel_ids")
        geometry: Literal["none", "flips", "dihedral"] = Field(
            "none", description="transformations of the grid"
        )
        grid: list[PositiveInt] | None = Field(
            None, description="[rows, columns] of the grid; null: square"
        )
        seed: int = Field(0, ge=0, description="seed of the renamings")
        prefix: str = "puzzle"

    required_outputs = frozenset({"preds", "valid", "q_halt_logits"})

    def __init__(self, data_path: str, eval_metadata: DatasetMetadata, **options: Any):
        self.config, self.metadata = self.Config(**options), eval_metadata
        self.prefix = self.config.prefix
        self.views = self._views()
        self.begin_eval()

    def _views(self) -> list[View]:
        config, metadata = self.config, self.metadata
        if config.views > 1 and metadata.relabel_ids is None:
            raise UserError(
                f"views={config.views}, but the corpus lists no ids that may be renamed "
                "(relabel_ids in its dataset.json); omit views, or use geometry"
            )
        rng = np.random.default_rng(config.seed)
        plain = np.arange(metadata.vocab_size)
        renamings = [plain]
        for _ in range(config.views - 1):
            first, end = metadata.relabel_ids or (0, 0)
            names = plain.copy()
            names[first:end] = rng.permutation(plain[first:end])
            renamings.append(names)
        return [View(cells, names) for names in renamings for cells in self._geometry()]

    def _geometry(self) -> list[np.ndarray]:
        """Return a permutation of the cells for each transformation, the identity first."""
        length, config = self.metadata.seq_len, self.config
        if config.geometry == "none":
            return [np.arange(length)]
        side = math.isqrt(length)
        height, width = config.grid if config.grid and len(config.grid) == 2 else (side, side)
        fits = height * width <= length if config.grid else side * side == length
        if not fits or (config.grid is not None and len(config.grid) != 2):
            raise UserError(f"grid={config.grid} does not fit the {length} cells of a row; give "
                            "grid=[rows, columns]")  # fmt: skip
        if config.geometry == "dihedral" and height != width:
            raise UserError(
                f"geometry=dihedral rotates grids, but these have {height} rows, {width} columns; "
                "use geometry=flips"
            )
        cells = np.arange(height * width).reshape(height, width)
        looks = [cells, cells[::-1], cells[:, ::-1], cells[::-1, ::-1]]
        if config.geometry == "dihedral":
            looks += [look.T for look in looks]
        rest = np.arange(height * width, length)
        return [np.concatenate((look.ravel(), rest)) for look in looks]

    def begin_eval(self) -> None:
        super().begin_eval()
        self.rows: list[dict[str, np.ndarray]] = []

    def update_batch(self, batch: Batch, preds: Batch) -> None:
        """Collect rows. batch: inputs and labels (B, S), other arrays (B, ...); preds: preds (B,
        S).
        """
        valid = preds["valid"].cpu().numpy().astype(bool)
        row = {name: value.cpu().numpy()[valid] for name, value in batch.items()}
        row["preds"] = preds["preds"].cpu().numpy()[valid]
        sure = preds.get("q_halt_logits")
        row["sure"] = np.zeros(valid.sum()) if sure is None else sure.float().cpu().numpy()[valid]
        self.rows.append(row)

    def examine(self, model: LanguageModel, group: Any) -> None:
        """Predict every view and take the vote."""
        parts = [row for part in group.gather_objects(self.rows) for row in part]
        if not parts:
            return
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        labels, answers, sure = rows["labels"], [rows.pop("preds")], [rows.pop("sure")]
        for view in self.views[1:]:
            shown = {"inputs": view.show(rows["inputs"]).astype(rows["inputs"].dtype)}
            preds, logits = model.predict(rows | shown)
            answers.append(view.undo(preds))
            sure.append(logits)
        scored = labels != IGNORE_LABEL_ID
        right = (answers[0] == labels) | ~scored
        self.figures = {
            "exact_accuracy": float(right.all(1).mean()),
            "cell_accuracy": float((right & scored).sum() / scored.sum()),
            "examples": len(labels),
        }
        if len(answers) > 1:
            self.figures |= vote(np.stack(answers), np.stack(sure), labels)


def vote(answers: np.ndarray, sure: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the figures of the votes. answers: (views, N, S), sure: (views, N), labels: (N, S)."""
    first, two, agreement = [], [], []
    for row, label in enumerate(labels):
        scored = label != IGNORE_LABEL_ID
        votes: dict[bytes, list[float]] = {}
        for answer, logit in zip(answers[:, row], sure[:, row], strict=True):
            votes.setdefault(answer[scored].astype(np.int64).tobytes(), []).append(logit)
        ranking = sorted(votes, key=lambda grid: (-len(votes[grid]), -float(np.mean(votes[grid]))))
        truth = label[scored].astype(np.int64).tobytes()
        first.append(ranking[0] == truth)
        two.append(truth in ranking[:2])
        agreement.append(len(votes[ranking[0]]) / len(answers))
    return {
        "voted/exact_accuracy": float(np.mean(first)),
        "voted/within_two": float(np.mean(two)),
        "voted/agreement": float(np.mean(agreement)),
    }
