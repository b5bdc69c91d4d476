"""Sampling: the model's own probabilities, only from the text so far, and clear refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dataset.common import UserError
from pretrain import train
from scripts import generate
from utils import checkpoint
from utils.backend.cpu import CPUBackend
from utils.config import compose_config, load_config

OPTIONS = """arch=athena_trm_tiny arch.hidden_size=32 arch.halt_max_steps=4
    arch.loss.loss_type=stablemax_cross_entropy device_type=cpu lr=1e-3 global_batch_size=8
    grad_accum_steps=2 max_steps=3 eval_max_batches=1"""


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, text_corpus) -> Path:
    """A run folder of a few real training steps; stablemax, identifiers by domain."""
    folder = tmp_path_factory.mktemp("run")
    folders = [f"data_paths=[{text_corpus}]", f"checkpoint_path={folder}"]
    config = load_config(compose_config([*OPTIONS.split(), *folders]))
    assert train(CPUBackend(), config) == 0
    return folder


@pytest.fixture(scope="module")
def trained(trained_run) -> generate.Trained:
    return generate.load_trained(trained_run)


def altered(run: Path, target: Path, **changes) -> Path:
    """A copy of a run's checkpoint with changes to its config; `arch` is merged."""
    shutil.copytree(checkpoint.checkpoints_of(run)[-1], target)
    config = yaml.safe_load((target / "config.yaml").read_text())
    changes["arch"] = config["arch"] | changes.get("arch", {})
    config |= changes
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    (target / checkpoint.MANIFEST).unlink()
    files = [path for path in target.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(target)): checkpoint.sha256(path) for path in files}
    (target / checkpoint.MANIFEST).write_text(json.dumps(digests))
    return target


def fails(capsys, *arguments: str) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        generate.main(arguments)
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in message
    return message


# --- the distribution --------------------------------------------------------------------------


def test_probabilities_are_those_of_the_loss(trained):
    """Softmax of a stablemax model's logits would sample from another model."""
    tokens = [40, 41, 42, 43]
    batch = {
        "inputs": torch.tensor([tokens], dtype=torch.int32),
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32),
    }
    with torch.no_grad():
        carry = trained.head.model.initial_carry(batch)
        for _ in range(trained.head.model.config.max_eval_steps):
            carry, outputs = trained.head.model(carry, batch)
        x = outputs["logits"][0, -1].double()
        s = torch.where(x >= 0, x + 1, 1 / (1 - x))
        found = torch.softmax(generate.next_logits(trained.head, tokens), 0).double()
    assert torch.allclose(found, s / s.sum(), atol=1e-6)
    assert not torch.allclose(found, torch.softmax(x, 0), atol=1e-6)


def test_short_text_is_read_as_in_a_full_row(trained):
    """Fewer tokens than a training row must not change what comes next."""
    row = torch.randint(2, trained.metadata.vocab_size, (trained.metadata.seq_len,)).tolist()
    head = trained.head
    with torch.no_grad():
        batch = {
            "inputs": torch.tensor([row], dtype=torch.int32),
            "puzzle_identifiers": torch.zeros(1, dtype=torch.int32),
        }
        carry = head.model.initial_carry(batch)
        for _ in range(head.model.config.max_eval_steps):
            carry, outputs = head.model(carry, batch)
        whole = head.loss.softmax_logits(outputs["logits"][0])
        for length in (1, 5, len(row)):
            short = generate.next_logits(head, row[:length])
            assert torch.allclose(short, whole[length - 1], atol=1e-4)


def test_window_slides(trained):
    text = torch.randint(2, trained.metadata.vocab_size, (3 * trained.metadata.seq_len,)).tolist()
    with torch.no_grad():
        longer = generate.next_logits(trained.head, text)
        window = generate.next_logits(trained.head, text[-trained.metadata.seq_len :])
    assert torch.equal(longer, window)


def test_steps_decide_the_depth(trained_run, trained):
    deeper = generate.load_trained(trained_run, steps=7)
    assert trained.head.model.config.max_eval_steps == 4
    assert deeper.head.model.config.max_eval_steps == 7  # more than were trained
    with torch.no_grad():
        few = generate.next_logits(generate.load_trained(trained_run, steps=1).head, [40, 41])
        many = generate.next_logits(deeper.head, [40, 41])
    assert not torch.equal(few, many)


def test_averaged_and_raw_weights_differ(trained_run, trained):
    raw = generate.load_trained(trained_run, "raw")
    name = "inner.lm_head.weight"
    assert not torch.equal(raw.head.model.state_dict()[name], trained.head.model.state_dict()[name])


# --- drawing -----------------------------------------------------------------------------------


def test_forbidden_ids_are_never_drawn():
    logits, generator = torch.tensor([9.0, 0.0, 9.0, 0.1]), torch.Generator().manual_seed(0)
    for how in (dict(temperature=0), dict(temperature=2.0), dict(top_k=2)):
        drawn = {generate.draw(logits, generator, never=[0, 2], **how) for _ in range(50)}
        assert drawn <= {1, 3}


def test_padding_and_ids_without_a_token_are_forbidden(trained):
    assert trained.metadata.pad_id in generate.unwritable(trained)


def test_frequencies_follow_temperature_and_top_k():
    logits, generator = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.Generator().manual_seed(0)
    drawn = [generate.draw(logits, generator, temperature=0.5, top_k=2) for _ in range(2000)]
    expected = torch.softmax(torch.tensor([2.0, 3.0]) / 0.5, 0)[1].item()
    assert set(drawn) == {2, 3}
    assert abs(drawn.count(3) / len(drawn) - expected) < 0.03


def test_eos_ends_the_text_and_is_not_part_of_it():
    def logits_after(tokens):
        logits = torch.full((6,), -50.0)
        logits[tokens[-1] + 1] = 50.0  # counts up
        return logits

    found = list(generate.sample(logits_after, [1], max_new_tokens=50, eos_id=4))
    assert found == [2, 3]
    found = list(generate.sample(logits_after, [1], max_new_tokens=2, eos_id=5))
    assert found == [2, 3]


# --- the command -------------------------------------------------------------------------------


def test_same_seed_same_text(trained_run, capsys):
    arguments = [f"checkpoint={trained_run}", "prompt=ab: [cd] {", "max_new_tokens=12"]
    texts = []
    for seed in (1, 1, 2):
        generate.main([*arguments, f"seed={seed}", "identifier=poems", "device_type=cpu"])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("ab: [cd] {")  # as given, though YAML would read it otherwise
    assert texts[0] == texts[1] != texts[2]


def test_mistakes_are_named_together(capsys):
    message = fails(capsys, "promt=x", "checkpoint=here", "temperature=hot", "steps=0")
    assert "did you mean 'prompt'" in message
    assert "temperature" in message and "steps" in message


def test_help_lists_every_key(capsys):
    generate.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {key}" in text for key in generate.Options.model_fields)


def test_refusals(trained_run, tmp_path, capsys):
    here = f"checkpoint={trained_run}"
    assert "prompt is empty" in fails(
        capsys, here, "prompt=", "device_type=cpu", "identifier=poems"
    )
    assert "did you mean 'poems'" in fails(capsys, here, "prompt=a", "identifier=poem")
    assert "not a folder" in fails(capsys, f"checkpoint={tmp_path / 'none'}", "prompt=a")
    assert "not a checkpoint" in fails(capsys, f"checkpoint={tmp_path}", "prompt=a")
    above = fails(capsys, f"checkpoint={Path(trained_run).parent}", "prompt=a")
    assert "runs below it" in above and str(trained_run) in above


def test_a_model_that_sees_the_future_is_refused(trained_run, tmp_path):
    folder = altered(trained_run, tmp_path / "both_ways", arch={"causal": False})
    with pytest.raises(UserError, match="not causal"):
        generate.load_trained(folder)


def test_depth_never_follows_the_rows(trained_run, tmp_path):
    """A budget is computed from a whole row, which does not exist while it is being written."""
    folder = altered(trained_run, tmp_path / "budget", arch={"eval_halting": "act"})
    assert generate.load_trained(folder).head.model.config.eval_halting == "max"


def test_a_run_of_several_ranks_loads_on_one(trained_run, tmp_path):
    """8 rows as 2 ranks x 2 x 2 were right there; on one rank the same keys would clash."""
    folder = altered(trained_run, tmp_path / "ranks", micro_batch_size=2, grad_accum_steps=2)
    generate.load_trained(folder)


def test_a_damaged_checkpoint_is_refused(trained_run, tmp_path, capsys):
    folder = altered(trained_run, tmp_path / "damaged")
    (folder / "dataset.json").write_text(json.dumps({}))
    assert "damaged" in fails(capsys, f"checkpoint={folder}", "prompt=a")
