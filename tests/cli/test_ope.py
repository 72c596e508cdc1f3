"""The command that scores policies without an environment: its table, its file, its doubts and its refusals."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import toy

from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.ope import COLUMNS, Scored, checkpoints, doubt, lines, main
from offpolicy.training.ranked import method_lines

FAST = ["--updates", "10", "--critics", "2", "--hidden_dims", "8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data on disk, and two runs on them: one with evaluations of two updates, one of another method."""
    root = tmp_path_factory.mktemp("ope")
    toy.toy_replay().save(root / "data")
    for name in ("BC", "IQL", "HIQL"):
        toy.fit(toy.method(name), toy.toy_replay(), 90, folder=root / name)
    return root


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "ope.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_policies_are_scored_and_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(place / "BC"), str(place / "IQL"), "--data", str(place / "data"), *FAST]) == 0
    text = capsys.readouterr().out
    assert "they rank, and are no scores" in text and "2 policies with a score of an environment" in text
    assert "too few updates for this discount: 60,000 or more" in text
    for name in ("BC", "IQL"):
        (row,) = rows_of(place / name)
        assert tuple(row) == COLUMNS and row["checkpoint"] == "step=00000090.ckpt" and row["step"] == "90"
        assert math.isfinite(float(row["value"])) and row["estimator"] == "fqe" and row["updates"] == "10"
        assert f"{float(row['value']):.5g}" in text
        assert "nearly the same policy" not in text
        score = Table(place / name / "evals.csv").rows()[-1]["eval/return_mean"]
        assert f"{score:.4g}" in text


def test_other_programs_read_what_was_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two policies with episodes of their own: a budget curve; weights only of the stochastic one."""
    for name, returns in (("BC", [1.0, 2.0, 3.0]), ("IQL", [5.0, 6.0])):
        kept = {"checkpoint": "step=00000090.ckpt", "updates": 90, "returns": returns}
        (place / name / "evaluation-step00000090-seed9-episodes3.json").write_text(json.dumps(kept))
    asked = ["--estimators", "fqe,wis", "--k", "2", "--out", str(place / "found")]
    assert main([str(place / "BC"), str(place / "IQL"), "--data", str(place / "data"), *FAST, *asked]) == 0
    text = capsys.readouterr().out
    assert "BC is deterministic" in text and "the behaviour is estimated" in text and "of all 30 episodes" in text
    assert "weighted importance sampling:" in text and "regret@2 0; SharpeRatio@2" in text
    found = json.loads((place / "found" / "ope.json").read_text())
    assert found["unit"] == "return" and found["behaviour"]["likelihood"] > -5 and found["seen"]
    first, second = found["policies"]
    assert (first["method"], first["score"], second["score"]) == ("BC", 2.0, 5.5)
    assert second["episode_scores"] == [5.0, 6.0] and second["estimates"]["wis"]["effective"] > 0
    assert list(first["estimates"]) == ["fqe"] and first["estimates"]["fqe"]["low"] is None
    assert (place / "found" / first["checkpoint"]).resolve().exists()
    assert found["budget"]["policies"] == 2 and found["budget"]["mean"][-1] == 5.5  # both episodes of the better one
    assert found["rankings"]["fqe"]["chosen"][0]["k"] == 2 and "order" in found["rankings"]["wis"]["verdict"]
    assert {row["estimator"] for row in rows_of(place / "IQL")} == {"fqe", "wis"}
    for name in ("BC", "IQL"):
        (place / name / "evaluation-step00000090-seed9-episodes3.json").unlink()


def test_a_value_is_that_of_fqe(place: Path) -> None:
    import offpolicy as op
    from lightning_modules.fqe import FQE

    main([str(place / "BC"), "--data", str(place / "data"), "--discount", "0.9", *FAST])
    data = op.load_data(str(place / "data"))
    same = FQE.of([op.load(place / "BC")], discount=0.9, num_critics=2, hidden_dims=(8,)).prepare(data, 0)
    same.run_block(0, 10)
    assert float(rows_of(place / "BC")[0]["value"]) == pytest.approx(float(same.start_values().mean()), rel=1e-6)


def test_all_checkpoints_of_one_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(place / "BC"), "--which", "all", "--data", str(place / "data"), *FAST])
    found = rows_of(place / "BC")
    assert [row["step"] for row in found] == [str(int(p.stem[5:])) for p in checkpoints(str(place / "BC"), "all")]
    assert len(found) > 1 and "nearly the same policy" in capsys.readouterr().out


def test_it_says_whether_policies_have_seen_the_episodes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.toy_replay(seed=5).save(place / "others")
    for data, seen in (("data", True), ("others", False)):
        main([str(place / "BC"), "--data", str(place / data), *FAST])
        assert ("were trained on these episodes" in capsys.readouterr().out) == seen


def scored(value: float = 1.0, drift: float = 0.0, true: float | None = None, name: str = "a") -> Scored:
    return Scored(Path(name) / "checkpoints" / "step=00000001.ckpt", 1, value, 0.1, drift, true)


def test_doubts() -> None:
    """3 / (1 - γ) rewards back, of which an update passes tau: 3 / (0.1·0.005) = 6,000 updates."""
    assert doubt(scored(), 10.0, 0.9, 6_000, 0.005) == ""
    assert doubt(scored(), 10.0, 0.9, 5_999, 0.005) == "too few updates for this discount: 6,000 or more"
    assert doubt(scored(drift=0.6), 10.0, 0.9, 6_000, 0.005).startswith("did not settle: moved by 0.6")
    assert doubt(scored(math.nan), 10.0, 0.9, 6_000, 0.005) == "not finite"


def test_the_table_has_the_best_value_first_and_says_what_it_cannot_tell() -> None:
    found = [scored(1.0, true=30.0, name="a"), scored(3.0, true=10.0, name="b"), scored(math.nan, name="c")]
    text = lines(found, ["", "", "not finite"])
    assert [line.split()[-1][0] for line in text[1:3]] == ["b", "a"] and "(not finite)" in text[3]
    assert "Spearman -1.00; regret@1 20; 2 policies" in text[4]
    assert "Fewer than two policies have a score" in lines([scored(true=1.0)], [""])[-1]
    assert "not defined" in lines([scored(1.0, true=1.0), scored(1.0, true=2.0, name="b")], ["", ""])[3]


def test_methods_are_compared() -> None:
    """Values 3, 1 of A with scores 20, 30 (order wrong: -1) and -5, -7 of B with 8, 6 (right: 1); all four: 0.8.

    Ranks of the scores 20, 30, 8, 6 in the order of the values: 3, 4, 2, 1 against 4, 3, 2, 1; 1 - 6·2/(4·15) = 0.8.
    """
    rows = [(3.0, 20.0, 0.1), (-5.0, 8.0, 0.4), (1.0, 30.0, 0.3), (-7.0, 6.0, 0.2)]
    found = [Scored(Path("r"), 1, value, true=score, outside=outside) for value, score, outside in rows]
    head, *text = method_lines(found, ["A", "B", "A", "B"])
    assert head.split()[:2] == ["method", "policies"]
    assert [line.split() for line in text] == [
        ["A", "2", "2", "(1,", "3)", "20%", "25", "-1.00", "-1.00"],
        ["B", "2", "-6", "(-7,", "-5)", "30%", "7", "1.00", "0.80"],
    ]
    bare = method_lines([one._replace(true=None, outside=float("nan")) for one in found], ["A", "B", "A", "B"])
    assert bare[1].split()[-4:] == ["–", "–", "–", "–"]
    assert not method_lines(found, ["A"] * 4) and not method_lines(found[:2], ["A", "B"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["HIQL", "--data", "data"], "HIQL acts by more than the observation"),
        (["BC", "--data", "data", "--policy", "sample"], "BC is deterministic"),
        (["BC"], "the data toy that BC was trained on cannot be opened.*Pass --data FILE"),
        (["BC", "--data", "data", "--updates", "1"], "--updates"),
        (["BC", "--data", "data", "--k", "0,2"], "whole numbers ≥ 1 with commas"),
        (["BC", "--data", "data", "--estimators", "wis"], "no density and it has no importance weights"),
        (["data", "--which", "all"], "has no checkpoints"),
        (["nothing"], "nothing"),
    ],
)
def test_refusals(place: Path, args: list[Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UsageError, match=words):
        main(args)
