"""Tests of the HTML report on runs: its data, self-contained page and errors."""

import base64
import configparser
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import mini_runs
import numpy as np
import pytest
from mini_runs import check_message
from PIL import Image

from hivit_jax import config as configs
from hivit_jax.checkpoints.manager import Checkpoints
from hivit_jax.reporting import figures
from hivit_jax.tools import report

# Lines of metrics.jsonl with batches of 16: 10 steps take 2 s, the next 3 take 0.5 s,
# the last 7 take 2 s. Step 13, not a multiple of log_every, ends an interrupted start.
LINES = [
    {"step": 10, "loss": 0.5, "images_per_second": 80.0, "seconds_left": 2.0},
    {"step": 10, "eval/loss": 0.75, "eval/count": 360, "eval/unreadable": 0},
    {"step": 13, "loss": 0.25, "images_per_second": 96.0, "seconds_left": 7 * 16 / 96},
    {"step": 20, "loss": 0.125, "images_per_second": 56.0, "seconds_left": 0.0},
    {"step": 20, "eval/loss": 0.5, "eval/count": 360, "eval/unreadable": 0},
]


class Elements(HTMLParser):
    """Parser of a page that collects tags, attributes, open elements and JSON data."""

    def __init__(self, page):
        super().__init__()
        self.attributes, self.open, self.json, self.tags = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", SCRIPT_ATTRIBUTES):
            self.json += data


SCRIPT_ATTRIBUTES = {"type": "application/json", "id": "data"}


def write_run(workdir, lines=LINES, **overrides):
    """Write metrics.jsonl and config.json of a mini run of 20 steps."""
    workdir.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    values = {"log_every": 10, "total_steps": 20} | overrides
    config = configs.to_json(mini_runs.mae("digits", **values))
    (workdir / "config.json").write_text(config)
    return workdir


def page_data(*workdirs):
    """Return the JSON data in the report on these runs."""
    return json.loads(Elements(report.make_report(map(str, workdirs))).json)


def test_metrics_are_embedded(tmp_path):
    write_run(tmp_path / "a", [*LINES, {"step": 30, "loss": float("nan")}])
    [run] = page_data(tmp_path / "a")["runs"]
    assert run["series"]["loss"] == {
        "step": [10, 13, 20, 30],
        "value": [0.5, 0.25, 0.125, None],
    }
    assert run["series"]["eval/loss"] == {"step": [10, 20], "value": [0.75, 0.5]}
    assert run["batch_size"] == 16
    assert run["seconds"] == {"step": [0, 10, 13, 20], "seconds": [0, 2, 2.5, 4.5]}


def test_charts_begin_with_losses_and_evaluations(tmp_path):
    """A metric that is always 0, here `eval/unreadable`, has no chart."""
    lines = [{"step": 1, "learning_rate": 1e-3, "top1": 0.5, "eval/top1": 0.25}]
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", lines)
    titles = [c["title"] for c in page_data(tmp_path / "a", tmp_path / "b")["charts"]]
    assert titles == [
        "training loss",
        "evaluation loss",
        "evaluation top1",
        "training top1",
        "learning rate",
        "throughput, images/s",
    ]


def test_config_table_marks_keys_that_differ(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", mask_ratio=0.5)
    rows = page_data(tmp_path / "a", tmp_path / "b")["config"]
    assert [row for row in rows if row["differs"]] == [
        {"key": "mask_ratio", "values": ["0.625", "0.5"], "differs": True}
    ]
    values = {row["key"]: row["values"] for row in rows}
    assert values["model.depths"] == ["[1, 1, 2]"] * 2


def test_events_are_starts_interruptions_and_checkpoints(tmp_path):
    """An interruption precedes the later start, which lists the changed keys.

    If the numbers of starts and interruptions do not determine an order, starts come
    first. Damaged checkpoints are events too.
    """
    run = write_run(tmp_path / "a")
    later = mini_runs.mae("digits", log_every=10, total_steps=20, seed=5)
    (run / "config-20260102T030405Z.json").write_text(configs.to_json(later))
    for name in ("checkpoints/13", "checkpoints/20", "damaged/12"):
        (run / name).mkdir(parents=True)
    assert page_data(run)["runs"][0]["events"] == [
        {"text": "first start"},
        {
            "step": 13,
            "text": "interrupted, or ended by an error; this step was saved",
        },
        {
            "text": "later start",
            "time": "2026-01-02 03:04:05 UTC",
            "details": ["seed: 0 -> 5"],
        },
        {"step": 12, "text": "damaged checkpoint, moved to damaged/"},
        {"text": "checkpoints of steps 13, 20"},
    ]
    shutil.copy(run / "config.json", run / "config-20260103T030405Z.json")
    found = page_data(run)["runs"][0]["events"]
    assert [event.get("step") for event in found] == [None, None, None, 13, 12, None]


@pytest.mark.slow
def test_summary_describes_a_finished_run(tmp_path):
    run = write_run(tmp_path / "a")
    info = {"counts": {"train": 1437, "test": 360}, "classes": [*"0123456789"]}
    checkpoints = Checkpoints(run, keep=1, dataset=info)
    state = {"params": {"x": np.zeros(1)}, "opt_state": {}, "step": np.int32(20)}
    checkpoints.save(state, (run / "config.json").read_text())
    checkpoints.close()
    assert page_data(run)["runs"][0]["summary"] == {
        "task": "mae",
        "model": "mae_hivit_tiny",
        "parameters": "156,720",
        "dataset": "digits: 1,437 train, 360 test, 10 classes",
        "steps": "20 of 20",
        "state": "finished",
        "best evaluation": "eval/loss 0.5 at step 20",
        "last training loss": "0.125",
        "median throughput": "80 images/s",
        "batch size": "16",
        "starts": "1",
    }


def test_unfinished_run_is_reported_without_checkpoint_or_config(tmp_path):
    run = write_run(tmp_path / "a", LINES[:3])
    facts = page_data(run)["runs"][0]["summary"]
    assert (facts["steps"], facts["state"]) == ("13 of 20", "not finished")
    assert facts["parameters"] == "unknown"
    (run / "config.json").unlink()
    [run_data] = page_data(run)["runs"]
    assert (run_data["seconds"], run_data["events"]) == (None, [])
    assert (run_data["summary"]["steps"], run_data["summary"]["model"]) == (
        "13",
        "unknown",
    )


def test_figures_of_many_steps_are_an_evenly_spaced_selection(tmp_path, monkeypatch):
    """The selection includes the first and last step. The omitted steps are counted."""
    monkeypatch.setattr(report, "MAX_IMAGES", 3)
    run = write_run(tmp_path / "a")
    for step in range(10, 60, 10):
        pixels = np.full((1, 2, 3), step, np.uint8)
        figures.write_png(run / "figures" / f"some_cells_{step:07d}.png", pixels)
    for name in ("schedule", "curves"):
        figures.write_png(run / "figures" / f"{name}.png", pixels)
    [data] = page_data(run)["runs"]
    assert data["left_out"] == {"schedule": 0, "some_cells": 2}
    images_by_name = data["figures"]
    assert {
        name: [image["step"] for image in images_by_name[name]]
        for name in images_by_name
    } == {
        "schedule": [0],
        "some_cells": [10, 30, 50],
    }
    for image in images_by_name["some_cells"]:
        encoded = image["src"].removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert (picture.size, picture.getpixel((0, 0))[0]) == (
                (2, 1),
                image["step"],
            )


def test_page_is_self_contained(tmp_path):
    """The page refers to no file or address, and escapes the text of a run."""
    text = "</script><b>&amp;{{DATA}}"
    run = write_run(tmp_path / "a", [{"step": 1, text: 0.5}], init_from=text)
    page = Elements(report.make_report([str(run)]))
    assert page.open == []
    assert "b" not in page.tags
    assert {*page.tags} & {"link", "img", "iframe", "object", "base"} == set()
    assert {name for _, name, _ in page.attributes} & {"src", "href"} == set()
    policy = next(v for _, n, v in page.attributes if n == "content" and "src" in v)
    assert "default-src 'none'" in policy
    data = json.loads(page.json)
    assert data["charts"][0]["name"] == text
    assert ["init_from", [json.dumps(text)]] in [
        [row["key"], row["values"]] for row in data["config"]
    ]


def test_run_names_are_unique(tmp_path):
    """All names have the same number of parts, the smallest that makes them unique.

    A run that is given twice appears once.
    """
    runs = [write_run(tmp_path / name) for name in ("x/a/run", "x/b/run", "y/a/run")]
    assert [run["name"] for run in page_data(*runs, runs[0])["runs"]] == [
        "x/a/run",
        "x/b/run",
        "y/a/run",
    ]
    assert [run["name"] for run in page_data(runs[1])["runs"]] == ["run"]


def test_command_writes_the_page(tmp_path, capsys):
    run, out = write_run(tmp_path / "a"), tmp_path / "report.html"
    assert report.main([str(run), "--out", str(out)]) == 0
    assert out.read_text() == report.make_report([str(run)])
    assert f"written: {out} (0.0 MB)" in capsys.readouterr().out
    setup = configparser.ConfigParser()
    setup.read(mini_runs.ROOT / "setup.cfg")
    assert setup["options.package_data"]["hivit_jax.tools"] == "report.html"


def test_unusable_run_or_output_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "empty", [])
    damaged = write_run(tmp_path / "damaged") / "config.json"
    damaged.write_text("{")
    out = tmp_path / "report.html"
    for path, out_path, words in (
        (tmp_path / "none", out, ["none/metrics.jsonl", "no directory"]),
        (run.parent, out, ["runs/metrics.jsonl", "no file", "with metrics: a"]),
        (tmp_path / "empty", out, ["empty/metrics.jsonl", "none", "log_every"]),
        (damaged.parent, out, [str(damaged), "expected JSON", "move the file"]),
        (run, tmp_path / "none" / "x.html", ["--out", "No such file or directory"]),
        (run, run / "metrics.jsonl", ["--out", "would be overwritten"]),
    ):
        assert report.main([str(path), "--out", str(out_path)]) == 2
        check_message(capsys.readouterr().err, words)
    assert not out.exists()


INTERACTIONS = """<script>
setTimeout(() => {
  const find = selector => document.querySelector(selector);
  const texts = node => [...node.querySelectorAll("text")].map(t => t.textContent);
  const lines = () => svg.querySelectorAll("path").length;
  const card = find("[data-chart=loss]"), svg = card.querySelector("svg");
  const found = {lines: lines(), linear: texts(svg)};
  card.querySelector("button").click();
  found.log = texts(svg);
  const box = svg.getBoundingClientRect();
  const end = {clientX: box.right - 12, clientY: box.top + 50};
  svg.dispatchEvent(new PointerEvent("pointermove", end));
  found.tip = [...find("#tip").children].map(row => row.textContent);
  find("#bar button").click();
  found.hidden = lines();
  find("#bar button").click();
  const select = find("#bar select");
  select.value = "time";
  select.dispatchEvent(new Event("change"));
  found.time = texts(svg).filter(text => text.endsWith(" s"));
  const slider = find("[data-figure] input"), image = find(".images img");
  const last = image.src;
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  found.slider = [find("[data-figure] .note").textContent, image.src !== last];
  const root = document.documentElement;
  found.overflow = root.scrollWidth - root.clientWidth;
  document.body.textContent = JSON.stringify(found);
}, 500);
</script></body>"""


@pytest.mark.browser
@pytest.mark.processes
def test_page_is_interactive_in_chromium(tmp_path):
    """Hovering, axes, hidden runs and the slider of figures work."""
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not browser:
        pytest.skip("no Chromium; set CHROMIUM to its path")
    runs = [write_run(tmp_path / name) for name in "ab"]
    for step in (10, 20):
        pixels = np.full((1, 1, 3), step, np.uint8)
        figures.write_png(runs[0] / "figures" / f"cells_{step:07d}.png", pixels)
    page = report.make_report(map(str, runs)).replace("</body>", INTERACTIONS)
    (tmp_path / "page.html").write_text(page)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=600,900"]
    dom = subprocess.run(
        [browser, *flags, "--dump-dom", f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    text = re.search("(?s)<body>(.*)</body>", dom)[1]
    assert json.loads(html.unescape(text)) == {
        "lines": 2,
        "linear": ["0.2", "0.3", "0.4", "0.5", "0", "5", "10", "15", "20"],
        "log": ["0.15", "0.2", "0.3", "0.5", "0", "5", "10", "15", "20"],
        "tip": ["a: 0.125 at step 20", "b: 0.125 at step 20"],
        "hidden": 1,
        "time": ["0 s", "1 s", "2 s", "3 s", "4 s"],
        "slider": ["step 10", True],
        "overflow": 0,
    }
