"""The report says what the logs say, of any runs, and is one page that needs nothing else."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from seeds import draw_rng
from training_tools import make_config, write_run

from pretrain import train
from scripts import report
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.config.load import compose_config, load_config

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
HOSTILE = (
    '</script><script>alert(1)</script><img src=http://example.org/x onerror="alert(2)"> {{ 1 }}'
)


class Page(HTMLParser):
    """Elements with their attributes, and the cells of every table row by its heading."""

    VOID = frozenset(("meta", "img", "input", "path", "use"))

    def __init__(self, text: str):
        super().__init__()
        self.source, self.open = text, list[str]()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[dict]] = {}
        self.row: list[dict] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.row = []
        elif tag in ("th", "td"):
            self.row.append({"text": "", "class": found.get("class"), "values": []})
        elif tag == "data":
            self.row[-1]["values"].append(float(found["value"]))
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        if tag == "tr" and self.row:
            self.rows.setdefault(self.row[0]["text"].strip(" ↓↑"), []).append(self.row[1:])

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
        if self.row and {"th", "td"} & set(self.open):
            self.row[-1]["text"] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    def chart(self, title: str) -> dict:
        """What the page's script knows of a chart."""
        captions = re.findall(r'data-chart="(\d+)">\s*<figcaption>(.*?)</figcaption>', self.source)
        [number] = [int(number) for number, caption in captions if caption == title]
        return self.data["list"][number]


def page_of(*runs: Path, output: Path | None = None) -> Page:
    output = output or runs[0].parent / "page.html"
    report.main([*map(str, runs), "--output", str(output)])
    return Page(output.read_text(encoding="utf-8"))


def training(step: int, seconds: float, time: float, **more) -> dict:
    known = {"train/lm_loss": 3.0 / step, "train/tokens": 100 * step, "train/nonfinite": 0}
    return {"step": step, "time": time, "train/seconds": seconds, **known, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text_corpus) -> list[Path]:
    """A recursive model and a plain decoder, evaluated several times, and what they wrote."""
    folder = tmp_path_factory.mktemp("report")
    shared = "max_steps=12 eval_max_batches=2 eval_interval=0.2 lr=3e-3".split()
    evaluators = "evaluators=[text@PerplexityEvaluator,halting@HaltingEvaluator]"
    plain = "arch=transformer arch.hidden_size=32 arch.num_heads=2 arch.num_layers=2".split()
    plain += "arch.forward_dtype=float32 arch.puzzle_emb_ndim=0".split()
    made = []
    for name, compose in (("recursive", make_config), ("plain", plain_config)):
        extra = [*shared, evaluators, f"checkpoint_path={folder / name}", f"run_name={name}"]
        config = compose(text_corpus, *extra, *(plain if name == "plain" else ()))
        assert train(CPUBackend(), config) == 0
        made.append(folder / name)
    for run in made:
        last = max(run.glob("evaluation_step_*"), key=lambda p: int(p.name.rpartition("_")[2]))
        line = {
            "evaluator": "generation",
            "prompt": f"A {HOSTILE}",
            "text": f"{run.name} {HOSTILE}",
        }
        (last / "samples.jsonl").write_text(
            json.dumps(line | {"reference": "the right one"}) + "\n", "utf-8"
        )
    return made


def plain_config(corpus: Path, *overrides: str):
    keys = "device_type=cpu global_batch_size=8 log_interval=1 lr_warmup_steps=0".split()
    return load_config(compose_config([*keys, f"data_paths=[{corpus}]", *overrides]))


@pytest.fixture(scope="module")
def page(runs) -> Page:
    return page_of(*runs)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_figures_are_those_of_the_logs(runs, page):
    last = [
        next(r for r in reversed(log_of(run)) if "eval/text/bits_per_byte" in r) for run in runs
    ]
    for label, name in (("bits per byte", "bits_per_byte"), ("perplexity", "perplexity")):
        cells = page.rows[label][0]
        values = [record[f"eval/text/{name}"] for record in last]
        assert [cell["values"] for cell in cells] == [[value] for value in values]
        assert [cell["class"] == "best" for cell in cells] == [v == min(values) for v in values]
    cells = [cell for rows in page.rows.values() for row in rows for cell in row]
    shown = {value for cell in cells for value in cell["values"]}
    for record in last:
        plain = {
            key: value
            for key, value in record.items()
            if key.startswith("eval/") and "/step_" not in key and "/hist/" not in key
        }
        missing = [key for key, value in plain.items() if value not in shown]
        assert not missing


def test_curves_are_those_of_the_logs(runs, page):
    loss = page.chart("Loss")
    for line, run in zip(loss["lines"], runs, strict=True):
        logged = [r for r in log_of(run) if r.get("train/lm_loss") is not None]
        assert line["y"] == pytest.approx([r["train/lm_loss"] for r in logged], rel=1e-5)
        assert line["x"]["step"] == [r["step"] for r in logged]
        assert line["x"]["tokens"] == [r["train/tokens"] for r in logged]
    depth = page.data["list"][0]
    for line, run in zip(depth["lines"], runs, strict=True):
        last = [r for r in log_of(run) if "eval/text/bits_per_byte" in r][-1]
        for name, key, values in (
            ("y", "text/step_{}/bits_per_byte", line["y"]),
            ("flops", "halting/step_{}/flops_per_token", line["x"]["flops"]),
        ):
            logged = [last["eval/" + key.format(int(k))] for k in line["x"]["act"]]
            assert values == pytest.approx(logged, rel=1e-5), name
    assert [len(line["y"]) for line in depth["lines"]] == [4, 1]  # ACT steps of each


def test_the_same_runs_give_the_same_page(runs, page, tmp_path):
    assert page_of(*runs, output=tmp_path / "again.html").source == page.source


def test_what_differs_between_the_configs(runs, page):
    assert [cell["text"] for cell in page.rows["arch.num_layers"][0]] == ["–", "2"]
    assert [cell["text"] for cell in page.rows["arch.halt_max_steps"][0]] == ["4", "–"]
    assert "lr" in page.rows and len(page.rows["lr"][0]) == 1  # only in the folded configs
    for run, cell in zip(runs, page.rows["parameters"][0], strict=True):
        weights = Checkpoint(checkpoints_of(run)[-1]).tensors("model")
        outside = ("puzzle_emb.weights", "embedding_weight", "lm_head.weight", "_init")
        core = sum(w.numel() for name, w in weights.items() if not name.endswith(outside))
        assert f"{core / 1e3:.3g} k of them core" in cell["text"]


def test_hostile_text_stays_text_and_nothing_is_fetched(runs, tmp_path):
    odd = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(runs[0], odd)
    page = page_of(odd, runs[1], output=tmp_path / "page.html")
    assert HOSTILE in page.text
    assert [tag for tag, _ in page.elements].count("script") == 2
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if value := attributes.get(name):
                assert value.startswith(("#", "data:image/png;")), (tag, value)
    assert not re.search(r"url\(|@import", page.source)
    assert page.data["names"][0] == odd.name


@pytest.mark.parametrize("tail", ["", '{"step": 3, "time": 9.0, "train/lm'])
def test_a_run_that_has_hardly_begun(tmp_path, tail):
    run = write_run(tmp_path / "young", training(2, 1.0, 100.0), tail=tail)
    page = page_of(run)
    assert ("incomplete" in page.text) == bool(tail)
    assert page.chart("Loss")["lines"][0]["y"] == [1.5]
    assert "No evaluation was logged yet" in page.text


def test_figures_on_different_rows_are_not_held_against_each_other(tmp_path):
    pair = []
    for name, rows in (("one", 100), ("two", 50)):
        figures = {"eval/all/rows": rows, "eval/all/lm_loss": float(rows)}
        pair.append(write_run(tmp_path / name, training(1, 1.0, 100.0), {"step": 1, **figures}))
    page = page_of(*pair)
    assert "different numbers of rows" in page.text
    assert not any(attributes.get("class") == "best" for _, attributes in page.elements)


def test_trouble_is_told(tmp_path):
    """Skipped updates, a loss that was not finite, an evaluator that failed."""
    run = write_run(
        tmp_path / "run",
        training(1, 1.0, 100.0),
        training(2, 2.0, 101.0, **{"train/lm_loss": None, "train/nonfinite": 3}),
        {"step": 2, "eval/evaluators_failed": 1, "eval/text/bits_per_byte": None},
    )
    page = page_of(run)
    assert "3 updates were skipped" in page.text and "1 evaluator failed" in page.text
    assert page.rows["bits per byte"][0][0]["text"] == "not finite"
    assert page.chart("Loss")["lines"][0]["y"] == [3.0]


def test_where_the_time_went(tmp_path):
    """60 s of training, 7 s of evaluation, a kill that cost 33 s, and one pause of 20 s."""
    run = write_run(
        tmp_path / "run",
        training(10, 10.0, 110.0),
        {"step": 10, "time": 117.0, "eval/text/bits_per_byte": 3.0},
        training(20, 20.0, 127.0),
        training(30, 30.0, 170.0),  # trained again: 10 of 43 s were training
        training(40, 60.0, 220.0),
    )
    given_up = [training(30, 30.0, 137.0), training(40, 40.0, 147.0)]
    lines = "".join(json.dumps(line) + "\n" for line in given_up)
    (run / "metrics_abandoned.jsonl").write_text(lines + '{"step": 5', "utf-8")
    page = page_of(run)
    [facts] = [{label: cells[0][0]["text"] for label, cells in page.rows.items() if cells[0]}]
    assert facts["training time"] == "60.0 s" and facts["evaluation time"] == "7.0 s"
    assert facts["other pauses over 5 s"] == "after step 20: 33.0 s, after step 30: 20.0 s"
    assert facts["saving and other"] == "0.0 s"
    assert "2 log lines" in page.text


def test_long_logs_stay_small_and_keep_their_extremes(tmp_path):
    rng = draw_rng()
    names = "lm_loss accuracy lr grad_norm tokens_per_s flops_per_s z_H_norm memory_bytes".split()
    spike = int(rng.integers(2000, 8000))
    folders = []
    for name in "abc":
        noise = rng.random((10_000, len(names))) + 1
        noise[spike, 0] = 77.25
        records = [
            training(
                step,
                step / 3,
                100 + step / 3,
                **{f"train/{n}": v for n, v in zip(names, row, strict=True)},
            )
            for step, row in enumerate(noise.tolist(), 1)
        ]
        folders.append(write_run(tmp_path / name, *records))
    page = page_of(*folders)
    assert len(page.source.encode()) < 1.5e6
    for line in page.chart("Loss")["lines"]:
        assert line["x"]["step"][line["y"].index(77.25)] == spike + 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path / "nowhere", "nowhere/metrics.jsonl does not exist"),
        (lambda path: path, "does not exist"),
        (lambda path: write_run(path / "empty"), "no metrics yet"),
        (lambda path: write_run(path / "alien", tail='[1]\n{"epoch": 1}\n\xff\n'), "no metrics"),
        (lambda path: write_run(path / "runs" / "x", training(1, 1.0, 1.0)).parent, "runs/x"),
    ],
)
def test_what_is_no_run_is_told_in_one_sentence(
    tmp_path, capsys, make: Callable[[Path], Path], says: str
):
    with pytest.raises(SystemExit) as end:
        report.main([str(make(tmp_path))])
    told = capsys.readouterr().err
    assert end.value.code == 2 and says in told and told.count("\n") == 1


def test_one_run_gets_its_report_in_its_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run", training(1, 1.0, 100.0))
    report.main([str(run)])
    assert (run / "report.html").is_file() and str(run / "report.html") in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([str(run), f"{run}/"])
    assert "twice" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_in_a_real_browser_a_pointer_reads_values(runs, page, tmp_path):
    """The toggle shows another axis, the pointer the logged value, and no script fails."""
    probe = """<script>
        document.getElementById("by-tokens").checked = true;
        const view = document.querySelector(".course .v-tokens");
        const frame = view.getBoundingClientRect();
        const at = {clientX: frame.right, clientY: frame.top};
        view.dispatchEvent(new PointerEvent("pointermove", at));
        const hidden = document.querySelector(".course .v-step").getBoundingClientRect().height;
        const told = document.getElementById("tip").innerText;
        document.title = `${hidden} ${frame.height > 50} ${told}`;
    </script>"""
    path = tmp_path / "probe.html"
    path.write_text(page.source.replace("</body>", probe + "</body>"), "utf-8")
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert title.startswith("0 true "), title
    for run in runs:
        last = [r for r in log_of(run) if "eval/text/bits_per_byte" in r][-1]
        value = re.search(rf"{run.name}: ([\d.]+) at", title)[1]
        assert math.isclose(float(value), last["eval/text/bits_per_byte"], rel_tol=1e-5)
