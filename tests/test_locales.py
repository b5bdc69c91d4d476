"""Locales whose encoding is not UTF-8, as on Windows: files are UTF-8 all the same, and text that
the terminal cannot show ends no command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils.checkpoint.format import checkpoints_of

ROOT = Path(__file__).resolve().parent.parent
WORD = "\u65e5\u672c"  # in EUC-JP, not in ASCII

# ASCII alone, so that every locale reads it alike: train, resume, evaluate, train further, write.
PROGRAM = r"""
import json, sys
from pathlib import Path

root, work, word = sys.argv[1], Path(sys.argv[2]), "\u65e5\u672c"
sys.path.insert(0, root)
import pretrain
from dataset.build_corpus_dataset import main as build_corpus
from dataset.inspect_corpus import main as inspect_corpus
from dataset.train_tokenizer import main as train_tokenizer
from scripts.generate import main as generate
from scripts.report import main as report

try:
    (work / word).mkdir()
    work /= word
    name = f"{word}.jsonl"
except UnicodeEncodeError:  # no file can be called so here
    name = "poems.jsonl"
texts = [f"{word}\u00e9 and {i % 7} {'xyz' * (i % 5)}" for i in range(80)]
lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
(work / name).write_bytes("".join(lines).encode())
(work / "prompts.txt").write_bytes(f"{word}\n\u00e9\n".encode())


def call(command, *arguments):
    sys.argv = ["command", *map(str, arguments)]
    command()


tokenizer, corpus, run = work / "tok.json", work / "corpus", work / "run"
call(train_tokenizer, "--input-files", work / name, "--vocab-size", 300, "--output", tokenizer)
call(build_corpus, "--tokenizer-json", tokenizer, "--input-files", work / name, "--output-dir",
     corpus, "--seq-len", 24, "--train-ratio", 0.8)
names = json.loads((corpus / "identifiers.json").read_bytes())
(corpus / "identifiers.json").write_bytes(
    json.dumps([names[0], word], ensure_ascii=False).encode())
call(inspect_corpus, corpus)
own = [f"data_paths=['{corpus}']", f"run_name='{word}'", "device_type=cpu"]
model = '''arch=athena_trm_tiny arch.hidden_size=32 arch.halt_max_steps=2 arch.force_min_steps=1
    arch.post_refinement_steps=0 arch.puzzle_emb_ndim=32 global_batch_size=8 lr=1e-3
    lr_warmup_steps=0 epochs=20 eval_max_batches=1'''.split()
call(pretrain.main, *model, *own, f"checkpoint_path='{run}'", "max_steps=2")
call(pretrain.main, *model, *own, f"checkpoint_path='{run}'", "max_steps=3",
     "resume_allow=[max_steps]")
call(pretrain.main, f"load_checkpoint='{run}'", f"run_name='{word}2'", "eval_only=true",
     f"checkpoint_path='{work / 'evaluation'}'", "device_type=cpu")
call(pretrain.main, *model, *own, f"load_checkpoint='{run}'", "max_steps=1",
     f"checkpoint_path='{work / 'further'}'")
call(report, run)
call(generate, f"checkpoint={run}", f"prompt={word}", "max_new_tokens=4", "device_type=cpu")
print("WRITTEN", flush=True)
call(generate, f"checkpoint={run}", f"prompts_file={work / 'prompts.txt'}", "max_new_tokens=4",
     "device_type=cpu", f"identifier={word}")
"""


@pytest.fixture(params=["EUC-JP", "ASCII"])
def locale(request, tmp_path) -> dict[str, str]:
    """The environment of a locale with this encoding, in which Python does not prefer UTF-8."""
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment = os.environ | plain
    for name in ("PYTHONIOENCODING", "LANG", "LC_CTYPE"):
        environment.pop(name, None)
    if request.param == "ASCII":
        return environment | {"LC_ALL": "C"}
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    made = tmp_path / f"ja_JP.{request.param}"
    done = subprocess.run(
        ["localedef", "-i", "ja_JP", "-f", request.param, str(made)], capture_output=True
    )
    if not made.is_dir():
        pytest.skip(f"no such locale: {done.stderr[-200:]!r}")
    return environment | {"LOCPATH": str(tmp_path), "LC_ALL": made.name}


@pytest.mark.slow
def test_a_whole_run_where_text_is_not_utf_8(locale, tmp_path):
    program, work = tmp_path / "program.py", tmp_path / "work"
    program.write_text(PROGRAM, "ascii")
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(program), str(ROOT), str(work)],
        cwd=tmp_path, env=locale, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:].decode("utf-8", "replace") + done.stderr[
        -3000:
    ].decode("utf-8", "replace")
    assert b"Traceback" not in done.stderr
    # the names of files are in the locale's own encoding
    encoding = "ascii" if locale["LC_ALL"] == "C" else "euc_jp"
    folder = (
        work
        if encoding == "ascii"
        else Path(os.fsdecode(os.fsencode(work) + b"/" + WORD.encode(encoding)))
    )
    run = folder / "run"
    assert [path.name for path in checkpoints_of(run)] == ["step_2", "step_3"]
    known = json.loads((run / "step_3" / "identifiers.json").read_bytes())
    assert known[1:] == [WORD]
    assert WORD in (folder / "corpus" / "train" / "all" / "dataset.json").read_text("utf-8") or (
        encoding == "ascii"
    )
    assert (folder / "evaluation" / "metrics.jsonl").is_file() and checkpoints_of(
        folder / "further"
    )
    lines = done.stdout.partition(b"WRITTEN\n")[2].decode("utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [WORD, "\u00e9"]


@pytest.mark.slow
def test_an_argument_that_the_locale_cannot_read(tmp_path):
    """No traceback of UTF-8 that fails somewhere deep, but the way out."""
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    for command in ("scripts/report.py", "pretrain.py"):
        done = subprocess.run(
            [sys.executable, str(ROOT / command), f"run_name={WORD}".encode()],
            cwd=tmp_path, env=environment, capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.startswith(b"error: "), done.stderr
        assert b"ascii" in done.stderr and b"PYTHONUTF8=1" in done.stderr
        assert done.stderr.count(b"\n") == 1
