r"""Continue a text with a trained model.

    python scripts/generate.py checkpoint=checkpoints/athena/quickstart prompt="HAMLET." \
        max_new_tokens=200 temperature=0.8 top_k=50

The text goes to standard output, notes to standard error. Every token is computed from the whole
window again, without a cache, and with the same number of ACT steps for all.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from dataset.common import DatasetMetadata, UserError, run_cli
from dataset.tokenization import TextTokenizer
from models.losses import ACTLossHead
from models.train_state import create_model, load_into
from utils.backend import select_backend
from utils.checkpoint import Checkpoint, load_weights
from utils.config import load_config
from utils.config_errors import problems_of, show
from utils.functions import load_class, nearest

PositiveInt = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """The arguments, each given as key=value."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(description="a checkpoint, or the folder of a run: its newest")
    prompt: str = Field(description="the text to continue")
    max_new_tokens: PositiveInt = Field(200, description="tokens at most; eos ends earlier")
    temperature: float = Field(
        0.8, ge=0, allow_inf_nan=False, description="below 1 plainer; 0: the likeliest token"
    )
    top_k: PositiveInt | None = Field(None, description="draw among the likeliest k; null: all")
    seed: int = Field(0, ge=0, description="the same seed gives the same text")
    steps: PositiveInt | None = Field(
        None, description="ACT steps per token; null: as many as in evaluation"
    )
    weights: Literal["ema", "raw"] = Field("ema", description="averaged, or as last trained")
    identifier: str | None = Field(
        None, description="identifier embedding by name; null: the only one, else the blank one"
    )
    device_type: Literal["auto", "cuda", "mps", "cpu"] = Field("auto", description="where to run")


def parse(arguments: Sequence[str]) -> Options:
    """Reads key=value arguments; UserError that lists everything wrong with them.

    The prompt is taken as it is, never as YAML, so that it may hold colons and brackets.
    """
    given: dict[str, str | None] = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign:
            raise UserError(
                f"cannot read '{argument}': arguments are key=value; put quotes around a value "
                "with spaces, and see --help for the keys"
            )
        given[key] = None if value == "null" and key != "prompt" else value
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        everywhere = list(Options.model_fields)
        raise UserError("; ".join(problems_of(error, Options, given, "", everywhere))) from None


def help_text() -> str:
    lines = [__doc__ or "", "keys (key=value), with their defaults:"]
    for name, field in Options.model_fields.items():
        default = "" if field.is_required() else f"={show(field.default)}".replace("'", "")
        lines.append(f"  {name + default:<22}  {field.description}")
    return "\n".join(lines)


class Trained(NamedTuple):
    """A model as a checkpoint left it, in evaluation mode, with what belongs to it."""

    head: ACTLossHead
    metadata: DatasetMetadata
    identifiers: list[str]
    tokenizer: TextTokenizer


def build_model(
    opened: Checkpoint, steps: int | None = None, device: str = "cpu"
) -> tuple[ACTLossHead, DatasetMetadata]:
    """The model that a checkpoint's own config and corpus describe, its weights not yet loaded.

    steps: ACT steps of every evaluation; None: as configured, and the most where the rows decide.
    """
    raw = yaml.safe_load(opened.text("config.yaml"))
    # How the run divided its batch over ranks need not work for the one process here.
    raw |= {"micro_batch_size": "auto", "grad_accum_steps": 1}
    raw["arch"] |= _depth(raw["arch"], steps)
    metadata = DatasetMetadata.model_validate_json(opened.text("dataset.json"))
    loss = raw["arch"]["loss"]
    head = create_model(
        load_config(raw),
        metadata,
        batch_size=1,
        reasoning_ids=int(bool(loss.get("reasoning_loss_weight"))),
        device=device,
    )
    return head, metadata


def _depth(arch: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """Options of the architecture that make every row and token run the same number of steps."""
    fields = load_class(arch["name"]).Config.model_fields  # type: ignore[attr-defined]
    if "eval_halting" not in fields:
        if steps not in (None, 1):
            raise UserError(f"steps={steps}, but {arch['name']} has one step: leave steps out")
        return {}
    if steps is not None:
        return {"eval_halting": "fixed", "eval_steps": steps}
    return {} if arch.get("eval_halting") == "fixed" else {"eval_halting": "max"}


def load_trained(path: str | Path, weights: str = "ema", steps: int | None = None) -> Trained:
    """Opens a checkpoint folder, or the newest of a run folder, and rebuilds its model.

    Raises UserError where there is none, or where its model cannot continue a text.
    """
    if not Path(path).is_dir():
        raise UserError(f"checkpoint={path} is not a folder; name a checkpoint or a run")
    values, opened = load_weights(path, weights)
    assert opened is not None
    head, metadata = build_model(opened, steps)
    model: Any = head.model
    if not model.config.causal:
        raise UserError(
            f"the model of {opened.folder} is not causal: it was trained to see the tokens after "
            "the one it predicts, and cannot continue a text"
        )
    if "tokenizer.json" not in opened:
        raise UserError(f"{opened.folder} has no tokenizer.json: it was not trained on text")
    # a head for z_L, where one was trained, is part of the model: see build_model
    load_into(model, values)
    head.eval()
    file = opened.folder / "tokenizer.json"
    known = Tokenizer.from_file(str(file))
    eos = None if metadata.eos_id is None else known.id_to_token(metadata.eos_id)
    tokenizer = TextTokenizer(file, eos, known.id_to_token(metadata.pad_id))
    return Trained(head, metadata, opened.json("identifiers.json"), tokenizer)


def next_logits(head: ACTLossHead, tokens: Sequence[int], identifier: int = 0) -> Tensor:
    """Logits (V,) of the token after `tokens`, of which the model sees its last window.

    Their softmax is the model's probability, whatever the loss it was trained with.
    """
    assert not head.training
    model: Any = head.model
    device = next(model.parameters()).device
    window = torch.tensor([tokens[-model.config.seq_len :]], dtype=torch.int32, device=device)
    named = torch.tensor([identifier], dtype=torch.int32, device=device)
    batch = {"inputs": window, "puzzle_identifiers": named}
    carry = model.initial_carry(batch)
    for _ in range(getattr(model.config, "max_eval_steps", 1)):
        carry, outputs = model(carry, batch)
    return head.loss.softmax_logits(outputs["logits"][0, -1])


def draw(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    never: Sequence[int] = (),
) -> int:
    """One id from (V,) logits; temperature 0 takes the likeliest, `never` are ids left out."""
    logits = logits.float().cpu()
    logits[list(never)] = -torch.inf
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        best = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(0, best.indices, best.values)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def sample(
    logits_after: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    seed: int = 0,
    **how: Any,
) -> Iterator[int]:
    """New ids one by one until eos, which is not among them; `how` goes to `draw`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        token = draw(logits_after(tokens), generator, **how)
        if token == eos_id:
            return
        tokens.append(token)
        yield token


def unwritable(trained: Trained) -> list[int]:
    """Ids that no text holds: padding, and numbers to which the tokenizer gives no token."""
    tokenizer = trained.tokenizer.tokenizer
    empty = [i for i in range(trained.metadata.vocab_size) if tokenizer.id_to_token(i) is None]
    return [trained.metadata.pad_id, *empty]


def identifier_index(trained: Trained, name: str | None) -> int:
    """Row of the identifier embedding that `name` asks for."""
    names, blank = trained.identifiers, trained.metadata.blank_identifier_id
    model: Any = trained.head.model
    if model.config.puzzle_emb_ndim == 0:
        if name is not None:
            raise UserError(f"identifier={name}, but this model has no identifier embedding")
        return blank
    others = [other for i, other in enumerate(names) if i != blank]
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if others[5:] else "")
    if name is None:
        if len(others) == 1:
            return names.index(others[0])
        if others:
            note(f"no identifier is given, so the blank one is used; there are {shown}")
        return blank
    if name not in names:
        near = nearest(name, names)
        advice = f"did you mean '{near}'?" if near else f"there are {shown or 'none'}"
        raise UserError(f"identifier={name} is unknown to this model: {advice}")
    return names.index(name)


def note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)


def run(options: Options) -> None:
    """Loads, continues the prompt and prints the whole text."""
    backend, _ = select_backend(options.device_type)
    trained = load_trained(options.checkpoint, options.weights, options.steps)
    identifier = identifier_index(trained, options.identifier)
    prompt = trained.tokenizer.encode([options.prompt])[0].tolist()
    if not prompt:
        raise UserError("prompt is empty; give the words with which the text begins")
    head, window = trained.head.to(backend.device), trained.metadata.seq_len
    if len(prompt) > window:
        note(f"the prompt has {len(prompt)} tokens, of which the model sees the last {window}")
    config: Any = head.model.config
    refinement = getattr(config, "post_refinement_steps", 0)
    if refinement and not config.post_refinement_train:
        note(f"the text is shaped by refinement passes that were never trained ({refinement} after "
             "the last step, as in evaluation; arch.post_refinement_train=false)")  # fmt: skip
    new = sample(
        lambda tokens: next_logits(head, tokens, identifier),
        prompt,
        max_new_tokens=options.max_new_tokens,
        eos_id=trained.metadata.eos_id,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        never=unwritable(trained),
    )
    shown = tqdm(new, total=options.max_new_tokens, unit="token", leave=False, disable=None)
    tokens = [*prompt, *shown]
    print(trained.tokenizer.tokenizer.decode(tokens))
    if len(tokens) < len(prompt) + options.max_new_tokens:
        note("the model ended the text here")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return
    run_cli(lambda: run(parse(arguments)))


if __name__ == "__main__":
    main()
