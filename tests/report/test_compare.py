"""Tables over runs: what counts, what is left out and said, and numbers against hand and the statistics."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from made_runs import made_run, three

from offpolicy.compare import main
from offpolicy.errors import UsageError
from offpolicy.evaluation.scores import interval
from offpolicy.report.curves import line_of
from offpolicy.report.records import read_record
from offpolicy.report.runs import find_runs, read_run
from offpolicy.report.tables import aggregate_lines, as_text, compare_runs
from offpolicy.training.selection import selection_of


def test_a_table_by_hand(tmp_path: Path) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    three(tmp_path, "IQL", [50.0, 52.0, 54.0])
    three(tmp_path, "TD3BC", [49.0, 53.0, 57.0])
    (table,) = compare_runs(find_runs([tmp_path]))
    assert (table.measure, table.tasks, table.methods) == ("score", ["maze"], ["BC", "IQL", "TD3BC"])
    assert table.told(table.cells["maze", "BC"]) == f"12.0 ± {interval([10, 12, 14]):.1f} (3)"
    best = [method for method in table.methods if table.cells["maze", method].among_the_best]
    assert best == ["IQL", "TD3BC"]  # 53 and 52, far from 12
    (table,) = compare_runs(find_runs([tmp_path]), "best")
    assert table.told(table.cells["maze", "BC"]) == "90.0 ± 0.0 (3)*"


def test_settings_that_differ_make_methods_of_their_own(tmp_path: Path) -> None:
    three(tmp_path, "TD3BC", [1.0, 2.0, 3.0], alpha=2.5, tau=0.1)
    three(tmp_path, "TD3BC", [4.0, 5.0, 6.0], alpha=1.0, tau=0.1)
    (table,) = compare_runs(find_runs([tmp_path]))
    assert sorted(table.methods) == ["TD3BC alpha=1.0", "TD3BC alpha=2.5"]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    made_run(tmp_path / "short", seed=7, scores=(99.0,), planned=500)
    made_run(tmp_path / "silent", seed=8, scores=())
    newer = made_run(tmp_path / "again", seed=0, scores=(0.0, 20.0))
    os.utime(newer / "evals.csv", (2e9, 2e9))
    table, rest = compare_runs(find_runs([tmp_path]))
    assert table.cells["maze", "BC"].values == [20.0, 12.0, 14.0]
    text = "\n".join(table.notes + rest.notes)
    assert "1 run is not finished and left out" in text and "short" in text
    assert "older than another run of the same seed" in text and "without an evaluation" in text


def test_measures_have_tables_of_their_own_and_losses_are_better_below(tmp_path: Path) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    for seed, loss in enumerate([0.5, 0.52, 0.54]):
        made_run(tmp_path / f"s{seed}", "SFT", "chat", seed, (0.4, loss), "eval/loss")
        made_run(tmp_path / f"d{seed}", "DPO", "chat", seed, (0.4, loss + 1), "eval/loss")
    tables = {table.measure: table for table in compare_runs(find_runs([tmp_path]))}
    assert set(tables) == {"score", "loss"}
    cells = tables["loss"].cells
    assert cells["chat", "SFT"].among_the_best and not cells["chat", "DPO"].among_the_best
    assert tables["loss"].told(cells["chat", "SFT"]).startswith("0.520 ± ")


def test_few_seeds_show_values_and_no_interval(tmp_path: Path) -> None:
    three(tmp_path, "BC", [10.0, 12.0])
    (table,) = compare_runs(find_runs([tmp_path]))
    assert table.told(table.cells["maze", "BC"]) == "10.0, 12.0"
    assert any("fewer than 3 seeds" in note for note in table.notes)


def test_equals_share_the_star(tmp_path: Path) -> None:
    for method, scores in (("BC", [11.0, 14.0]), ("IQL", [14.0, 11.0]), ("TD3BC", [12.0, 12.9])):
        three(tmp_path, method, scores)
    (table,) = compare_runs(find_runs([tmp_path]))
    assert [table.told(table.cells["maze", m])[-1] for m in table.methods] == ["*", "*", "9"]


def test_tasks_that_no_method_has_all_of(tmp_path: Path) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0], "a")
    three(tmp_path, "IQL", [10.0, 12.0, 14.0], "b")
    (table,) = compare_runs(find_runs([tmp_path]))
    text = as_text(table, aggregate_lines(table, replicates=50))
    assert "IQM" not in text and "bootstrap" not in text
    assert "No method has two seeds on every task, so there are no aggregates over tasks." in table.notes


def test_aggregates_over_tasks(tmp_path: Path) -> None:
    for data, scores in (("a", [10.0, 20.0, 30.0]), ("b", [50.0, 60.0, 70.0]), ("c", [90.0, 90.0, 90.0])):
        three(tmp_path, "BC", scores, data)
    three(tmp_path, "IQL", [1.0, 2.0, 3.0], "a")
    (table,) = compare_runs(find_runs([tmp_path]))
    lines = dict(aggregate_lines(table, replicates=200))
    assert lines["mean"][0].startswith("56.7 [") and lines["median"][0].startswith("60.0 [")
    assert lines["optimality gap"][0].startswith("43.3 [") and lines["IQM"][1] == "–"
    assert "stratified bootstrap" in as_text(table, aggregate_lines(table, replicates=50))


def test_runs_that_are_not_alike(tmp_path: Path) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    made_run(tmp_path / "long", "IQL", scores=(1.0, 2.0, 3.0))
    (table,) = compare_runs(find_runs([tmp_path]))
    assert any("runs of 20 to 30 updates are compared" in note for note in table.notes)


def test_several_seeds_of_one_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        made_run(tmp_path / f"joint/seed{seed}", seed=seed)
    (tmp_path / "joint" / "seeds.json").write_text('{"0": "seed0", "1": "seed1"}')
    (tmp_path / "joint" / "config.yaml").write_text("model: {}")
    assert [run.seed for run in find_runs([tmp_path / "joint"])] == [0, 1]
    assert [run.seed for run in find_runs([tmp_path])] == [0, 1]


def test_places_outside_of_a_run_are_not_read(tmp_path: Path) -> None:
    made_run(tmp_path / "elsewhere" / "seed0")
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "seeds.json").write_text('{"0": "../elsewhere/seed0"}')
    with pytest.raises(UsageError, match="names no folder of a seed"):
        find_runs([tmp_path / "joint"])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    assert main([str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    assert "12.0 ± 5.0 (3)" in capsys.readouterr().out
    with open(tmp_path / "t.csv") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [10.0, 12.0, 14.0]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "found no folder"), ("", "holds no run"), ("- a\n", "not the settings of a run"), ("a: [", "not the")],
)
def test_bad_places(tmp_path: Path, content: str | None, words: str) -> None:
    place = tmp_path / "x"
    if content is not None:
        place.mkdir()
    if content:
        (place / "config.yaml").write_text(content)
    with pytest.raises(UsageError, match=words):
        find_runs([place])


def test_a_damaged_run_among_others_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_run(tmp_path / "a")
    made_run(tmp_path / "b", seed=1)
    (tmp_path / "b" / "config.yaml").write_text("model: 3")
    assert [run.seed for run in find_runs([tmp_path])] == [0]
    assert "It is left out." in caplog.text


@pytest.mark.parametrize("step", ["", "2nan", "nan", "1e999", "-3", "1" + "0" * 400])
def test_evaluations_without_an_update_are_left_out_and_said(
    step: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    table = next(tmp_path.rglob("evals.csv"))
    table.write_text(table.read_text().replace("\n10,", f"\n{step},"))
    records = [read_record(run) for run in find_runs([tmp_path])]
    assert sorted(len(line_of(one, "eval/score").x) for one in records) == [1, 2, 2]
    assert f"{table} has 1 of 2 rows whose `step` is no number" in caplog.text


def test_a_table_of_evaluations_without_the_column_of_updates(tmp_path: Path) -> None:
    table = made_run(tmp_path / "a") / "evals.csv"
    table.write_text(table.read_text().replace("step", "stop"))
    assert read_run(tmp_path / "a").rows == ()


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    assert read_run(made_run(tmp_path / "a", data="x\x1b[2Jy")).data == "x?[2Jy"


def test_nothing_to_compare(tmp_path: Path) -> None:
    made_run(tmp_path / "a", scores=())
    with pytest.raises(
        UsageError, match=r"finished with an evaluation.*without an environment are .* offpolicy\.ope RUN RUN"
    ):
        main([str(tmp_path)])


def test_pipes_and_folders_in_the_place_of_files(tmp_path: Path) -> None:
    """A pipe would be waited for without an end."""
    three(tmp_path, "BC", [10.0, 12.0, 14.0])
    folder = made_run(tmp_path / "odd", seed=7)
    for make in (os.mkfifo, os.mkdir):
        for name in ("evals.csv", "metrics.csv", "versions.json", "command.txt", "seeds.json", "selected.json"):
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
        record = read_record(read_run(folder))
        assert record.commands == () and record.run.rows == () and selection_of(folder) == {}
        assert find_runs([tmp_path])[-1].seed == 7
        for name in ("evals.csv", "metrics.csv", "versions.json", "command.txt", "seeds.json", "selected.json"):
            (folder / name).unlink() if make is os.mkfifo else (folder / name).rmdir()
