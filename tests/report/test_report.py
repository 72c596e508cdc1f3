"""The report of runs: what stands on the page, what names cannot do to it, and that it is the same on every build."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_runs import made_run, three
from scripts import ROOT

from offpolicy.errors import UsageError
from offpolicy.evaluation.aggregates import bootstrap_band, bootstrap_interval, interquartile_mean
from offpolicy.evaluation.scores import interval
from offpolicy.files import Table
from offpolicy.report.__main__ import main
from offpolicy.report.build import write_report
from offpolicy.report.curves import Line, mean_curve, on_grid, suite_curve, switch_place
from offpolicy.report.published import published_for, published_scores, published_seed_scores
from offpolicy.report.records import MOST_ROWS, read_margins, read_metrics, read_record
from offpolicy.report.runs import Run, newest_step, read_run
from offpolicy.report.scores_section import selected
from offpolicy.report.writing import csv_cell, csv_text, latex_table, latex_text, tag

CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
HOSTILE = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(root: Path, **options: str) -> tuple[str, Path]:
    out = root.parent / f"{root.name}-report"
    return write_report([root], out, **options).read_text(), out


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Two methods on two tasks, three seeds, and runs that have not finished."""
    root = tmp_path_factory.mktemp("runs")
    for data in ("hopper-medium-v2", "maze"):
        three(root, "BC", [10.0, 12.0, 14.0], data, batch_size=8)
        three(root, "IQL", [50.0, 52.0, 54.0], data, batch_size=8)
    for state in ("interrupted", "diverged", "killed", "running", "failed"):
        folder = made_run(root / state, "IQL", "maze", 9, (5.0,), planned=500, batch_size=8)
        rows = {"step": 20, "train/critic_loss": math.nan if state == "diverged" else 1.0, "perf/updates_per_s": 10.0}
        Table(folder / "metrics.csv").append(rows)
        if state in ("killed", "running"):
            holder = {"pid": os.getpid() if state == "running" else 2**22 + 1, "host": os.uname().nodename}
            (folder / ".lock").write_text(json.dumps(holder))
        if state == "failed":
            (folder / "evaluation-error.txt").write_text("…")
            Table(folder / "evals.csv").append({"step": 20, "error": "no"})
    return report(root)


def test_what_stands_on_the_page(suite: tuple[str, Path]) -> None:
    text, out = suite
    words = " ".join(Reader(text).words)
    assert "12.0 ± 5.0 (3)" in words and "52.0 ± 5.0 (3)" in words
    for wanted in ("IQM", "optimality gap", "Performance profiles", "P(row > column)", "not known: nothing selected"):
        assert wanted in words
    for state in ("interrupted", "diverged", "killed", "running", "evaluation failed"):
        assert f"is {state} at update 20 of 500." in words, state
    assert "CORL README" in words and "spread: std (ddof 0) over seeds, 4 seeds" in words
    assert "No published numbers are known here for maze." in words
    for name in ("table-score", "evaluations-score", "aggregates-score", "curves-score", "unknown", "commands"):
        assert f'id="{name}"' in text and f'href="#{name}"' in text
    for name in ("tables/score.csv", "tables/score.tex", "tables/curves-score.csv", "tables/runs.csv"):
        assert (out / name).stat().st_size
    for drawn in (out / "figures").glob("*.png"):
        assert drawn.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_the_page_needs_nothing_else(suite: tuple[str, Path]) -> None:
    text, out = suite
    for tag_name, attributes in Reader(text).tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith("#") or (out / target).exists(), (tag_name, target)
        assert tag_name not in ("link", "iframe", "object", "img")
    ids = [attributes["id"] for _, attributes in Reader(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "@import" not in text and "url(http" not in text


def test_two_builds_are_equal(tmp_path: Path) -> None:
    for data in ("a", "b"):
        three(tmp_path / "runs", "BC", [10.0, 12.0, 14.0], data)
    first, second = (write_report([tmp_path / "runs"], tmp_path / name) for name in ("one", "two"))
    for path in sorted(first.parent.rglob("*.*")):
        if path.is_file():
            assert path.read_bytes() == (second.parent / path.relative_to(first.parent)).read_bytes(), path


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_few_seeds_have_points_and_no_band(tmp_path: Path, seeds: int) -> None:
    for seed in range(seeds):
        made_run(tmp_path / "runs" / str(seed), seed=seed, scores=(1.0, 2.0 + seed))
    text, out = report(tmp_path / "runs")
    assert ("Fewer than 3 seeds have no band" in text) == (seeds < 3)
    rows = list(csv.DictReader(open(out / "tables" / "curves-score.csv")))  # noqa: SIM115
    assert all((row["low"] == "") == (seeds < 3) for row in rows)


def test_no_run_has_finished(tmp_path: Path) -> None:
    made_run(tmp_path / "runs" / "a", scores=(1.0,), planned=500)
    made_run(tmp_path / "runs" / "b", seed=1, scores=(), planned=500)
    text, _ = report(tmp_path / "runs")
    assert "not finished and left out" in text and "2 interrupted" in text and "without an evaluation" in text


def test_many_methods_and_negative_scores(tmp_path: Path) -> None:
    for i in range(12):
        three(tmp_path / "runs", f"M{i}", [-10.0 - i, 12.0, 14.0 + i])
    text, out = report(tmp_path / "runs")
    assert len(list((out / "figures").glob("curves-score-*.png"))) == 2 and "M11" in text


def test_names_are_nothing_but_names(tmp_path: Path) -> None:
    method = "=HYPERLINK(1)" + HOSTILE + r"\input{/etc/passwd}$x^{"
    for seed in range(3):
        folder = made_run(tmp_path / "runs" / f"{seed}", method, HOSTILE, seed, (1.0, 2.0), note=HOSTILE + "$\\frac")
        (folder / "command.txt").write_text(f"python {HOSTILE}\n")
        (folder / "versions.json").write_text(json.dumps({"torch": HOSTILE, "device": HOSTILE, "data": 3}))
    text, out = report(tmp_path / "runs", title=HOSTILE)
    assert [one for one, _ in Reader(text).tags].count("script") == 1
    assert HOSTILE not in text
    tex = (out / "tables" / "score.tex").read_text()
    assert r"\input" not in tex and r"\textbackslash{}input\{/etc/passwd\}\$x\textasciicircum{}\{" in tex
    for row in csv.reader(open(out / "tables" / "score.csv")):  # noqa: SIM115
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-x", "@a", "\tx", "\r=1", "a\n=b"])
def test_cells_that_a_spreadsheet_would_compute(text: str) -> None:
    (row,) = csv.reader(csv_text([{"a": text}]).splitlines()[1:])
    assert not row[0].lstrip().startswith(("=", "+", "-", "@"))
    assert csv_cell(-1.5) == -1.5 and csv_cell("plain") == "plain"


def test_markup_escapes_what_it_holds() -> None:
    assert tag("a", "<b>", tag("i", "&"), title='"x"') == '<a title="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></a>'
    assert latex_text("a_b & 50% \\x ~") == r"a\_b \& 50\% \textbackslash{}x \textasciitilde{}"
    assert r"\textbf{1.0}" in latex_table(["t", "m"], [["x", "1.0*"]], "c") and r"x &" in latex_table(
        ["t"], [["x", 1]], ""
    )


# -- statistics --------------------------------------------------------------------------------------------------------


def test_curves_step_and_stop_with_the_shortest() -> None:
    lines = [Line(np.array(x, float), np.array(y, float)) for x, y in (([1, 3, 5], [1, 3, 5]), ([2, 4], [20, 40]))]
    x, values = on_grid(lines)
    assert x.tolist() == [2, 3, 4] and values.tolist() == [[1, 3, 3], [20, 20, 40]]
    curve = mean_curve([*lines, Line(np.array([0.0, 9.0]), np.array([0.0, math.nan]))])
    assert curve is None or len(curve.x) == 0  # the third ends before the others begin
    curve = mean_curve([Line(np.arange(2.0), np.array([0.0, v])) for v in (1.0, 2.0, 6.0)])
    assert curve is not None and curve.low is not None and curve.y.tolist() == [0.0, 3.0]
    assert curve.y[1] - curve.low[1] == pytest.approx(interval([1, 2, 6]))


def test_curve_over_tasks_against_the_known_answer() -> None:
    """Three runs of two tasks at three times, the example of rliable: IQM 0.05, 0.275, 0.65."""
    runs = [[[0, 0.2, 0.5], [0.1, 0.3, 0.3]], [[0, 0.4, 0.7], [0.2, 0.2, 0.6]], [[0.1, 0.1, 0.9], [0, 0.5, 0.8]]]
    x = np.array(runs)
    curve = suite_curve({str(j): [Line(np.array([1.0, 2.0, 3.0]), run[j]) for run in x] for j in range(2)})
    assert curve is not None and curve.low is not None and curve.high is not None
    assert curve.y == pytest.approx([0.05, 0.275, 0.65])
    assert curve.low == pytest.approx([0, 0.175, 0.45], abs=0.06) and curve.high == pytest.approx(
        [0.125, 0.4, 0.8], abs=0.06
    )


def test_a_band_is_the_interval_at_each_time() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 4))
    low, high = bootstrap_band(interquartile_mean, x, replicates=4000)
    for t in range(4):
        one = bootstrap_interval(interquartile_mean, x[..., t], replicates=4000)
        assert (low[t], high[t]) == pytest.approx((one.low, one.high), abs=0.08)
    with pytest.raises(UsageError, match="at least two runs"):
        bootstrap_band(interquartile_mean, x[:1])


def test_published_rows() -> None:
    assert len(published_scores()) == 926 and sum(map(len, published_seed_scores().values())) == 1000
    row, *_ = [one for one in published_for(["halfcheetah-medium-v2"]) if one.method == "BC"]
    assert (row.mean, row.spread, row.seeds, row.told()) == (42.40, 0.19, 4, "42.4 ± 0.19")
    assert not published_for(["halfcheetah-medium-v0"]) and not published_for(["pendulum-stitch-v0"])
    assert {one.statistic for one in published_for(["halfcheetah-medium-v2"], "best")} == {"best"}
    assert any(one.second_hand and one.told().endswith("†") for one in published_scores())


# -- folders -----------------------------------------------------------------------------------------------------------


def test_metrics_are_read_quickly_and_whole(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i / 2},{100 if i < 1000 else 200},\n" for i in range(10, 2010, 10))
    (tmp_path / "metrics.csv").write_text("step,train/loss,perf/updates_per_s,x\n" + rows + "2010,1")
    columns, (steps, seconds) = read_metrics(tmp_path / "metrics.csv")
    assert columns["train/loss"][1][-1] == 1000 and "x" not in columns and newest_step(tmp_path / "metrics.csv") == 2000
    assert steps[-1] == 2000 and seconds[-1] == pytest.approx(990 / 100 + 1010 / 200)
    (tmp_path / "metrics.csv").write_text("step,a\n" + "".join(f"{i},{i}\n" for i in range(3000)))
    assert len(read_metrics(tmp_path / "metrics.csv")[0]["a"][0]) == MOST_ROWS
    assert read_metrics(tmp_path / "none.csv")[0] == {} and newest_step(tmp_path / "none.csv") == 0


def test_updates_that_epochs_stand_for(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "a", planned=-1)
    assert read_run(folder).planned is None
    (folder / "versions.json").write_text('{"planned_updates": 50}')
    assert read_run(folder).planned == 50 and read_record(read_run(folder)).state == "interrupted"


@pytest.mark.parametrize("x", ["updates", "samples", "hours"])
def test_axes(tmp_path: Path, x: str) -> None:
    for seed in range(3):
        folder = made_run(tmp_path / "runs" / str(seed), seed=seed, batch_size=16)
        Table(folder / "metrics.csv").append({"step": 20, "perf/updates_per_s": 2.0})
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--x", x]) == 0
    rows = list(csv.DictReader(open(tmp_path / "out" / "tables" / "curves-score.csv")))  # noqa: SIM115
    assert [float(row[x]) for row in rows] == {
        "updates": [10, 20],
        "samples": [160, 320],
        "hours": [5 / 3600, 10 / 3600],
    }[x]


def test_bad_input(tmp_path: Path) -> None:
    made_run(tmp_path / "a")
    with pytest.raises(UsageError, match="no run here counts steps of an environment"):
        write_report([tmp_path / "a"], tmp_path / "out", x="steps")
    with pytest.raises(UsageError, match="expected one of updates, samples"):
        write_report([tmp_path / "a"], tmp_path / "out", x="epochs")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="which is a file"):
        write_report([tmp_path / "a"], tmp_path / "file")


# -- language and goals ------------------------------------------------------------------------------------------------


def test_preference_runs(tmp_path: Path) -> None:
    for method in ("DPO", "SimPO"):
        for seed in range(3):
            folder = made_run(tmp_path / "runs" / method / str(seed), method, "pairs", seed, (), planned=20)
            for step in (10, 20):
                row = {"rewards/accuracies": 0.6, "rewards/margins": 0.1 + seed, "loss": 0.7 - step / 100}
                row |= {"logps/chosen": -8.0 if method == "DPO" else -2.0, "logps/rejected": -9.0}
                row |= {"lengths/chosen": 4.0, "lengths/rejected": 3.0}
                Table(folder / "evals.csv").append({"step": step, **{f"eval/{k}": v for k, v in row.items()}})
    text, out = report(tmp_path / "runs")
    assert "log p of chosen, per token" in text and "Margins compare within a method alone" in text
    assert (out / "figures" / "preference-histograms.pdf").exists()
    assert "not known: nothing selected" not in text  # the loss on held-out pairs selects
    from offpolicy.report.language_section import per_answer

    dpo, simpo = (read_record(read_run(tmp_path / "runs" / method / "0")) for method in ("DPO", "SimPO"))
    for one in (dpo, simpo):
        assert per_answer(one, "chosen", "updates", per_token=True).y.tolist() == [-2.0, -2.0]
        assert per_answer(one, "chosen", "updates", per_token=False).y.tolist() == [-8.0, -8.0]


def test_margins_of_single_pairs(tmp_path: Path) -> None:
    """Kept by two of three seeds; rows that hold no number and what is not finite do not count."""
    for seed in range(3):
        folder = made_run(tmp_path / "runs" / str(seed), "DPO", "pairs", seed, (0.1,), "eval/rewards/margins")
        if seed:
            (folder / "margins.csv").write_text("step,row,margin\n10,0,0.5\n10,1,-1\n10,2,nan\n10,3,=x\n10,4")
    assert read_margins(folder).tolist() == [0.5, -1.0] and not len(read_margins(tmp_path))
    text, out = report(tmp_path / "runs")
    assert "Margins of single held-out pairs" in text and (out / "figures" / "pair-margins.pdf").exists()
    assert not (out / "figures" / "preference-histograms.pdf").exists()


def test_offline_evaluations_are_no_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of fitted Q evaluation and a file of the command: a section of their own, and no column of any table."""
    three(tmp_path / "runs", "BC", [10.0, 12.0, 14.0])
    folder = made_run(tmp_path / "runs" / "FQE", "FQE", "maze", 0, (-3.25, -2.5), "eval/value", runs=["a/b"])
    Table(folder / "evals.csv").append({"step": 30, "eval/value": -2.5, "eval/value_spread": 0.75, "eval/loss": 0.1})
    estimate = {"value": -7.5, "low": -9.0, "high": -6.0, "spread": 0.1, "effective": None, "doubt": HOSTILE}
    policies = [
        {
            "checkpoint": f"BC/{i}",
            "method": "BC",
            "step": 10,
            "score": score,
            "estimates": {"fqe": estimate | {"value": i}},
        }
        for i, score in enumerate((30.0, 20.0))
    ]
    chosen = [{"k": 1, "best": 20.0, "regret": 10.0, "sharpe": None}]
    ranking = {"policies": 2, "spearman": -1.0, "low": None, "high": None, "verdict": "Do not.", "chosen": chosen}
    budget = {"pulls": [1, 2], "mean": [20.0, 25.0], "low": [18, 22], "high": [22, 28], "policies": 2, "episodes": 5}
    content = {"format": 1, "data": "maze", "episodes": 100, "held_out": 20, "discount": 0.99, "policy": "mean",
               "seen": True, "unit": "score", "policies": policies, "rankings": {"fqe": ranking},
               "budget": budget}  # fmt: skip
    (tmp_path / "runs" / "ope.json").write_text(json.dumps(content))
    (tmp_path / "runs" / "BC").mkdir()
    for name, bad in (("a", "[" * 100_000), ("b", json.dumps(content | {"policies": 10**400}))):
        (tmp_path / "runs" / "BC" / name).mkdir()
        (tmp_path / "runs" / "BC" / name / "ope.json").write_text(bad)
    text, out = report(tmp_path / "runs")
    words = " ".join(" ".join(Reader(text).words).split())
    for wanted in ("-2.5", "0.75", "a/b", "20 held out of 100 episodes", "[-9, -6]", "fqe: Do not.",
                   "k = 1: best 20, regret 10", "Without an episode, fqe chooses a policy of 20.",
                   "What so many episodes in the environment buy",
                   "cannot be read", "is not as python -m offpolicy.ope writes it"):  # fmt: skip
        assert wanted in words, wanted
    assert HOSTILE not in text
    assert len(list((out / "figures").glob("budget-*.pdf"))) == 1
    assert "FQE" not in (out / "tables" / "score.csv").read_text() and not (out / "tables" / "value.csv").exists()
    from offpolicy.compare import main as compare

    assert compare([str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "1 run is of fitted Q evaluation, which is no method to compare" in shown and "12.0 ± 5.0" in shown


def test_runs_that_learn_from_own_answers(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "runs" / "a", "GRPO", "sums", 0, (0.5,), "eval/accuracy")
    Table(folder / "evals.csv").append({"step": 20, "eval/accuracy": 0.6, "eval/pass@8": 0.9})
    row = {"train/reward/own": 0.3, "train/entropy": 1.0, "train/ratio/ess": 0.9, "train/ratio/ess_lag2": 0.8}
    Table(folder / "metrics.csv").append({"step": 10, **row})
    text, _ = report(tmp_path / "runs")
    for words in ("pass@8", "reward of own answers", "entropy, nats per token", "effective sample size, lag 2"):
        assert words in text


def test_the_checkpoint_selected_without_an_environment(tmp_path: Path) -> None:
    """`selected.json` goes before the held-out loss; a choice that was not evaluated has no score."""
    rows = ({"step": 10, "eval/score": 3.0, "eval/loss": 0.1}, {"step": 20, "eval/score": 5.0, "eval/loss": 0.2})
    run = Run(tmp_path, "TD3BC", "maze", 0, {}, rows, 20, 20)
    assert selected(run, "eval/score") == 3.0
    for step, score in ((20, 5.0), (15, None)):
        (tmp_path / "selected.json").write_text(json.dumps({"step": step, "updates": 20}))
        assert selected(run, "eval/score") == score


def test_goals(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "runs" / "a", "OTA", "maze-navigate")
    Table(folder / "evals.csv").append(
        {"step": 30, "eval/score": 40.0, "eval/success_task1": 0.25, "eval/success_task2": 1.0}
    )
    text, _ = report(tmp_path / "runs")
    assert "goal 2" in text and "25.0" in text


# -- machine -----------------------------------------------------------------------------------------------------------


def test_the_report_imports_no_torch() -> None:
    code = "import sys, offpolicy.report.build, offpolicy.report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_hundreds_of_runs_in_half_a_minute(tmp_path: Path) -> None:
    """200 runs: ten methods, four tasks, five seeds, 20 evaluations and 200 rows of metrics each."""
    rng = np.random.default_rng(0)
    rows = "".join(f"{i},{i / 7},{i / 3},300\n" for i in range(1, 201))
    for method in range(10):
        for task in range(4):
            for seed in range(5):
                folder = tmp_path / "runs" / f"{task}" / f"{method}" / f"{seed}"
                made_run(folder, f"M{method}", f"task{task}", seed, (1.0,), batch_size=256, planned=200)
                scores = "".join(f"{10 * i},{10 * method + rng.normal()}\n" for i in range(1, 21))
                (folder / "evals.csv").write_text("step,eval/score\n" + scores)
                (folder / "metrics.csv").write_text("step,train/critic_loss,train/q_mean,perf/updates_per_s\n" + rows)
    began = time.process_time()
    text, _ = report(tmp_path / "runs")
    assert time.process_time() - began < 24
    assert "200 runs (10 methods × 4 tasks × 5 seeds): 200 finished." in text and len(text) < 2e6


@pytest.mark.slow
@pytest.mark.skipif(CHROME is None, reason="no Chromium is installed here, so the page is not looked at in one")
def test_in_a_browser(suite: tuple[str, Path], tmp_path: Path) -> None:
    """The script runs (heads become buttons, a column is sorted), nothing overflows a phone, both schemes differ."""
    text, _ = suite
    probe = """<script>
    const button = document.querySelectorAll("#table-score thead button")[1]; button.click(); button.click();
    const first = document.querySelector("#table-score tbody tr").cells[1].textContent;
    const wide = document.documentElement.scrollWidth > window.innerWidth;
    document.title = JSON.stringify({first, wide, contents: document.querySelectorAll("nav a").length,
      dark: getComputedStyle(document.body).backgroundColor, drawn: document.querySelectorAll("figure svg").length});
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", probe + "</body>"))
    found = []
    for scheme in ("1", "0"):  # light, dark
        command = [str(CHROME), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / scheme}"]
        command += [
            "--window-size=500,900",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--dump-dom",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
        assert title, done.stderr[-2000:]
        found.append(json.loads(title[1].replace("&quot;", '"')))
    light, dark = found
    assert light["contents"] >= 8 and light["drawn"] >= 4 and not light["wide"]
    assert light["first"].startswith("88.0")  # the largest number of the column: the optimality gap of BC
    assert light["dark"] != dark["dark"]


def test_the_switch_to_an_environment_is_on_the_page(tmp_path: Path) -> None:
    """Two runs that began to collect at update 1,000: means over seeds by hand; without them there is no section."""
    root = tmp_path / "runs"
    for seed, last in enumerate((60.0, 80.0)):
        folder = made_run(root / f"seed{seed}", "IQL", "maze", seed, (50.0, 40.0, last))
        measures = {"switch": 10, "at_switch": 50.0, "lowest": 40.0, "dip": 10.0, "mean": 45.0 + seed, "last": last}
        (folder / "online.json").write_text(json.dumps(measures))
    made_run(root / "offline", "BC", "maze", 0, (30.0,))
    (made_run(root / "odd", "CQL", "maze", 0, (30.0,)) / "online.json").write_text('{"switch": "never"}')
    text, out = report(root)
    assert "Offline to online" in text and "switch at update" in text
    (row,) = csv.DictReader((out / "tables/switch.csv").read_text().splitlines())
    assert row["method"] == "IQL" and int(row["switch"]) == 10 and int(row["seeds"]) == 2
    assert [float(row[name]) for name in ("at_switch", "dip", "mean", "last")] == [50.0, 10.0, 45.5, 70.0]
    runs = [read_record(read_run(root / f"seed{seed}")) for seed in (0, 1)]
    assert switch_place(runs, "updates") == 10.0
    assert switch_place([*runs, read_record(read_run(root / "offline"))], "updates") is None

    shutil.rmtree(out)
    for folder in root.iterdir():
        (folder / "online.json").unlink(missing_ok=True)
    text, out = report(root)
    assert "Offline to online" not in text and not (out / "tables/switch.csv").exists()
