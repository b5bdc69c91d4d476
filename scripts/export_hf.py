r"""Export a trained model: for Hugging Face transformers, or for TRM's own code.

    python scripts/export_hf.py checkpoint=checkpoints/athena/quickstart output=exported/plays
    python scripts/export_hf.py checkpoint=checkpoints/athena/sudoku6 output=step_1 format=trm

The folder contains everything that AutoModelForCausalLM, AutoTokenizer and pipeline need with
trust_remote_code=True, so Athena need not be installed to use it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pydantic import Field

from models.build import load_into
from models.export import trm
from models.export.check import NotTried, try_out
from models.export.hugging_face import write_folder
from models.inference.loading import build_model, load_language_model
from models.inference.sampling import PositiveInt
from utils.checkpoint.format import load_weights
from utils.config.key_values import CommandKeys, parse_key_values, run_command
from utils.config.schema import Folders
from utils.core.atomic import write_result
from utils.core.errors import UserError
from utils.core.functions import has_utf8_name
from utils.core.plugins import use_plugins


class Options(CommandKeys):
    """The arguments, each given as key=value."""

    checkpoint: str = Field(description="a checkpoint, or a run's folder (its newest checkpoint)")
    plugins: Folders = Field(
        [], description="directories of the model's own classes, as in training"
    )
    output: Path = Field(description="folder (format=hf) or file (format=trm) to write")
    format: Literal["hf", "trm"] = Field("hf", description="hf: transformers; trm: TRM's code")
    weights: Literal["ema", "raw"] = Field("ema", description="averaged or final weights")
    dtype: Literal["float32", "bfloat16", "float64"] | None = Field(
        None, description="dtype of weights and activations; null: the model's forward_dtype"
    )
    steps: PositiveInt | None = Field(
        None, description="default ACT steps per token; null: as in evaluation"
    )
    post_refinement_steps: int | None = Field(
        None, ge=0, description="passes over z_H after the last step; null: as configured"
    )
    identifier: str | None = Field(
        None, description="default identifier of a text; null: the only one, or the blank one"
    )


def parse(arguments: Sequence[str]) -> Options:
    """Parse key=value arguments. Raises a UserError that lists every mistake."""
    options = parse_key_values(Options, arguments)
    if options.format == "trm":
        for name in ("dtype", "steps", "post_refinement_steps", "identifier"):
            if getattr(options, name) is not None:
                raise UserError(f"{name} cannot be set with format=trm; remove it")
    return options


def export_hf(options: Options) -> None:
    model = load_language_model(
        options.checkpoint,
        options.weights,
        steps=options.steps,
        refinement=options.post_refinement_steps,
        identifier=options.identifier,
        forward_dtype=options.dtype,
        cast=False,
    )
    assert model.checkpoint is not None
    dtype = getattr(torch, options.dtype) if options.dtype else model.config.dtype
    averaged = options.weights == "ema" and "ema.pt" in model.checkpoint
    with write_result(options.output, f"output={options.output}") as part:
        write_folder(model, part, dtype, "averaged" if averaged else "as last trained")
        try:
            off = try_out(model, part)
            found = f"loaded by transformers, its logits differ by at most {off:.1e}"
        except NotTried as reason:
            found = f"note: the folder was not tested: {reason}"
    print(f"wrote {options.output}\n{found}")


def export_trm(options: Options) -> None:
    values, opened = load_weights(options.checkpoint, options.weights)
    if opened is None:
        raise UserError(f"checkpoint={options.checkpoint} is already in TRM's format")
    head, _ = build_model(opened)
    load_into(head.model, values, opened)
    trm.write_file(head.model, options.output)
    print(f"wrote {options.output}; for TRM's pretrain.py: load_checkpoint={options.output} "
          f"{trm.options(head.model.config)}")  # fmt: skip


def run(options: Options) -> None:
    use_plugins(options.plugins)
    if options.output.exists():
        raise UserError(
            f"output={options.output} already exists; choose another path, or remove it first"
        )
    if options.format == "hf" and not has_utf8_name(options.output.absolute()):
        raise UserError(
            f"output={options.output}: safetensors and transformers need paths in UTF-8, but "
            f"this locale uses {sys.getfilesystemencoding()}; use ASCII letters for the folder, "
            "or set LC_ALL=C.UTF-8"
        )
    {"hf": export_hf, "trm": export_trm}[options.format](options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, lambda arguments: run(parse(arguments)), argv)


if __name__ == "__main__":
    main()
