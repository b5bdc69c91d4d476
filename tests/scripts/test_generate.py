"""The command: texts as they come, many from a file, and clear refusals."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_tools import ROOT, altered

from scripts import generate

CPU = ("identifier=poems", "device_type=cpu", "max_new_tokens=12")


def fails(capsys, *arguments: str) -> str:
    """The one line with which a command ends, after notes."""
    with pytest.raises(SystemExit) as end:
        generate.main(arguments)
    *notes, message = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and all(line.startswith("note: ") for line in notes)
    return message


def test_same_seed_same_text_with_and_without_a_cache(text_run, capsys):
    arguments = [f"checkpoint={text_run}", "prompt=ab: [cd] {", *CPU]
    texts = []
    for more in ("seed=1", "seed=1", "seed=2"):
        generate.main([*arguments, more, "cache=false" if texts else "cache=true"])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("ab: [cd] {")  # as given, though YAML would read it otherwise
    assert texts[0] == texts[1] != texts[2]


def test_the_memory_of_the_cache_is_stated_and_refused(text_run, capsys, monkeypatch):
    arguments = [f"checkpoint={text_run}", "prompt=ab", *CPU]
    generate.main(arguments)
    # 4 ACT steps x 2 x (2 + 1) x 2 passes and 2 of refinement, 1 head of 16, 25 positions, float32
    size = (4 * 2 * 3 * 2 + 2) * 2 * 16 * 25 * 4
    assert f"take {size / 1e6:.1f} MB" in capsys.readouterr().err
    monkeypatch.setattr("utils.backend.cpu.CPUBackend.available_memory", lambda _: size - 1)
    assert "cache=false" in fails(capsys, *arguments)
    generate.main([*arguments, "cache_cycles=1"])


def test_prompts_of_a_file_are_continued_in_order(text_run, tmp_path, capsys):
    prompts = ["ab cd ef", "gh", "a b c d e f g h", "ba", "cd: 'x' \\n"]
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(prompts) + "\n\n", "utf-8")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), "utf-8")
    found = []
    for path, rows in ((lines, 2), (objects, 3)):
        generate.main(
            [f"checkpoint={text_run}", f"prompts_file={path}", f"batch_size={rows}", *CPU]
        )
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [line["prompt"] for line in found[0]] == prompts
    assert found[0] == found[1]  # whatever was computed together


def test_only_line_feeds_end_a_line_and_byte_order_marks_are_dropped(text_run, tmp_path, capsys):
    prompts = ["line one\u2028line two", "a\u2029b\x85c", "d\x0ce\x1cf", "g\rh"]
    records = [json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts]
    for name, written in (("a.txt", prompts), ("a.jsonl", records), ("a.json", records)):
        for mark, end in ((b"", "\n"), (b"\xef\xbb\xbf", "\r\n")):
            path = tmp_path / name
            path.write_bytes(mark + end.join(written).encode() + b"\n")
            found = list(generate.prompts_of(path))
            assert found == prompts
    generate.main([f"checkpoint={text_run}", f"prompts_file={path}", *CPU])
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == prompts


def test_an_array_of_prompts_is_refused_with_advice(tmp_path, capsys):
    path = tmp_path / "prompts.json"
    for indent in (None, 1):
        path.write_text(json.dumps([{"prompt": "a"}], indent=indent), "utf-8")
        message = fails(capsys, "checkpoint=x", f"prompts_file={path}")
        assert "prompts.json, line 1" in message and "array" in message and "jq" in message


def test_a_stop_string_ends_the_text(text_run, capsys):
    arguments = [f"checkpoint={text_run}", "prompt=ab cd", *CPU, "max_new_tokens=60"]
    generate.main(arguments)
    whole = capsys.readouterr().out.strip()
    stop = whole[30:32]
    generate.main([*arguments, f"stop={stop}"])
    text = capsys.readouterr().out.removesuffix("\n")
    assert text == whole[: 5 + whole[5:].index(stop)]
    options = generate.parse(["checkpoint=x", "prompt=a", r'stop=["\n\n", "Q:"]'])
    assert options.stop == ["\n\n", "Q:"]
    assert generate.parse(["checkpoint=x", "prompt=a", r"stop=\n"]).stop == ["\n"]


@pytest.mark.slow
def test_interactive_answers_line_by_line(text_run):
    """A real process and a real pipe: the answer to the first line comes before the second."""
    command = [sys.executable, "scripts/generate.py", f"checkpoint={text_run}", "interactive=true"]
    with subprocess.Popen(
        [*command, *CPU], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write("ab cd\n")
        process.stdin.flush()
        assert process.stdout.read(5) == "ab cd"
        out, _ = process.communicate("gh\n", timeout=60)
        assert "\ngh" in out and process.returncode == 0


def test_lines_that_are_not_utf8_cost_the_others_nothing(text_run, capsys, monkeypatch):
    data = b"\xef\xbb\xbfab cd\r\ncaf\xe9\ngh"
    command = [f"checkpoint={text_run}", *CPU]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
    generate.main([*command, "interactive=true"])
    out, err = capsys.readouterr()
    assert out.startswith("ab cd") and "\ngh" in out and "caf" not in out
    assert "byte 0xe9" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
    message = fails(capsys, *command, "prompts_file=-")
    assert "standard input, line 2" in message and "0xe9" in message


def test_arguments_that_the_locale_could_not_decode(text_run, capsys):
    here = f"checkpoint={text_run}"
    for key in ("prompt", "stop"):
        message = fails(capsys, here, "prompt=a", f"{key}=caf\udce9", *CPU)
        assert f"{key} " in message and "0xe9" in message and "UTF-8" in message
    assert generate.parse([here, "prompt=\udce4\udcbb\udc8a"]).prompt == "今"


def test_texts_are_whole_where_the_terminal_cannot_encode_them(text_run, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a今\n", encoding="utf-8")
    for source, shown in (
        ("prompt=a今", b"a\\u4eca"),
        (f"prompts_file={tmp_path}/prompts.txt", "a今".encode()),
    ):
        out = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, "ascii"))
        generate.main([f"checkpoint={text_run}", source, *CPU])
        assert shown in out.getvalue()


def test_a_closed_pipe_ends_the_command_quietly(text_run, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit) as end:
            generate.main([f"checkpoint={text_run}", "prompt=ab", *CPU])
    assert end.value.code == 0
    assert all(line.startswith("note: ") for line in capfd.readouterr().err.splitlines())


@pytest.mark.slow
def test_head_may_stop_reading(text_run):
    command = (
        f"{sys.executable} scripts/generate.py checkpoint={text_run} prompt=ab {' '.join(CPU)}"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} 2> >(grep -v ^note: >&2) | head -c 2"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    encoding="utf-8")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "ab", "")


def test_a_file_is_no_checkpoint(text_run, capsys):
    weights = sorted(Path(text_run).glob("step_*/model.pt"))[-1]
    message = fails(capsys, f"checkpoint={weights}", "prompt=a")
    assert "model.pt is a file" in message and f"{weights.parent}" in message
    message = fails(capsys, f"checkpoint={weights.parent / 'config.yaml'}", "prompt=a", *CPU)
    assert f"give {weights.parent}" in message
    assert "is a file" in fails(capsys, f"checkpoint={__file__}", "prompt=a", *CPU)


def test_a_mistyped_run_is_recognized(text_run, tmp_path, capsys):
    for name in ("plays", "novels"):
        (tmp_path / name).symlink_to(text_run)
    message = fails(capsys, f"checkpoint={tmp_path}/noveles", "prompt=a", *CPU)
    assert f"{tmp_path}/noveles" in message and f"did you mean {tmp_path / 'novels'}?" in message
    message = fails(capsys, f"checkpoint={tmp_path}/qqq", "prompt=a", *CPU)
    assert f"{tmp_path}/qqq" in message and "did you mean" not in message


def test_mistakes_are_named_together(capsys):
    message = fails(capsys, "promt=x", "checkpoint=here", "temperature=hot", "steps=0")
    assert "did you mean 'prompt'" in message
    assert "temperature" in message and "steps" in message


def test_help_lists_every_key(capsys):
    generate.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {key}" in text for key in generate.Options.model_fields)


def test_refusals(text_run, tmp_path, capsys):
    here = f"checkpoint={text_run}"
    assert "prompt is empty" in fails(
        capsys, here, "prompt=", "device_type=cpu", "identifier=poems"
    )
    assert "prompts_file=FILE" in fails(capsys, here)
    assert "pretrain.py" not in fails(capsys, here, "prompt=a", "qqqqqqqq=1")  # of another command
    assert "prompts_file=FILE" in fails(capsys, here, "prompt=a", "interactive=true")
    assert "empty text" in fails(capsys, here, "prompt=a", 'stop=["a", ""]')
    assert "cannot be read" in fails(capsys, here, f"prompts_file={tmp_path / 'none.txt'}")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"question": "b"}\n', "utf-8")
    assert "broken.jsonl, line 2" in fails(capsys, here, f"prompts_file={broken}")
    assert "did you mean 'poems'" in fails(capsys, here, "prompt=a", "identifier=poem")
    assert "not a folder" in fails(capsys, f"checkpoint={tmp_path / 'none'}", "prompt=a")
    assert "not a checkpoint" in fails(capsys, f"checkpoint={tmp_path}", "prompt=a")
    above = fails(capsys, f"checkpoint={Path(text_run).parent}", "prompt=a")
    assert "runs below it" in above and str(text_run) in above


def test_a_damaged_checkpoint_is_refused(text_run, tmp_path, capsys):
    folder = altered(text_run, tmp_path / "damaged")
    (folder / "dataset.json").write_text(json.dumps({}), "utf-8")
    assert "damaged" in fails(capsys, f"checkpoint={folder}", "prompt=a")
