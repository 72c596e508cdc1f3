"""Preference methods that learn in rounds from the policy's own answers, and the pairs that a round makes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from forks import run_pair
from tiny_rl import early_letters, ends_early, toy_problems, write_problems
from toy import differences, quiet, run_files

from offpolicy.cli.arguments import read_command
from offpolicy.cli.parser import parse
from offpolicy.data.texts.module import TextData
from offpolicy.data.texts.problems import ProblemData
from offpolicy.data.texts.rollouts import make_store
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.pairing import Judge, pairs_by_judge, pairs_by_reward
from offpolicy.language.rl.round_options import DEFAULTS, check_round_options
from offpolicy.training.checkpoints import newest_checkpoint
from offpolicy.training.run_folder import RunFolder

SMALL: dict[str, Any] = {
    "rounds": 2,
    "answers": 4,
    "batch_size": 4,
    "max_new_tokens": 4,
    "rewards": ["tiny_rl.early_letters"],
    "engine": "tiny_rl.PlainEngine",
}


ASKED: list[str] = []  # what a judge was asked


def half(prompt: str, answer: str, other: str) -> float:
    return 0.5


def prefers_letters(prompt: str, answer: str, other: str) -> float:
    """A judge that is surer of answers with more early letters."""
    ASKED.append(answer)
    return 0.5 + 0.5 * (early_letters(prompt, answer, None) - early_letters(prompt, other, None))


def fails(prompt: str, answer: str, other: str) -> float:
    raise ValueError("no idea")


def fails_at_times(prompt: str, answer: str, other: str) -> float:
    """No judgement of every third pair."""
    ASKED.append(answer)
    if len(ASKED) % 3 == 0:
        raise ValueError("no idea")
    return 0.9


def takes_one(text: str) -> float:
    return 0.5


def scores_answers(prompt: str, answer: str, other: str) -> float:
    return 7.0


def same(prompt: str, answer: str, reference: str | None) -> float:
    return 1.0


def train(
    name: str,
    policy: Path,
    folder: Path | None = None,
    data: Any = None,
    steps: int = 50,
    ckpt_path: Path | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train in rounds, or on other data with the options that are left."""
    module = tiny.method(
        name, policy, **{**(SMALL if not isinstance(data, TextData) else {"batch_size": 4}), **options}
    )
    given: dict[str, Any] = dict(trainer or {})
    callbacks = []
    if folder is not None:
        given |= {"default_root_dir": str(folder), "enable_checkpointing": True}
        callbacks = [RunFolder(folder)]
    data = data or ProblemData.of(toy_problems(6), toy_problems(3, seed=1))
    module.bind_data(data)
    quiet(steps, callbacks, **given).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def fused(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with a tokenizer that puts no spaces between characters, so texts are the same tokens again."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    folder = tiny.make_policy(tmp_path_factory.mktemp("fused") / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_rounds_of_one_run_are_runs_of_one_round(fused: Path, tmp_path: Path) -> None:
    """Two rounds of INPO against training on the file of the first, then from there on the file of the second."""
    rows = [{"prompt": f"{a}{b}=", "answer": "x"} for a, b in zip("abcdef", "ghijkl")]
    problems = ProblemData(str(write_problems(tmp_path / "problems.jsonl", rows)), eval_fraction=0.0, show=0)
    whole = train("INPO", fused, tmp_path / "whole", problems, eta=0.2)
    assert whole.round.number == 2 and whole.global_step == whole.round.first_step + whole.round.steps
    policy, first = fused, {}
    for k in (1, 2):
        file = tmp_path / "whole" / "rounds" / f"round000{k}.jsonl"
        data = TextData(str(file), pair_strategy="independent", eval_fraction=0.0, show=0, max_length=64)
        one = train("INPO", policy, tmp_path / str(k), data, steps=-1, eta=0.2, **first)
        one.finish_files(tmp_path / str(k))
        policy, first = tmp_path / str(k) / "hf", {"reference": str(fused)}
        if k == 1:
            assert one.global_step == whole.round.first_step
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(one.model.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 6 and {len(row["completions"]) for row in rows} == {4}


@pytest.mark.parametrize(
    ("name", "options", "cuts"),
    [
        ("INPO", {"eta": 0.2}, (2, 3)),
        ("DPO", {"lora_rank": 2, "judge": "test_preference_rounds.prefers_letters"}, (3,)),
        ("DPA", {"rewards": ["tiny_rl.early_letters", "tiny_rl.ends_early"], "directions": 2, "prompts": 5}, (3,)),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on_from_the_middle_and_the_end_of_a_round(
    name: str, options: dict[str, Any], cuts: tuple[int, ...], policy: Path, tmp_path: Path
) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft")
    whole = train(name, policy, tmp_path / "whole", **options)
    last, boundary = whole.global_step, whole.round.first_step
    expected = run_files(tmp_path / "whole", last)
    for cut in (*cuts, boundary, last - 1):
        folder = tmp_path / f"cut{cut}"
        train(name, policy, folder, steps=cut, **options)
        asked = len(ASKED)
        resumed = train(name, policy, folder, ckpt_path=newest_checkpoint(folder), **options)
        assert cut < last - 1 or len(ASKED) == asked  # its pairs are those of the checkpoint, whatever it would say now
        found = run_files(folder, resumed.global_step)
        for part in ("state_dict", "optimizer_states", "global_step"):
            assert not differences(found[part], expected[part], part)
        assert not differences(found["evals"][-1], expected["evals"][-1])


LAST = 5


def main(root: Path) -> None:
    """Two processes train the same as one does."""
    torch.set_num_threads(1)
    logging.disable()
    module = train("INPO", root / "policy", root / "two", trainer={"devices": 2, "strategy": "ddp"}, **OF_PAIR)
    found = {"eval": module.eval_row, "steps": module.global_step}
    (root / f"rank{module.global_rank}.json").write_text(json.dumps(found))


OF_PAIR: dict[str, Any] = {"eta": 0.2, "judge": "test_preference_rounds.prefers_letters", "micro_batch_size": 1}


@pytest.mark.slow
@pytest.mark.xdist_group("rounds pair")
def test_two_processes_learn_what_one_does(policy: Path, tmp_path: Path) -> None:
    tiny.make_policy(tmp_path / "policy")
    found = run_pair(main, tmp_path)
    one = train("INPO", tmp_path / "policy", tmp_path / "one", **OF_PAIR)
    assert found[0]["steps"] == one.global_step
    files = [run_files(tmp_path / name, one.global_step) for name in ("one", "two")]
    for name, weight in files[0]["state_dict"].items():
        torch.testing.assert_close(files[1]["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    texts = [(tmp_path / name / "rounds" / "round0002.jsonl").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_the_reference_is_the_first_policy_in_every_round_or_that_of_the_round(policy: Path) -> None:
    """At the first step of the second round: `auto` scores as a frozen copy does, `round` as the policy itself."""
    found = {}
    for reference in ("auto", "live", "round"):
        module = train("DPO", policy, reference=reference, lr=1e-2, lr_schedule="constant", warmup_ratio=0.0)
        found[reference] = module
    for ours, theirs in zip(found["auto"].state_dict().values(), found["live"].state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert differences(*(dict(found[one].state_dict()) for one in ("auto", "round")))
    kept = {reference: module.workload()["reference"] for reference, module in found.items()}
    assert kept == {"auto": "float32", "live": "float32", "round": None}  # beside the policy


@pytest.mark.parametrize("name", ["SimPO", "CoPG"])
def test_other_methods_take_rounds(name: str, policy: Path) -> None:
    module = train(name, policy)
    assert module.round.number == 2 and np.isfinite(module.metric_row["train/loss"])
    assert {"eval/accuracy", "eval/pass@4"} <= module.eval_row.keys()


def answers_of(reward: list[list[float]], token: list[list[int]]) -> Any:
    """A store of one prompt after the other, each answer one token and its end."""
    flat = [one for group in token for one in group]
    size = len(token[0])
    episodes = {
        "prompt": np.repeat(np.arange(len(token)), size),
        "group": np.repeat(np.arange(len(token)), size),
        "reward": np.array(reward).reshape(-1),
    }
    return make_store([np.array([one, 2]) for one in flat], {}, episodes, np.uint8)


def test_pairs_by_reward() -> None:
    """Neighbours in the order of drawing, the better first; ties and equal answers make none."""
    store = answers_of([[0, 1, 2, 2], [3, 1, 0, 5], [1, 2, 1, 1]], [[5, 6, 7, 8], [5, 6, 7, 8], [9, 9, 5, 6]])
    chosen = pairs_by_reward(store, "independent")
    assert chosen.better.tolist() == [1, 4, 7] and chosen.worse.tolist() == [0, 5, 6]
    assert (chosen.tied, chosen.equal) == (2, 1) and chosen.agreement is None
    chosen = pairs_by_reward(store, "best_worst")
    assert chosen.better.tolist() == [2, 7, 9] and chosen.worse.tolist() == [0, 6, 11]


def test_pairs_by_a_judge() -> None:
    """Labels come up as often as the judge says; soft ones keep the probability; wins decide over best and worst."""
    prompts, p = 4000, 0.8
    store = answers_of([[0.0, 0.0]] * prompts, [[5, 6]] * prompts)

    def fixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.full(len(first), p)

    hard = pairs_by_judge(store, "independent", fixed, soft=False, seed=0, iteration=1)
    first = hard.better % 2 == 0
    assert abs(first.mean() - p) < 4 * (p * (1 - p) / prompts) ** 0.5
    np.testing.assert_allclose(hard.agreement[first], p)
    np.testing.assert_allclose(hard.agreement[~first], 1 - p)
    other = pairs_by_judge(store, "independent", fixed, soft=False, seed=0, iteration=2)
    assert (other.better != hard.better).any()
    soft = pairs_by_judge(store, "independent", lambda a, b: np.full(len(a), 0.3), soft=True, seed=0, iteration=1)
    assert (soft.better % 2 == 1).all() and np.allclose(soft.agreement, 0.7)
    table = np.array([[0.5, 0.9, 0.6], [0.1, 0.5, 0.8], [0.4, 0.2, 0.5]])  # wins 1.5, 0.9, 0.6
    three = answers_of([[0.0] * 3], [[5, 6, 7]])
    chosen = pairs_by_judge(three, "best_worst", lambda a, b: table[a, b], soft=False, seed=0, iteration=1)
    assert (chosen.better.item(), chosen.worse.item(), chosen.agreement.item()) == (0, 2, 0.6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 0, "answers": 4}, "`rounds` is 0"),
        ({"rounds": 0, "reference": "round"}, "`rounds` is 0"),
        ({"rounds": 1, "answers": 3}, "even number"),
        ({"rounds": 1, "pairing": "worst"}, "best_worst"),
        ({"rounds": 1, "engine": "replay"}, "RUN/rounds"),
        ({"rounds": -1}, "rounds"),
        ({"rounds": 1, "soft_labels": True}, "judge"),
    ],
)
def test_options_of_rounds_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiny.method("INPO", Path("tiny"), **options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("CoPG", {"pairing": "best_worst"}, "CoPG learns from all answers to a prompt"),
        ("DPA", {"pairing": "best_worst"}, "it to be left out"),
        ("DPA", {"judge": "test_preference_rounds.half"}, r"expected --model.rewards, or a method on pairs \(DPO"),
        ("SimPO", {"reference": "round"}, "SimPO has no reference"),
        ("DPA", {"reference": "round"}, "DPA has no reference"),
        ("DPO", {"reference": "round", "reference_weight": 0.0}, "DPO has no reference"),
    ],
)
def test_options_that_a_method_does_not_use_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiny.method(name, Path("tiny"), **{"rounds": 1, **options})


@pytest.mark.parametrize("name", ["CoPG", "DPA"])
def test_an_odd_number_of_answers_is_for_methods_without_pairs(name: str) -> None:
    assert tiny.method(name, Path("tiny"), rounds=1, answers=5).in_rounds


@pytest.mark.parametrize("reference", ["auto", "live", "round", "another"])
@pytest.mark.parametrize("uses_reference", [True, False])
def test_four_bits_with_an_adapter(reference: str, uses_reference: bool) -> None:
    """Refused where the policy's start is opened again."""
    options = {"quantize": "4bit", "adapter": "adapter", "reference": reference if uses_reference else "auto"}
    method = SimpleNamespace(hparams=options, makes="pairs", uses_reference=uses_reference)
    given = {**DEFAULTS, "rounds": 1}
    if uses_reference and reference in ("auto", "live"):
        with pytest.raises(UsageError, match=f"`reference` is '{reference}'.* would be opened without quantisation"):
            check_round_options(given, method)
    else:
        check_round_options(given, method)


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("nosuch", "`judge` is 'nosuch'; expected the import path"),
        ("exact", "`judge` is 'exact'; expected the import path"),
        ("nosuch.better", "`judge` is 'nosuch.better', but there is no module"),
        ("test_preference_rounds.takes_one", r"`judge` is .* expected `def takes_one\(prompt, answer, other\)`"),
    ],
)
def test_judges_that_are_none(judge: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Judge(judge, seconds=1.0)


def test_a_judge_that_fails() -> None:
    """A pair that it fails for is undecided, which is said and counted; one that always fails is refused."""
    ASKED.clear()
    judge = Judge("test_preference_rounds.fails_at_times", seconds=1.0)
    with pytest.warns(UserWarning, match=r"judge 'fails_at_times': ValueError: .* The pair counts as undecided"):
        found = judge.preferred(["q"] * 7, ["a"] * 7, ["b"] * 7)
    assert found.tolist() == [0.9, 0.9, 0.5, 0.9, 0.9, 0.5, 0.9] and judge.undecided == 2
    judge.preferred(["q"] * 4, ["a"] * 4, ["b"] * 4)
    assert judge.undecided == 1
    texts = [[str(i) for i in range(8)]] * 3
    with (
        pytest.warns(UserWarning, match="undecided"),
        pytest.raises(UsageError, match=r"the judge .* failed for every one of 8 pairs of answers.* --model.judge"),
    ):
        Judge("test_preference_rounds.fails", seconds=1.0).preferred(*texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:judge 'fails")
def test_failures_of_a_judge_in_a_run(policy: Path) -> None:
    """They are a metric; at the end one that never judged is refused, however few pairs there were."""
    ASKED.clear()
    module = train("DPO", policy, judge="test_preference_rounds.fails_at_times", rounds=1)
    assert len(ASKED) == 12 and module.round.facts["judge/problems"] == 4
    assert module.progress(module.global_step)["train/judge/problems"] == 4
    with pytest.raises(UsageError, match=r"the judge .* failed for every one of"):
        train("DPO", policy, judge="test_preference_rounds.fails", rounds=1, prompts=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewards": ["test_preference_rounds.same"]}, "no pair to learn from"),
        ({"judge": "test_preference_rounds.scores_answers"}, "returned 7"),
        ({"prompts": 7}, "6 problems"),
    ],
)
def test_rounds_that_cannot_be_are_refused(options: dict[str, Any], words: str, policy: Path) -> None:
    with pytest.raises((UsageError, DataError), match=words):
        train("INPO", policy, **options)


def test_a_judge_that_cannot_decide_leaves_pairs_to_chance(policy: Path) -> None:
    problems = [toy_problems(6), toy_problems(3, seed=1)]
    for one in problems:  # without right answers nothing can be measured
        one.tables["problems/answer"] = np.full(len(one.tables["problems"]), "")
    given = ProblemData.of(*problems)
    module = train("INPO", policy, None, given, judge="test_preference_rounds.half", rewards=None, rounds=1)
    assert not module.eval_row
    assert module.round.facts["pairs"] > 8 and module.round.facts["pairs/tied"] == 0


def test_the_command_reads_problems_where_there_are_rounds(policy: Path) -> None:
    def data(*more: str) -> Any:
        given = ["--model", "DPO", "--data", "addition", "--model.policy", str(policy), *more]
        return parse(read_command(given)).datamodule

    assert isinstance(data("--model.rounds", "1", "--data.template", "{prompt}"), ProblemData)
    assert isinstance(data("--model.rounds", "0"), TextData)
    with pytest.raises(UsageError, match="pair_strategy"):
        data("--model.rounds", "1", "--data.pair_strategy", "none")


def test_dpa_learns_from_the_best_answer_for_the_direction_that_its_prompt_states(policy: Path, tmp_path: Path) -> None:
    rewards = ["tiny_rl.early_letters", {"name": "tiny_rl.ends_early", "weight": 0.5}]
    module = train("DPA", policy, tmp_path, rewards=rewards, directions=3)
    problems, texts = module.problems, module._table.texts
    assert len(problems.tables["problems"]) == len(texts) == 18
    first, rows = (
        [json.loads(line) for line in (tmp_path / "rounds" / f"round000{k}.jsonl").read_text().splitlines()]
        for k in (1, 2)
    )
    said = [{tuple(row["direction"]) for row in some} for some in (first, rows)]
    assert not said[0] & said[1] and [len(one) for one in said] == [18, 18]  # drawn anew in each round
    kept = module.answering.texts([tiny_tokens(texts, i) for i in range(len(texts))])
    for row, answer in zip(rows, kept):
        scores = [[early_letters("", one, None), 0.5 * ends_early("", one, None)] for one in row["completions"]]
        np.testing.assert_allclose(row["scores"], scores, atol=1e-6)
        best = int(np.argmax(np.array(scores) @ row["direction"]))
        assert row["completions"][best].split() == answer.split()
        assert f"v e r b o s i t y   {round(100 * row['direction'][1])}".replace(" ", "") in row["prompt"].replace(
            " ", ""
        )


def tiny_tokens(texts: Any, row: int) -> np.ndarray:
    from offpolicy.data.texts.sequences import token_ids

    return token_ids(texts.replay, texts.index[row, 1])


def differ_at_first(prompt: str, answer: str, reference: str | None) -> float:
    """Rewards that differ among the first answers of a run alone."""
    ASKED.append(answer)
    return early_letters(prompt, answer, None) if len(ASKED) <= 24 else 0.0


def test_a_run_ends_where_later_rounds_teach_nothing(policy: Path, tmp_path: Path) -> None:
    """With its weights on disk; going on finds nothing to do, and further rounds are drawn if they are asked for."""
    ASKED.clear()
    options = {"rewards": ["test_preference_rounds.differ_at_first"], "rounds": 3}
    module = train("DPO", policy, tmp_path, **options)
    steps = module.global_step
    assert 0 < steps <= 3 and module.round.number == 3
    assert [row["step"] for row in run_files(tmp_path, steps)["evals"]] == [steps]  # which nobody knew to be the last
    asked = len(ASKED)
    again = train("DPO", policy, tmp_path, ckpt_path=newest_checkpoint(tmp_path), **options)
    assert again.global_step == steps and len(ASKED) == asked
    again = train("DPO", policy, tmp_path, ckpt_path=newest_checkpoint(tmp_path), **{**options, "rounds": 4})
    assert again.global_step == steps and again.round.number == 4 and len(ASKED) == asked + 24
