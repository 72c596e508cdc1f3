"""Answers by vLLM in a process of its own: by vLLM itself, and by what stands in for it and fails when told to."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rl
import torch
import yaml
from forks import run_pair, start_copy
from tiny_rl import fit, method
from toy import differences, quiet, run_files
from vllm_engines import (
    PYTHON,
    context,
    engine_of,
    fake,
    largest_gap,
    model_of,
    needs_vllm,
    policy_of,
    requests,
    texts,
)

from offpolicy.data.texts.problems import ProblemData
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.language.rl import vllm_process
from offpolicy.language.rl.engine import ConcurrentEngine, Request, Sampling
from offpolicy.language.rl.engines import make_engine
from offpolicy.language.rl.vllm import VllmEngine, answer_seed
from offpolicy.training.lightning_private import FullySharded
from offpolicy.training.run_folder import RunFolder
from offpolicy.trust import names_in, trusting

HOW = Sampling(stop=(2, 5, 6), max_new_tokens=7, temperature=0.7, seed=3, iteration=4)
FOLDERS = vllm_process.MEMORY


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=needs_vllm)])
def drawing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """An engine, and the model whose weights it has: the head is tied."""
    folder, patch = tmp_path_factory.mktemp("vllm"), pytest.MonkeyPatch()
    model = model_of(folder, tie_word_embeddings=True)
    engine = engine_of(model, folder / "run", PYTHON if request.param == "vllm" else fake(folder, patch))
    engine.sync(model, 1)
    yield engine, model
    engine.close()
    patch.undo()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes engines around what stands in for vLLM, which fails as told; all are ended."""
    made = []

    def make(fault: str = "", times: int = 1, **options: Any) -> tuple[VllmEngine, Any]:
        model = model_of(tmp_path)
        engine = engine_of(model, tmp_path / "run", fake(tmp_path, monkeypatch, fault, times), **options)
        made.append(engine)
        return engine, model

    yield make
    for engine in made:
        engine.close()


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_log_probabilities_are_the_trainers(drawing: Any, temperature: float) -> None:
    engine, model = drawing
    short = Request(np.array([7, 8, 9]), 99, 3, room=2)
    asked, how = [*requests(8, 4), short], replace(HOW, max_new_tokens=16, temperature=temperature)
    found = engine.generate(asked, how)
    assert [len(some) for some in found] == [4] * 8 + [3] and all(len(answer.token) <= 2 for answer in found[-1])
    assert largest_gap(model, asked, found, temperature) < 1e-4


def test_new_weights_arrive_whole(drawing: Any) -> None:
    """The tied head included; the old weights are far from the new ones' answers."""
    engine, model = drawing
    before = {name: p.clone() for name, p in model.named_parameters()}
    asked = requests()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    engine.sync(model, 1)  # the number only names weights: these are copied too
    found = engine.generate(asked, HOW)
    assert largest_gap(model, asked, found, 0.7) < 1e-4
    model.load_state_dict({**model.state_dict(), **before})
    assert largest_gap(model, asked, found, 0.7) > 1e-2
    engine.sync(model, 1)


def test_an_answer_depends_on_its_request_alone(drawing: Any) -> None:
    engine, _ = drawing
    many = requests(30, 2)
    together = texts(engine.generate(many, HOW))
    for i in (0, 7, 29):
        assert texts(engine.generate(many[i : i + 1], HOW))[0] == together[i]
    assert texts(engine.generate(many, replace(HOW, iteration=5))) != together
    assert texts(engine.generate(many, replace(HOW, seed=4))) != together


@pytest.mark.parametrize("drawing", [pytest.param("vllm", marks=needs_vllm)], indirect=True)
def test_cut_distributions(drawing: Any) -> None:
    """What vLLM reports under top-k and top-p is renormalised over the tokens it left."""
    engine, model = drawing

    def most(k: int) -> Any:
        return lambda logp: logp.masked_fill(logp < logp.topk(k).values[:, -1:], -torch.inf).log_softmax(-1)

    def share(p: float) -> Any:
        def cut(logp: torch.Tensor) -> torch.Tensor:
            ordered, place = logp.exp().sort(-1, descending=True)
            out = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, place, ordered.cumsum(-1) - ordered >= p)
            return logp.masked_fill(out, -torch.inf).log_softmax(-1)

        return cut

    for how, cut in ((replace(HOW, top_k=5), most(5)), (replace(HOW, top_p=0.8), share(0.8))):
        found = engine.generate(requests(8, 4), how)
        assert largest_gap(model, requests(8, 4), found, 0.7, cut) < 1e-4
        assert largest_gap(model, requests(8, 4), found, 0.7) > 1e-2


@pytest.mark.parametrize("temperature", [0.7])
def test_tokens_come_as_often_as_the_policy_says(drawing: Any, temperature: float) -> None:
    """2,000 answers of one token: χ² over the tokens that are expected ten times, with p above 1e-3."""
    engine, model = drawing
    prompt, count = np.array([5, 9, 12]), 2000
    found = engine.generate([Request(prompt, 0, count)], replace(HOW, max_new_tokens=1, temperature=temperature))
    with torch.no_grad():
        p = (model(torch.from_numpy(prompt)[None]).logits[0, -1].double() / temperature).softmax(-1).numpy()
    seen = np.bincount([int(a.token[0]) for a in found[0]], minlength=len(p))
    often = p * count >= 10
    observed = np.append(seen[often], seen[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * count
    freedom = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))  # Wilson-Hilferty
    assert abs(z) < 3.1


def test_no_two_answers_share_a_seed() -> None:
    places = [(s, i, n, k) for s in range(3) for i in range(3) for n in range(12) for k in range(9)]
    seeds = {answer_seed(replace(HOW, seed=s, iteration=i), n, k) for s, i, n, k in places}
    assert len(seeds) == len(places) and min(seeds) >= 0 and max(seeds) < 2**63


def test_stop_ids_alone_end_an_answer(drawing: Any) -> None:
    engine, model = drawing
    own_end = model.config.eos_token_id  # 2
    found = [a for some in engine.generate(requests(20, 4), replace(HOW, stop=(5, 6, 7, 8))) for a in some]
    assert {a.ended for a in found} == {True, False}
    for answer in found:
        assert 1 <= len(answer.token) <= 7 and answer.ended == (answer.token[-1] in (5, 6, 7, 8))
        assert not set(answer.token[:-1]) & {5, 6, 7, 8} and (answer.ended or len(answer.token) == 7)
    assert any(own_end in a.token[:-1] for a in found)


def test_tickets(drawing: Any) -> None:
    """Several may be open, in any order of collection; what is asked of old weights is answered by them."""
    engine, model = drawing
    assert isinstance(engine, ConcurrentEngine)
    asked = requests(6, 2)
    expected = texts(engine.generate(asked, HOW))
    engine.submit(1, asked, HOW)
    engine.submit(2, asked[3:], HOW)
    engine.submit(3, [Request(asked[0].prompt, 0, 0)], HOW)
    assert texts(engine.generate(asked[:2], HOW)) == expected[:2]
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    engine.sync(model, 2)
    assert texts(engine.collect(2)) == expected[3:] and engine.collect(3) == [[]]
    assert texts(engine.collect(1)) == expected
    assert texts(engine.generate(asked, HOW)) != expected
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    engine.sync(model, 3)
    with pytest.raises(KeyError):
        engine.collect(1)


def test_requests_that_vllm_would_not_survive_are_refused(drawing: Any) -> None:
    engine, _ = drawing
    one = Request(np.array([4, 64]), 0, 1)
    with pytest.raises(UsageError, match="has the token 64; expected ids below the 64"):
        engine.generate([one], HOW)
    with pytest.raises(UsageError, match=r"has 13 tokens and asks for 20 more; expected 32 at most"):
        engine.generate([Request(np.full(13, 4), 0, 1)], replace(HOW, max_new_tokens=20))
    for temperature in (2.5, 0.005):
        with pytest.raises(UsageError, match=r"expected 0.01 to 2.0 for vLLM"):
            engine.generate(requests(), replace(HOW, temperature=temperature))
    assert engine.generate(requests(), HOW)


def test_the_host_is_untouched(tmp_path: Path, stand_in: Any) -> None:
    model_of(tmp_path)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    threads = torch.get_num_threads()
    engine, model = stand_in()
    engine.sync(model, 1)
    engine.generate(requests(), HOW)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert np.random.rand() == expected[2]


# -- faults ------------------------------------------------------------------------------------------------------------


def folders() -> set[Path]:
    """Private folders of this process."""
    return set(FOLDERS.glob(f"*{vllm_process.FOLDER}{os.getpid()}-*"))


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing is left in memory, beside what was there."""
    before = folders()
    yield
    assert folders() <= before


@pytest.mark.parametrize("fault", ["die", "hang", "load"])
def test_a_fault_costs_time_alone(fault: str, stand_in: Any) -> None:
    engine, model = stand_in(fault, timeout=2.0)
    with pytest.warns(UserWarning, match=r"started again: .*(SIGKILL|no sign of life for 2 seconds|wrong shape)"):
        engine.sync(model, 1)
        found = engine.generate(requests(), HOW)
    assert engine.restarts == 1 and engine.facts()["engine/restarts"] == 1.0
    calm, _ = stand_in()
    calm.sync(model, 1)
    assert texts(found) == texts(calm.generate(requests(), HOW))


def test_what_was_asked_of_older_weights_is_drawn_again_by_them(stand_in: Any) -> None:
    engine, model = stand_in()
    engine.sync(model, 1)
    expected = texts(engine.generate(requests(), HOW))
    engine.submit(1, requests(), HOW)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    engine.sync(model, 2)
    engine._living().process.kill()
    engine._tickets[1].found.clear()
    with pytest.warns(UserWarning, match="started again"):
        assert texts(engine.collect(1)) == expected
    assert largest_gap(model, requests(), engine.generate(requests(), HOW), 0.7) < 1e-4


def test_a_second_fault_ends_the_run(clean: None, stand_in: Any) -> None:
    engine, model = stand_in("die", times=9)
    engine.sync(model, 1)
    with pytest.warns(UserWarning), pytest.raises(UsageError, match=r"failed 2 times in a row.*SIGKILL"):
        engine.generate(requests(), HOW)


@pytest.mark.parametrize("ended", [False, True])
def test_a_model_that_vllm_does_not_know(ended: bool, stand_in: Any, tmp_path: Path) -> None:
    """Its process may have ended before it is told anything, or while it is."""
    engine, model = stand_in("start")
    if ended:
        engine._living().process.wait(60)
    with pytest.raises(UsageError, match=r"(?s)cannot run .*not supported.*engine transformers.*engine.log"):
        engine.sync(model, 1)
    assert not engine._folder.path.exists() and "Odd" in (tmp_path / "run" / "engine.log").read_text()


def test_the_user_stops(stand_in: Any) -> None:
    engine, model = stand_in("slow")
    engine.sync(model, 1)
    asked, began = requests(9, 1), time.monotonic()
    found = engine.generate(asked, HOW, lambda: time.monotonic() - began > 2.5)
    assert time.monotonic() - began < 4 and 1 <= sum(map(len, found)) < 9
    assert not engine._tickets


def test_an_engine_that_nothing_is_asked_of_any_more(stand_in: Any, tmp_path: Path) -> None:
    engine, _ = stand_in()
    process = engine._living().process
    assert os.stat(engine._folder.path).st_mode & 0o777 == 0o700
    engine.close()
    engine.close()
    assert (
        process.poll() is not None
        and not engine._folder.path.exists()
        and not (tmp_path / "run" / "engine.log").exists()
    )
    with pytest.raises(UsageError, match="was closed"):
        engine.sync(model_of(tmp_path), 1)


def test_an_engine_that_nobody_has_any_more_is_ended(clean: None, tmp_path: Path, monkeypatch: Any) -> None:
    engine = engine_of(model_of(tmp_path), tmp_path / "run", fake(tmp_path, monkeypatch))
    process = engine._living().process
    del engine
    gc.collect()
    assert process.poll() is not None


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_no_process_outlives_a_trainer_that_is_killed(stand_in: Any, tmp_path: Path) -> None:
    stand_in()[0].close()

    def main() -> None:
        engine, model = stand_in("slow")
        engine.sync(model, 1)
        engine.submit(1, requests(), HOW)
        (tmp_path / "said").write_text(f"{engine._living().process.pid} {engine._folder.path} .")
        time.sleep(100)

    copy = start_copy(main)
    said = tmp_path / "said"
    while not (said.exists() and said.read_text().endswith(".")):
        assert not copy.ended(), copy.output
        time.sleep(0.05)
    child, folder, _ = said.read_text().split()
    os.kill(copy.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while not gone(int(child)):
        assert time.monotonic() < until
        time.sleep(0.05)
    while not copy.ended():
        time.sleep(0.05)
    stand_in()  # the next start removes what the killed one left, and one of another test may have done so by now
    assert not Path(folder).exists()


# -- what is refused before anything starts ----------------------------------------------------------------------------


def test_refusals(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tmp_path)
    here = context(model, tmp_path)
    python, began = fake(tmp_path, monkeypatch), time.monotonic()

    def refused(match: str, where: Any = here, **options: Any) -> None:
        with pytest.raises(UsageError, match=match):
            make_engine({"name": "vllm", "python": python, **options}, context=where).close()

    refused("cannot be run; expected an interpreter", python="/no/such/python")
    refused("expected 0.01 to 2.0", replace(here, temperature=2.5))
    refused("the longest prompt and answer have 132 tokens and the policy 128", replace(here, longest_answer=120))
    refused("takes no `device`.*Did you mean 'devices'", device=[1])
    refused("on which the log-probabilities of answers depend", options={"logprobs_mode": "raw_logprobs"})
    refused("`engine.dtype` is 'int8'", dtype="int8")
    refused("the policy has no adapter", adapter="keep")
    refused("without `engine.devices`", replace(here, device="cuda:0"), tensor_parallel=2)
    refused("has 1 cards; expected 1 for each process", replace(here, local_rank=1), devices=[0])
    (tmp_path / "narrow").mkdir()
    refused("the heads of the policy have 8 numbers", replace(here, model=tiny_model(tmp_path / "narrow")))
    with pytest.raises(UsageError, match=r"vllm is not installed.*pip install"):
        VllmEngine(here)
    (tmp_path / "old").mkdir()
    fake(tmp_path / "old", monkeypatch, version="0.27.1")
    refused("has vLLM 0.27.1; expected 0.28 or newer")
    monkeypatch.setenv("PYTHONPATH", "")
    refused("has no vllm")
    with trusting(in_file=True):
        with pytest.raises(UsageError, match="a file may name no program") as error:
            make_engine({"name": "vllm", "python": "engines/bin/python", "memory": 0.5}, context=here)
        refused("may only name what belongs", python=None, options={"worker_cls": "evil.Worker"})
    assert time.monotonic() - began < 20
    _, option = shlex.split(re.findall(r"add (--model.engine '.*') to", str(error.value))[0])
    with trusting(in_file=True, names=names_in(yaml.safe_load(option))):  # as the command line takes it
        refused("'engines/bin/python', which cannot be run", **yaml.safe_load(option))


def tiny_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_rl.make_policy(folder / "policy"), dtype=torch.float32)


def test_a_version_that_was_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = fake(tmp_path, monkeypatch, version="0.40.0")
    with pytest.warns(UserWarning, match=r"vLLM 0.40.0 was not tried, 0.32 is the newest"):
        engine_of(model_of(tmp_path), tmp_path / "run", python).close()


# -- runs --------------------------------------------------------------------------------------------------------------

STAND_IN_OR_VLLM = ["stand-in", pytest.param("vllm", marks=[*needs_vllm, pytest.mark.slow])]


def run(kind: str, tmp_path: Path, name: str, patch: pytest.MonkeyPatch, fault: str = "", **options: Any) -> Any:
    python = PYTHON if kind == "vllm" else fake(tmp_path, patch, fault)
    engine = {"name": "vllm", "python": python, **options.pop("engine", {})}
    return fit(method("GRPO", policy_of(tmp_path), engine=engine, **options), 4, tmp_path / name)


@pytest.mark.parametrize("kind", STAND_IN_OR_VLLM)
def test_a_run(kind: str, clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations and evaluations: metrics, the first screen, and the same numbers again."""
    done = run(kind, tmp_path, "run", monkeypatch)
    assert done.answering.engine.description == "vLLM 0.32.0 on cpu in float32"
    assert ("answers", "by vLLM 0.32.0 on cpu in float32") in done.answering.facts()
    files = run_files(tmp_path / "run", 4)
    row = files["metrics"][-1]
    assert float(row["train/engine/gap"]) < 1e-4 and float(row["train/engine/outside"]) == 0.0
    assert float(row["train/answers/aborted"]) == 0.0 and done.answering.engine.drawing_seconds > 0.0
    assert float(row["train/engine/gap_max"]) < 1e-3 and float(row["train/engine/restarts"]) == 0.0
    if kind != "vllm":  # its starts take long; two processes are compared with one below
        run(kind, tmp_path, "again", monkeypatch)
        assert not differences(files, run_files(tmp_path / "again", 4))


def test_a_run_whose_engine_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = run("stand-in", tmp_path, "calm", monkeypatch)
    with pytest.warns(UserWarning, match="started again"):
        hurt = run("stand-in", tmp_path, "hurt", monkeypatch, "die")
    assert hurt.generated == calm.generated
    for name, value in calm.model.state_dict().items():
        assert torch.equal(value, hurt.model.state_dict()[name]), name


def test_a_run_that_draws_ahead(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine draws while the policy trains; what a killed engine had begun is drawn again of the same weights."""
    calm = run("stand-in", tmp_path, "calm", monkeypatch, lag=1)
    assert isinstance(calm.answering.engine, ConcurrentEngine) and calm.ahead.concurrent
    with pytest.warns(UserWarning, match="started again"):
        hurt = run("stand-in", tmp_path, "hurt", monkeypatch, "die", lag=1)
    for name, value in calm.model.state_dict().items():
        assert torch.equal(value, hurt.model.state_dict()[name]), name
    assert int(run_files(tmp_path / "calm", 4)["metrics"][-1]["train/engine/version_lag"]) == 1


def test_a_lying_engine_stops_the_run(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"log-probabilities of 4 answers are 0.5 nats from the trainer's"):
        run("stand-in", tmp_path, "run", monkeypatch, "lie")


@pytest.mark.parametrize("kind", STAND_IN_OR_VLLM)
def test_lora(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe after every sync compares adapters and weights together."""
    pytest.importorskip("peft")
    done = run(kind, tmp_path, "run", monkeypatch, lora_rank=4, lr=0.1)
    assert done.answering.probed["engine/gap"] < 1e-4
    if kind == "vllm":  # the stand-in knows no adapters
        kept = run(kind, tmp_path, "kept", monkeypatch, lora_rank=4, lr=0.1, engine={"adapter": "keep"})
        assert "adapters beside the weights" in kept.answering.engine.description
        assert kept.answering.probed["engine/gap"] < 1e-4


@pytest.mark.parametrize("kind", STAND_IN_OR_VLLM)
def test_rounds_of_a_preference_method(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of DPO: vLLM answers with the weights of each round, and ends with the run."""
    engine = {"name": "vllm", "python": PYTHON if kind == "vllm" else fake(tmp_path, monkeypatch)}
    rounds: dict[str, Any] = {"rounds": 2, "answers": 4, "batch_size": 4, "max_new_tokens": 4}
    words: dict[str, Any] = {"rewards": ["tiny_rl.early_letters"], "engine": engine, "lr": 1e-2}
    module = tiny.method("DPO", policy_of(tmp_path), **rounds, **words)
    data = ProblemData.of(tiny_rl.toy_problems(6), tiny_rl.toy_problems(3, seed=1))
    module.bind_data(data)
    given = {"default_root_dir": str(tmp_path / "run"), "enable_checkpointing": True}
    quiet(50, [RunFolder(tmp_path / "run")], **given).fit(module, data)
    assert module.round.number == 2 and len(list((tmp_path / "run" / "rounds").iterdir())) == 2
    assert module.answering.probed["engine/gap"] < 1e-4  # after the last of the weights that it was given
    assert not module.answering.engine._held  # the process has ended


# -- two processes -----------------------------------------------------------------------------------------------------


def two(root: Path) -> None:
    """One of two processes, each with an engine of its own."""
    for kind in json.loads((root / "kinds").read_text()):
        engine = {"name": "vllm", "python": PYTHON if kind == "vllm" else sys.executable}
        strategy: Any = FullySharded() if kind == "sharded" else "ddp"
        options: dict[str, Any] = {"devices": 2, "strategy": strategy, "accelerator": "cpu"}
        module = fit(method("GRPO", root / "policy", engine=engine), 4, root / kind, **options)
        module.answering.close()
    (root / f"rank{module.global_rank}.json").write_text(json.dumps({"eval": module.eval_row}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stand-in", "sharded", pytest.param("vllm", marks=needs_vllm)])
def test_two_processes_with_an_engine_each_equal_one(
    kind: str, clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts get the same answers; one of the two writes the weights for both, of which FSDP2 cuts each."""
    (tmp_path / "kinds").write_text(json.dumps([kind]))
    run(kind, tmp_path, "one", monkeypatch)
    run_pair(two, tmp_path)
    if kind == "sharded":
        expected, rows = (Table(tmp_path / name / "metrics.csv").rows() for name in ("one", kind))
        for found, one_row in zip(rows, expected, strict=True):
            assert float(found["train/loss"]) == pytest.approx(float(one_row["train/loss"]), rel=1e-3, abs=1e-6)
            assert found["train/answers/length"] == one_row["train/answers/length"]
            assert float(found["train/engine/gap"]) < 1e-4
        return
    one, both = run_files(tmp_path / "one", 4), run_files(tmp_path / kind, 4)
    for expected, found in zip(one["metrics"], both["metrics"], strict=True):
        for name in ("train/reward/own", "train/answers/length", "train/loss"):
            assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4, abs=1e-6), name
    assert one["evals"][-1]["eval/accuracy"] == both["evals"][-1]["eval/accuracy"]
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, rtol=0, atol=1e-5)
