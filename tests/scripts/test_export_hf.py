"""Exported models compute what the checkpoint computes, and need nothing of Athena."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeds import draw_rng
from test_golden import GOLDEN, Golden, assert_matches
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from training_tools import ROOT, altered, metrics_of, sealed

import models
from models.build import load_into
from models.export import trm
from models.export.source import remote_code
from models.inference.language_model import LanguageModel
from models.inference.loading import build_model, load_language_model
from models.layers import at_least_float32
from scripts import export_hf, generate
from utils.checkpoint.format import Checkpoint, load_weights
from utils.core.errors import UserError

S = 24  # the window of text_run
# Of float64, where a text is computed in other shapes: weights at random blow up its rounding, as
# much as they do a change of the embedding's last bit (up to 3e-12 in 40 models).
OTHER_SHAPES = 1e-9
STABLEMAX = {"loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"}}
SOFTMAX = {"loss": {"name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy"}}
GROUPED = {"num_heads": 4, "num_key_value_heads": 2, "post_refinement_steps": 2}
RECURSION = {"hidden_size": 32, "H_cycles": 2, "L_cycles": 3, "L_layers": 1, "halt_max_steps": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "identifiers, stablemax": GROUPED | STABLEMAX | {"puzzle_emb_ndim": 40},
    "tied, softmax": GROUPED
    | SOFTMAX
    | {"tie_embeddings": True, "puzzle_emb_ndim": 0, "norm_type": "pre"},
    "learned positions": GROUPED | STABLEMAX | {"pos_encodings": "learned", "L_layers": 1},
    "one stream": STABLEMAX
    | RECURSION
    | GROUPED
    | {"name": "recursive_reasoning.single_z@SingleZ"},
    "six streams": STABLEMAX
    | RECURSION
    | GROUPED
    | {"name": "recursive_reasoning.hier6@Hier6", "L_cycles": 6, "puzzle_emb_ndim": 0},
    "transformer": STABLEMAX
    | {"name": "recursive_reasoning.transformer@Transformer", "hidden_size": 32, "num_heads": 4}
    | {"puzzle_emb_ndim": 32, "norm_type": "pre"},
}


@pytest.fixture(scope="module", autouse=True)
def no_traces(tmp_path_factory):
    """Nothing is fetched, and copies of remote code go to no cache of the user's."""
    own = {"HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_HUB_OFFLINE": "1"}
    os.environ.update(own)  # read when transformers is imported
    yield
    for name in own:
        del os.environ[name]


def variant_of(run: Path, target: Path, name: str, dtype: str = "float32") -> Path:
    """A checkpoint of another architecture, its weights at random, and other averaged ones."""
    folder = altered(run, target, arch=VARIANTS[name] | {"forward_dtype": dtype})
    rng, states = torch.Generator(), []
    rng.seed()
    for _ in range(2):
        head, _ = build_model(Checkpoint(folder))
        for value in head.state_dict().values():
            noise = torch.randn(value.shape, generator=rng, dtype=value.dtype)
            value.copy_(noise * max(float(value.std()), 0.1))
        states.append(head.state_dict())
    averaged = {name: states[1][name] for name, _ in head.named_parameters()}
    torch.save(states[0], folder / "model.pt")
    torch.save({"updates": 1, "shadow": averaged}, folder / "ema.pt")
    return sealed(folder)


def export(checkpoint: Path, output: Path, *arguments: str) -> Path:
    export_hf.main([f"checkpoint={checkpoint}", f"output={output}", *arguments])
    return output


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.from_numpy(draw_rng().integers(2, 256, (rows, length)))


@torch.no_grad()
def expected(model: LanguageModel, ids: torch.Tensor, identifier: int) -> torch.Tensor:
    """Log-probabilities (B, S, V) by the forward pass of training and evaluation, and by the
    formula of the loss."""
    batch = {"inputs": ids, "puzzle_identifiers": torch.full((len(ids),), identifier)}
    carry = model.model.initial_carry(batch)
    for _ in range(model.steps):
        carry, outputs = model.model(carry, batch)
    x = at_least_float32(outputs["logits"])
    if model.head.config.loss_type.startswith("softmax"):
        return x.log_softmax(-1)
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    return (s / s.sum(-1, keepdim=True)).log()


@torch.no_grad()
@pytest.mark.parametrize("dtype, bar", [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_checkpoint(text_run, tmp_path, variant, dtype, bar):
    checkpoint = variant_of(text_run, tmp_path / "checkpoint", variant, dtype)
    ids = random_ids(2, S)
    for weights in ("ema", "raw") if dtype == "float64" else ("ema",):
        own = load_language_model(checkpoint, weights, cast=False)
        exported = load(export(checkpoint, tmp_path / weights, f"weights={weights}"))
        for identifier, given in ((0, None), (2, "lists"))[: 1 + (own.config.prefix_len > 0)]:
            found = exported(ids, puzzle_identifiers=given).logits
            assert found.dtype == getattr(torch, dtype)
            assert (found.log_softmax(-1) - expected(own, ids, identifier)).abs().max() < bar
    if dtype == "float64":  # in float32 other shapes round otherwise, which deep recursion blows up
        padded, mask = F.pad(ids[:, :-3], (3, 0)), F.pad(torch.ones_like(ids)[:, :-3], (3, 0))
        behind = exported(padded, attention_mask=mask).logits[:, 3:]
        assert (behind - exported(ids).logits[:, :-3]).abs().max() < OTHER_SHAPES


@pytest.fixture(scope="module")
def exported(text_run, tmp_path_factory) -> Path:
    """The folder of an exported model in float64, its identifier `poems` by default. The tokenizer
    would put tokens around a text, which no builder lets it do."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = variant_of(text_run, folder / "checkpoint", "identifiers, stablemax", "float64")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("$A <|eos|>", special_tokens=[("<|eos|>", 1)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    sealed(checkpoint)
    return export(checkpoint, folder / "model", "identifier=poems")


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(exported, side):
    model, lengths = load(exported), (3, S - 1, 11)
    texts = [random_ids(1, n)[0] for n in lengths]
    padded = torch.zeros(len(texts), S - 1, dtype=torch.long)
    mask = torch.zeros_like(padded)
    places = [slice(S - 1 - n, None) if side == "left" else slice(n) for n in lengths]
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        padded[row, place], mask[row, place] = text, 1
    found = model(padded, attention_mask=mask)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        assert (found.logits[row, place] - model(text[None]).logits[0]).abs().max() < OTHER_SHAPES
    labels = torch.where(mask.bool(), padded, -100)
    nats = [model(text[None], labels=text[None]).loss * (len(text) - 1) for text in texts]
    loss = model(padded, attention_mask=mask, labels=labels).loss
    assert loss == pytest.approx(float(sum(nats)) / (sum(lengths) - 3), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("argument", ["past_key_values", "cache"])
@pytest.mark.parametrize("padded", [False, True])
def test_kept_keys_and_values_change_nothing(exported, padded, argument):
    """In pieces of several tokens and of one, behind padding of different lengths."""
    model, ids = load(exported), random_ids(2, S - 4)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    cache, begin = None, 0
    for end in (5, 6, 9, 10, S - 4):
        given = {argument: cache, "attention_mask": mask[:, :end]}
        piece = model(ids[:, begin:end], use_cache=True, **given)
        assert piece.past_key_values.get_seq_length() == end
        real = mask[:, begin:end].bool()
        assert (piece.logits - whole[:, begin:end])[real].abs().max() < OTHER_SHAPES
        cache, begin = piece.past_key_values, end


def test_the_loss_is_the_model_s_own(exported):
    own = load_language_model(exported.parent / "checkpoint", identifier="poems")
    ids = random_ids(1, 17)
    model = load(exported).train()
    loss = model(ids, labels=ids).loss
    score = own.score([(ids[0, :1].tolist(), ids[0, 1:].tolist())])[0]
    assert float(loss.detach()) == pytest.approx(score.nats / 16, rel=1e-6)
    assert float(model(ids, labels=ids, num_items_in_batch=32).loss.detach()) == pytest.approx(
        score.nats / 32, rel=1e-6
    )
    loss.backward()
    assert model.inner.puzzle_emb.used == []  # or it would grow from step to step
    parameters = [p for n, p in model.named_parameters() if ".q_head." not in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_generate_writes_what_generate_py_writes(exported, tmp_path, capsys):
    from transformers import AutoTokenizer

    prompts = ["ab cd", "a", "hg fe dc b"]
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(prompts), "utf-8")
    source = [f"checkpoint={exported.parent / 'checkpoint'}", f"prompts_file={lines}"]
    how = ["identifier=poems", "device_type=cpu", "max_new_tokens=9", "temperature=0"]
    generate.main([*source, *how])
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    model, inputs = load(exported), tokenizer(prompts, return_tensors="pt", padding=True)
    begin = inputs["input_ids"].shape[1]
    for use_cache in (True, False):
        found = model.generate(**inputs, max_new_tokens=9, do_sample=False, use_cache=use_cache)
        written = tokenizer.batch_decode(found[:, begin:], skip_special_tokens=True)
        assert [t.rstrip("\ufffd") for t in written] == [t.rstrip("\ufffd") for t in texts]
    beams = [
        model.generate(**inputs, max_new_tokens=4, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_steps_decide_the_depth(exported, tmp_path):
    checkpoint, ids = exported.parent / "checkpoint", random_ids(1, 9)
    model = load(export(checkpoint, tmp_path / "shallow", "identifier=poems", "steps=2"))
    assert torch.equal(model(ids).logits, load(exported, steps=2)(ids).logits)
    own = load_language_model(checkpoint, identifier="poems", steps=2)
    found = model(ids).logits.log_softmax(-1)
    assert torch.allclose(found, expected(own, ids, own.identifier), atol=1e-12)
    assert not torch.allclose(found, model(ids, steps=3).logits.log_softmax(-1), atol=1e-3)
    # of every token that is generated
    deep = model.generate(ids, steps=3, max_new_tokens=2, return_dict_in_generate=True)
    assert deep.past_key_values.steps == 3


ELSEWHERE = """
import json, sys

folder, prompt, libraries = sys.argv[1:]
sys.path.insert(0, libraries)  # those of the installed transformers, as PYTHONPATH is ignored
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained("again"), tokenizer.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
assert torch.equal(model(ids).logits, again(ids).logits)
write = pipeline("text-generation", model=folder, trust_remote_code=True)
whole = write([prompt, "a"], return_tensors=True, eos_token_id=None)
lengths = [len(text[0]["generated_token_ids"]) for text in whole]
text = write([prompt, "a"], batch_size=2, max_new_tokens=5, do_sample=False)[0][0]["generated_text"]
files = [getattr(module, "__file__", None) for module in sys.modules.values()]
print(json.dumps({"text": text, "lengths": lengths, "files": [f for f in files if f]}))
"""


@pytest.mark.slow
def test_it_works_where_athena_is_not(exported, tmp_path):
    """Another process, another folder, and nothing of this repository is ever imported."""
    (tmp_path / "modules").mkdir()
    folder = tmp_path / "my-model.v1"  # names that are none in Python
    folder.symlink_to(exported)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    spec = importlib.util.find_spec("transformers")
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(folder), "ab cd"]
    done = subprocess.run(
        [*command, str(Path(spec.origin).parents[1])], cwd=tmp_path, encoding="utf-8",
        env=env | {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"].startswith("ab cd") and found["lengths"] == [S, S]
    libraries = Path(torch.__file__).parents[1], Path(spec.origin).parents[1]  # may lie below ROOT
    ours = [Path(f) for f in found["files"] if Path(f).is_relative_to(ROOT)]
    assert [f for f in ours if not any(map(f.is_relative_to, libraries))] == []


def test_texts_become_the_tokens_that_they_are_in_a_corpus(exported):
    from transformers import AutoTokenizer

    own = load_language_model(exported.parent / "checkpoint", identifier="poems")
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    for text in ("ab <|eos|> cd<|pad|>", "  ab\n\n cd ", "naïve → 文"):
        ids = tokenizer(text)["input_ids"]
        assert ids == own.encode(text)
        assert tokenizer.decode(ids) == own.decode(ids)
    assert tokenizer.padding_side == "left"
    assert load(exported).generation_config.suppress_tokens == own.never_written()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.eos_id, own.metadata.pad_id)


@torch.no_grad()
def test_bfloat16_computes_what_the_checkpoint_computes_in_it(text_run, tmp_path, capsys):
    """And is half as large; float32 of the same model is the same up to bfloat16's rounding."""
    from safetensors.torch import load_file

    checkpoint = variant_of(text_run, tmp_path / "checkpoint", "transformer", "bfloat16")
    own, ids = load_language_model(checkpoint), random_ids(2, S)
    small, large = (
        export(checkpoint, tmp_path / "16"),
        export(checkpoint, tmp_path / "32", "dtype=float32"),
    )
    off = re.findall(r"differ by at most (\S+)", capsys.readouterr().out)
    assert len(off) == 2 and max(map(float, off)) <= 1e-5, "each beside the model in its own dtype"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, large)]
    assert sizes[0] < 0.55 * sizes[1]
    averages = torch.load(checkpoint / "ema.pt")["shadow"]
    for name, value in load_file(large / "model.safetensors").items():
        assert name.endswith(".weights") or torch.equal(value, averages[f"model.{name}"])
    model = load(small)
    assert model.dtype == torch.bfloat16
    assert model.inner.rotary_emb.cos_cached.dtype == torch.float32  # positions stay precise
    found = model(ids).logits.log_softmax(-1)
    assert torch.allclose(found, expected(own, ids, 0).float(), atol=1e-5)
    precise = load(large)(ids).logits.log_softmax(-1)
    assert 0 < (found - precise).abs().max() < 0.5
    recast = load(large, dtype=torch.bfloat16)
    assert torch.equal(recast(ids).logits, model(ids).logits)
    assert model.generate(ids[:, :4], max_new_tokens=3).shape == (2, 7)


def test_tied_embeddings_are_stored_once(text_run, tmp_path):
    from safetensors.torch import load_file

    checkpoint = variant_of(text_run, tmp_path / "checkpoint", "tied, softmax")
    tensors = load_file(export(checkpoint, tmp_path / "model") / "model.safetensors")
    assert [t.shape[0] for t in tensors.values()].count(300) == 1


@pytest.mark.slow
def test_the_card_names_every_batch_size(text_corpus, run_training, tmp_path):
    steps = r"\| optimizer steps \| (.*) \|"
    options = ["evaluators=[]", "resume_allow=[global_batch_size,max_steps]"]
    run = run_training(text_corpus, "run", *options, "max_steps=2")
    card = (export(run, tmp_path / "one") / "README.md").read_text("utf-8")
    assert re.search(steps, card)[1] == "2 of 8 rows"
    run_training(text_corpus, "run", *options, "global_batch_size=12", "max_steps=5")
    run_training(text_corpus, "run", *options, "global_batch_size=6", "max_steps=6")
    card = (export(run, tmp_path / "three") / "README.md").read_text("utf-8")
    found = re.findall(r"\d+(?:\.\d+)?", re.search(steps, card)[1])
    assert found == ["6", "5", "10.4", "1", "6"]  # (2 * 8 + 3 * 12) / 5 rows


# --- refusals ----------------------------------------------------------------------------------


def test_what_the_exported_model_cannot_do_it_says(exported):
    from transformers import DynamicCache

    model, ids = load(exported), random_ids(1, S)
    with pytest.raises(ValueError, match="25 tokens, but the model's window is 24"):
        model(random_ids(1, S + 1))
    with pytest.warns(UserWarning, match="ends after 2 new tokens"):
        assert model.generate(ids[:, :22], max_new_tokens=3, eos_token_id=None).shape == (1, 24)
    with pytest.raises(ValueError, match="25 tokens"):
        model.generate(ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="'poem' is unknown; choose one of"):
        model(ids, puzzle_identifiers="poem")
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="one entry per token"):
        model(ids, attention_mask=torch.ones(1, S - 1))
    cache = model(ids[:, :3], use_cache=True, steps=1).past_key_values
    with pytest.raises(ValueError, match="computed with 1"):
        model(ids[:, 3:4], past_key_values=cache)
    with pytest.raises(ValueError, match="cache and past_key_values"):
        model(ids[:, 3:4], steps=1, past_key_values=cache, cache=cache)
    for value in (torch.zeros(1, S), torch.zeros(1), 0, True, ""):
        with pytest.raises(TypeError, match="position_ids"):
            model(ids, position_ids=value)
    model(ids, position_ids=None, output_attentions=False)  # what asks for nothing
    model(ids, cache_position=torch.arange(S))
    with pytest.raises(ValueError, match="cache_position"):
        model(ids, cache_position=torch.arange(1, S + 1))


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        export_hf.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_refusals(text_run, tmp_path, capsys, monkeypatch):
    here, there = f"checkpoint={text_run}", f"output={tmp_path / 'new'}"
    message = fails(capsys, "chekpoint=x", there, "format=onnx")
    assert "did you mean 'checkpoint'" in message and "format" in message
    assert "exists" in fails(capsys, here, f"output={tmp_path}")
    assert "not a folder" in fails(capsys, f"checkpoint={tmp_path / 'none'}", there)
    both_ways = altered(text_run, tmp_path / "both_ways", arch={"causal": False})
    assert "not causal" in fails(capsys, f"checkpoint={both_ways}", there)
    assert "arch.causal=True" in fails(capsys, here, there, "format=trm")
    assert "steps" in fails(capsys, here, there, "format=trm", "steps=3")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "requirements-export.txt" in fails(capsys, here, there)
    assert not (tmp_path / "new").exists()


def test_an_architecture_of_one_s_own_takes_its_source_along(tmp_path, monkeypatch):
    """Unless it needs more than what lies in models/."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    for name, line in (("mine", "from models.common import trunc_normal_init_"),
                       ("greedy", "from utils.training.optimizers import AdamATan2")):  # fmt: skip
        (tmp_path / f"{name}.py").write_text(
            f"def late():\n    {line}\n\nclass Mine: ...\n", "utf-8"
        )
    source = remote_code(importlib.import_module("models.mine").Mine)
    assert "from .mine import Mine as Architecture\n" in source["modeling_athena.py"]
    named = re.findall(r"^from \.(\w+) import", source["modeling_athena.py"], re.M)
    assert {f"{name}.py" for name in named} == source.keys() - {"modeling_athena.py"}
    assert "    from .common import trunc_normal_init_\n" in source["mine.py"]
    with pytest.raises(UserError, match=r"greedy cannot be exported, because of .from utils"):
        remote_code(importlib.import_module("models.greedy").Mine)


# --- TRM ---------------------------------------------------------------------------------------


def trm_file(weights: dict[str, torch.Tensor], file: Path) -> Path:
    """As TRM's own training saves them: those of the compiled loss head."""
    torch.save({f"_orig_mod.model.{name}": value for name, value in weights.items()}, file)
    return file


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_file_of_trm_s_computes_what_trm_computes_and_goes_back(path, tmp_path):
    golden = Golden(path)
    weights = golden.group("init/")
    file = trm_file(weights, tmp_path / "step_0")
    head, batch = golden.model("float64"), golden.group("batch/0/")
    for value in head.state_dict().values():
        value.zero_()
    load_into(head.model, load_weights(file, "ema")[0])
    _, _, _, found, _ = head(["logits", "q_halt_logits"], head.initial_carry(batch), batch)
    for name, ours in found.items():
        assert_matches(ours, golden.get(f"step/0/{name}"), 1e-6, name)

    # what comes back has TRM's names, shapes and dtypes: its initial states are in bfloat16
    head = golden.model("bfloat16")
    load_into(head.model, load_weights(file, "ema")[0])
    trm.write_file(head.model, tmp_path / "back")
    again, before = torch.load(tmp_path / "back"), torch.load(file)
    assert again.keys() == before.keys()
    for name, value in again.items():
        initial = name.endswith(("H_init", "L_init"))
        assert value.dtype == (torch.bfloat16 if initial else torch.float32)
        assert torch.equal(value, before[name].to(value.dtype))


@pytest.mark.slow
def test_a_puzzle_model_goes_to_trm_and_comes_back(puzzle_corpus, run_training, tmp_path):
    options = "arch=trm arch.hidden_size=32 arch.num_heads=2 arch.puzzle_emb_len=2 max_steps=2"
    options += " arch.halt_max_steps=2 arch.loss.loss_type=stablemax_cross_entropy"
    run = run_training(puzzle_corpus, "trained", *options.split())
    file = tmp_path / "trm" / "step_2"
    export_hf.main([f"checkpoint={run}", f"output={file}", "format=trm"])
    losses = [
        metrics_of(run_training(puzzle_corpus, name, *options.split(), "eval_only=true",
                                f"load_checkpoint={path}"), "eval/all/lm_loss")
        for name, path in (("file", file), ("folder", run))
    ]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 1
