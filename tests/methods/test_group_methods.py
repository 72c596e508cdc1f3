"""Methods whose rows are several texts, as functions of scores and of data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import fit, method, toy_lists, toy_pairs, toy_prompt_pairs

from offpolicy.data.texts.conditioning import Revisions, SystemMessages
from offpolicy.data.texts.opening import open_texts
from offpolicy.data.texts.sequences import ScoredGroupView, token_ids
from offpolicy.data.texts.tokens import load_tokenizer
from offpolicy.errors import DataError, UsageError
from offpolicy.losses.groups import srpo_terms
from offpolicy.losses.scores import GroupScores
from offpolicy.registry import find_method


def make(name: str, **options: Any) -> Any:
    return find_method(name)(policy="tiny", **options)


def groups(seed: int = 0, size: int = 5, answers: int = 3) -> GroupScores:
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(2, 9, (size, answers), generator=g).double()
    length[0, -1] = 0
    there = length > 0
    sums = torch.where(there, -length * torch.rand(size, answers, generator=g, dtype=torch.float64), 0.0)
    ref = torch.where(there, sums + torch.randn(size, answers, generator=g, dtype=torch.float64), 0.0)
    score = torch.where(there, torch.randn(size, answers, generator=g, dtype=torch.float64), 0.0)
    return GroupScores(sums.requires_grad_(), length, ref, {"score": score})


def test_copg_against_the_formula() -> None:
    s = groups()
    loss, metrics = make("CoPG", beta=0.3).loss(s)
    value = s.facts["score"] - 0.3 * (s.sum_logps - s.ref_logps)
    for row, k in enumerate([2, 3, 3, 3, 3]):
        v = value[row, :k]
        torch.testing.assert_close(loss[row], ((v[:, None] - v) ** 2).sum() / (k * (k - 1)) / 0.6)
    assert all(one.shape == (5,) and not one.requires_grad for one in metrics.values())
    for keep in (slice(0, 1), slice(1, 5)):
        part = GroupScores(s.sum_logps[keep], s.length[keep], s.ref_logps[keep], {"score": s.facts["score"][keep]})
        torch.testing.assert_close(make("CoPG", beta=0.3).loss(part)[0], loss[keep])
    with pytest.raises(UsageError, match="k_minus_1"):
        make("CoPG", normalise="sum")


def test_scores_of_a_row_of_answers_are_those_of_its_texts(policy: Path) -> None:
    """Groups of two and three answers against every answer alone, with a reference kept and beside the policy."""
    replay = toy_lists(6)
    module, sft = (
        fit(method(name, policy, lr=0.0, batch_size=6), replay, max_steps=1, held_out=False) for name in ("CoPG", "SFT")
    )
    texts, rows = module._table.texts, np.arange(4)
    assert {2, 3} == set(np.bincount(replay.tables["singles/group"]).tolist())
    found = module.scores(module._table, rows, None)
    alone = sft.scores(sft._table, np.arange(len(sft._table.texts)), sft.step_means(sft._table, np.arange(3)))
    expected = iter(alone.answer.sum_logps.tolist())
    for row in range(4):
        for place in range(3):
            if texts.index[row, 2 * place] < 0:
                assert found.sum_logps[row, place] == found.length[row, place] == found.ref_logps[row, place] == 0
            else:
                assert found.sum_logps[row, place].item() == pytest.approx(next(expected), rel=1e-5)
    torch.testing.assert_close(found.sum_logps, found.ref_logps, rtol=1e-5, atol=1e-5)  # weights as at the start
    live = fit(method("CoPG", policy, reference="live"), replay, max_steps=2, held_out=False)
    kept = fit(method("CoPG", policy), replay, max_steps=2, held_out=False)
    for ours, theirs in zip(live.state_dict().values(), kept.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_data_of_copg(policy: Path, tmp_path: Path) -> None:
    """Lists as they are read, pairs with scores, and what is refused."""
    rows = [
        {"prompt": "1 + 1 = ", "completions": ["2", "3", "4"], "scores": [1.0, 0.5, 0.0]},
        {"prompt": "2 + 1 = ", "completions": ["3", "2"], "scores": [1, 0]},
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bound = ScoredGroupView().bind(open_texts(path, tokenizer=str(policy), pair_strategy="none"))
    assert bound.index.shape == (2, 6) and (bound.index[1, 4:] == -1).all() and (bound.index[0] >= 0).all()
    assert bound.facts["score"].tolist() == [[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]
    with pytest.raises(DataError, match=r"--data\.pair_strategy none"):
        ScoredGroupView().bind(open_texts(path, tokenizer=str(policy)))
    with pytest.raises(DataError, match="score_chosen"):
        ScoredGroupView().bind(toy_pairs())
    scores = {"score_chosen": np.arange(13.0), "score_rejected": np.zeros(13)}
    pairs = ScoredGroupView().bind(toy_pairs(**scores))
    assert pairs.facts["score"].shape == (13, 2) and (pairs.index == toy_pairs().tables["pairs"]).all()
    other = toy_prompt_pairs()
    other.tables.update({f"pairs/{name}": column for name, column in scores.items()})
    with pytest.raises(DataError, match="two prompts"):
        ScoredGroupView().bind(other)


def test_copg_learns_from_the_answers_of_anybody(policy: Path) -> None:
    """The order of scores is learned from lists that the policy did not write; the loss falls."""
    module = method("CoPG", policy, lr=1e-2, beta=0.05, batch_size=13, warmup_ratio=0.0, lr_schedule="constant")
    module.run.log_every = 1
    module = fit(module, max_steps=12, held_out=False)
    assert module.metric_row["train/rewards/accuracies"] > 0.8  # 0 in the first step, at its reference


def test_mapl_has_a_term_for_each_kind_of_pair() -> None:
    """ℓ of β times h0 − h1 for the first two kinds, of h0 − h2 − (h3 − h1) for the third, each with its weight."""
    s = groups(answers=4)
    kind, there = (
        torch.tensor([0, 1, 2, 2, 0]),
        torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], *[[1] * 4] * 2, [1, 1, 0, 0]]),
    )
    s = s._replace(
        sum_logps=(s.sum_logps.detach() * there).requires_grad_(),
        ref_logps=s.ref_logps * there,
        length=(s.length + 1) * there,
        facts={"kind": kind},
    )
    loss, metrics = make("MAPL", beta=0.3, intra_weight=2.0, inter_weight=0.5).loss(s)
    h = s.log_ratio
    margin = [h[i, 0] - h[i, 1] if kind[i] < 2 else h[i, 0] - h[i, 2] - h[i, 3] + h[i, 1] for i in range(5)]
    weight = torch.tensor([1.0, 2.0, 0.5, 0.5, 1.0]).double()
    torch.testing.assert_close(loss, -weight * torch.nn.functional.logsigmoid(0.3 * torch.stack(margin)))
    torch.testing.assert_close(metrics["rewards/margins"], 0.3 * torch.stack(margin).detach())
    assert metrics["rewards/accuracies_intra"].isfinite().tolist() == [False, True, False, False, False]
    two = make("MAPL").loss(GroupScores(s.sum_logps[:2, :2], s.length[:2, :2], s.ref_logps[:2, :2], {"kind": kind[:2]}))
    torch.testing.assert_close(two[0], -torch.nn.functional.logsigmoid(0.1 * (h[:2, 0] - h[:2, 1])))


def test_mapl_on_ordinary_pairs_is_dpo(policy: Path) -> None:
    """The same weights from the same pairs, though one scores them as texts and the other as pairs."""
    mapl, dpo = (
        fit(method(name, policy), toy_pairs(), max_steps=2, held_out=False, precision="64-true")
        for name in ("MAPL", "DPO")
    )
    for ours, theirs in zip(mapl.state_dict().values(), dpo.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_an_answer_to_two_prompts_is_a_pair(policy: Path, tmp_path: Path) -> None:
    """Read under either name of the columns; equal prompts with equal answers are still refused, cut ones too."""
    rows = [
        {"chosen_prompt": "say a: ", "rejected_prompt": "say b: ", "chosen": "a", "rejected": "a"},
        {"chosen_prompt": "say a: ", "rejected_prompt": "say a: ", "chosen": "a", "rejected": "b"},
        {"chosen_prompt": "say a: ", "rejected_prompt": "say b: ", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "pairs.jsonl"

    def bound(some: list[dict[str, str]], **options: Any) -> Any:
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        return make("MAPL").view.bind(open_texts(path, tokenizer=str(policy), **options))

    found = bound(rows)
    assert found.facts["kind"].tolist() == [1, 0, 2] and found.index.shape == (3, 8)
    a, b, c, d = found.index[2, :4]
    assert found.index[2].tolist() == [a, b, c, d, a, d, c, b] and (found.index[:2, 4:] == -1).all()
    same = {"chosen_prompt": "say a: ", "rejected_prompt": "say a: ", "chosen": "a", "rejected": "a"}
    with pytest.raises(DataError, match="two equal answers"):
        bound([*rows, same])
    with pytest.raises(DataError, match="equal after truncation"):
        bound([{**rows[0], "chosen_prompt": "a and then b", "rejected_prompt": "b and then b"}], max_length=6)
    with pytest.raises(DataError, match="two equal answers"):
        bound([{"prompt": "say a: ", "chosen": "a", "rejected": "a"}])


def test_srpo_against_its_terms() -> None:
    s = groups(answers=6)
    s = s._replace(length=s.length.clamp(min=2), facts={})
    ratio = s.log_ratio
    joint, over_bad, over_good = srpo_terms(*ratio.unbind(1), beta=0.1)
    torch.testing.assert_close(make("SRPO").loss(s)[0], 0.75 * joint + 0.25 * (over_bad + over_good))
    means = srpo_terms(*(ratio / s.length).unbind(1), beta=2.0)
    found, metrics = make("SRPO", beta=2.0, alpha=1.0, length_average=True).loss(s)
    torch.testing.assert_close(found, means[1] + means[2])
    assert all(one.shape == (5,) and not one.requires_grad for one in metrics.values())
    start = s._replace(ref_logps=s.sum_logps.detach())
    torch.testing.assert_close(make("SRPO", alpha=0.5).loss(start)[0], torch.full((5,), 0.375).double())


def test_six_texts_of_a_pair(policy: Path, tmp_path: Path) -> None:
    """Answers alone, and after an old one without its EOS and the request; two prompts are refused."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "say: ", "chosen": "yes", "rejected": "no"}) + "\n")
    replay = open_texts(path, tokenizer=str(policy))
    module = make("SRPO", template="better?")
    module._tokenizer = tokenizer = load_tokenizer(str(policy))
    bound = module.texts_of(replay)
    texts = [tokenizer.decode(token_ids(bound.replay, number)) for number in bound.index[0]]
    texts = [text.replace(" ", "") for text in texts]  # single characters, decoded with a space between
    yes, no = "<s>say<unk>yes<unk><unk>better?<unk>", "<s>say<unk>no<unk><unk>better?<unk>"
    prompt, good, bad = "<s>say<unk>", "yes</s>", "no</s>"
    assert texts == [prompt, good, prompt, bad, no, good, yes, bad, yes, good, no, bad]
    with pytest.raises(DataError, match="MAPL"):
        module.texts_of(toy_prompt_pairs())


@pytest.mark.parametrize(
    ("name", "more"), [("SRPO", {"template": "m" * 120}), ("DPA", {"message": "m" * 120 + "{weights}"})]
)
def test_texts_that_a_method_makes_have_room(policy: Path, tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """Where they have none, that is said of what the method makes, and a limit for the data is named."""
    row: dict[str, Any] = {"prompt": "say it", "chosen": "yes", "rejected": "no"}
    if name == "DPA":
        row = {"prompt": "say it", "completions": ["yes", "no"], "scores": [[1.0, 2.0], [2.0, 1.0]]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    replay = open_texts(path, tokenizer=str(policy), pair_strategy="none" if name == "DPA" else "best_vs_worst")
    with pytest.raises(DataError, match=f"text that {name} makes .*128 positions.*--data.max_length \\d+\\.$"):
        fit(method(name, policy, **more), replay, max_steps=1, held_out=False)


def test_a_request_in_a_chat_is_a_turn(policy: Path) -> None:
    tokenizer = load_tokenizer(str(policy))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}={{ m.content }}+{% endfor %}{% if add_generation_prompt %}a={% endif %}"
    )
    revise = Revisions(tokenizer, "better", chat=True)
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("u=say+a=", "yes+", "u=say+a=yes+u=better+a=")
    ]
    assert revise.prompt(*map(np.array, ids[:2])).tolist() == ids[2]
    put = SystemMessages(tokenizer, chat=True)
    told = tokenizer("s=be brief+u=say+a=", add_special_tokens=False)["input_ids"]
    assert put.put(np.array(ids[0]), "be brief").tolist() == told
    assert put.put(np.array(ids[0]), "be brief").tolist() == told  # from what is known now
    with pytest.raises(DataError, match="system message"):
        put.put(np.array(told), "be brief")


def test_prompts_of_dpa_state_a_direction_and_have_its_winner(policy: Path, tmp_path: Path) -> None:
    """Scores (correct, −length): with an angle of 0 the best by the first; the prompt has round(100·v) in it."""
    rows = [
        {"prompt": "1 + 1 = ", "completions": ["2", "it is 2", "3"], "scores": [[0.5, 1.0], [1.0, -1.0], [0.0, 1.0]]},
        {"prompt": "2 + 1 = ", "completions": ["3", "2"], "scores": [[1, 0], [0, 1]]},
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay = open_texts(path, tokenizer=str(policy), pair_strategy="none")
    assert replay.tables["singles/score"].shape == (5, 2)
    tokenizer = load_tokenizer(str(policy))

    def texts(**options: Any) -> tuple[Any, list[str]]:
        module = make("DPA", objectives=("right", "short"), message="{weights}", **options)
        module._tokenizer = tokenizer
        bound = module.texts_of(replay)
        found = [tokenizer.decode(token_ids(bound.replay, i)).replace(" ", "") for i in bound.index.reshape(-1)]
        return bound, found

    bound, found = texts(max_angle=0.0, directions=1)
    assert found == ["<s>right100<unk>short0<unk>1+1=", "itis2</s>", "<s>right100<unk>short0<unk>2+1=", "3</s>"]
    bound, found = texts(max_angle=180.0, directions=40)
    v = bound.facts["direction"]
    assert bound.index.shape == (80, 2) and len(np.unique(v[:, 0])) == 80
    np.testing.assert_allclose((v**2).sum(1), 1.0)
    scores = np.array([[0.5, 1.0], [1.0, -1.0], [0.0, 1.0]])
    for row in range(40):
        assert found[2 * row + 1] == ["2</s>", "itis2</s>", "3</s>"][int(np.argmax(scores @ v[row]))]
        assert f"right{'-' if v[row, 0] < 0 else ''}{abs(round(100 * v[row, 0]))}<" in found[2 * row]
    assert np.array_equal(texts(max_angle=180.0, directions=40)[0].facts["direction"], v)
    with pytest.raises(DataError, match=r"--data\.pair_strategy none"):
        open_texts(path, tokenizer=str(policy))
    with pytest.raises(DataError, match="one number"):
        make("CoPG").view.bind(replay)
    with pytest.raises(DataError, match="2 objectives and `objectives` has 3"):
        module = make("DPA", objectives=("a", "b", "c"))
        module._tokenizer = tokenizer
        module.texts_of(replay)
    with pytest.raises(UsageError, match="weights"):
        make("DPA", message="be good")


@pytest.mark.parametrize("told", ["judged by right 100, short 3", "<s> judged  by right 1"])
def test_dpa_puts_no_second_direction_before_a_prompt(policy: Path, tmp_path: Path, told: str) -> None:
    """The files of its own rounds state one; a message that begins with the weights cannot be told from a prompt."""
    path = tmp_path / "round0001.jsonl"
    path.write_text(json.dumps({"prompt": f"{told} 1 + 1 = ", "completions": ["2", "3"], "scores": [[1, 0], [0, 1]]}))
    replay = open_texts(path, tokenizer=str(policy), pair_strategy="none")
    for message, refused in (("judged by {weights}", True), ("asked for {weights}", False), ("{weights}", False)):
        module = make("DPA", objectives=("right", "short"), message=message)
        module._tokenizer = load_tokenizer(str(policy))
        if refused:
            with pytest.raises(DataError, match="would get a second direction"):
                module.texts_of(replay)
        else:
            assert len(module.texts_of(replay)) == 5


def test_a_policy_revises_its_answers(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is the answer without revisions; the revision goes on from prompt, draft and request."""
    from offpolicy.generate import main, revisions_of, run_behind
    from offpolicy.language.generation import Prompt, answer_prompts, sample, stop_ids
    from offpolicy.language.policy import open_model

    model, tokenizer = open_model(str(policy)), load_tokenizer(str(policy))
    revise, prompt = Revisions(tokenizer, "better", chat=False), np.array([1, 5, 6, 7])
    options: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 5, "seed": 3, "verifier": lambda p, a, r: len(a) / 8}
    plain, _ = answer_prompts(model, tokenizer, [Prompt(prompt, None)] * 2, **options)
    rows, numbers = answer_prompts(
        model, tokenizer, [Prompt(prompt, None)] * 2, revisions=1, revise=revise.prompt_after, **options
    )
    assert [row["drafts"] for row in rows] == [[row["completions"]] for row in plain]
    lengths = [len(answer) / 8 for row in plain for answer in row["completions"]]
    assert numbers["score_0"] == pytest.approx(np.mean(lengths)) and numbers["score"] != numbers["score_0"]
    stop = stop_ids(model, tokenizer)
    first = sample(model, [prompt] * 2, num_samples=2, max_new_tokens=5, seed=3, stop=stop)[0][0]
    asked = revise.prompt(prompt, first.token)
    assert tokenizer.decode(asked[-8:]).replace(" ", "") == "<unk>better<unk>"
    size = len(first.token) - first.ended
    assert asked[: 4 + size].tolist() == [*prompt, *first.token[:size]]
    monkeypatch.chdir(tmp_path)
    command = [str(policy), "--prompt", "say", "--num_samples", "1", "--max_new_tokens", "3", "--out", "out.jsonl"]
    assert main([*command, "--revisions", "2", "--revision_request", "again"]) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert len(row["drafts"]) == 2 and len(row["completions"]) == 1
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model:\n  class_path: SRPO\n  init_args:\n    template: shorter\n")
    assert run_behind(str(policy)) == policy.parent
    asked = argparse.Namespace(run=str(run / "checkpoints" / "a.ckpt"), revisions=1, revision_request=None)
    monkeypatch.setattr("offpolicy.training.checkpoints.resolve_checkpoint", Path)
    assert revisions_of(asked, {}, {}, tokenizer)[1] == "shorter"
    with pytest.raises(UsageError, match="--revisions 1"):
        main([*command, "--revision_request", "again"])


def test_independent_pairs_are_neighbours_in_the_list(policy: Path, tmp_path: Path) -> None:
    """First and second, third and fourth, the better one chosen; equal scores make none, a fifth is left over."""
    row = {"prompt": "say ", "completions": [*"abcdefg"], "scores": [0.0, 1.0, 0.9, 0.1, 0.5, 0.5, 2.0]}
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(row))
    replay = open_texts(path, tokenizer=str(policy), pair_strategy="independent")
    tokenizer = load_tokenizer(str(policy))
    found = [tokenizer.decode(token_ids(replay, i)[:1]) for i in replay.tables["pairs"][:, [1, 3]].reshape(-1)]
    assert found == [*"bacd"] and "2.0" not in str(replay.tables["pairs/score_chosen"])
