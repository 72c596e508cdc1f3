"""A policy as one file: it answers as the method does, needs no library, and leaves the method as it was."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT

import offpolicy
from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError
from offpolicy.export import main
from offpolicy.training.deploy import deploy


def made(name: str, replay: Replay, **options):
    cls = getattr(offpolicy, name)
    widths = {key: (8, 8) for key in inspect.signature(cls).parameters if key.endswith("hidden_dims")}
    method = cls(**widths | options).initialize(Sizes.of(replay), 0)
    generator = torch.Generator().manual_seed(1)
    for buffer in ("obs_center", "action_center"):
        value = getattr(method.normalizer, buffer)
        value.copy_(torch.randn(value.shape, generator=generator))
    method.normalizer.obs_scale.fill_(0.25)
    method.normalizer.action_scale.fill_(0.5)
    return method


def states(method, n: int) -> np.ndarray:
    return 4 * np.random.default_rng(0).standard_normal((n, method.sizes.obs_dim)).astype("f4")


@pytest.mark.parametrize("name", ["BC", "TD3BC", "IQL", "EDAC", "A2PR", "ODICE"])
def test_pt2_answers_as_act(name: str, replay: Replay, tmp_path: Path) -> None:
    method = made(name, replay)
    assert deploy(method, tmp_path / "p.pt2") < 1e-6
    module = torch.export.load(tmp_path / "p.pt2").module()
    for n in (1, 7):
        obs = states(method, n)
        assert module(torch.from_numpy(obs)).numpy() == pytest.approx(method.act(obs), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TD3BC", "HIQL"])
def test_onnx_answers_as_act(name: str, replay: Replay, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    method = made(name, replay, **({} if name == "TD3BC" else {"batch_size": 8}))
    assert deploy(method, tmp_path / "p.onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "p.onnx"))
    for n in (1, 7):
        obs, goal = states(method, n), states(method, n)[::-1].copy()
        feed = {"obs": obs} if name == "TD3BC" else {"obs": obs, "goal": goal}
        expected = method.act(obs) if name == "TD3BC" else method.act_goal(obs, goal)
        assert session.run(None, feed)[0] == pytest.approx(expected, abs=1e-5)


def test_the_file_needs_nothing_of_this_library_and_holds_the_policy_alone(replay: Replay, tmp_path: Path) -> None:
    method = made("EDAC", replay, num_critics=500)
    deploy(method, tmp_path / "p.pt2")
    critics = sum(p.numel() for name, p in method.named_parameters() if "critic" in name)
    assert (tmp_path / "p.pt2").stat().st_size < 4 * critics
    obs = states(method, 3)
    code = f"""
import sys, torch
obs = torch.tensor({obs.tolist()})
print(torch.export.load({str(tmp_path / "p.pt2")!r}).module()(obs).tolist())
assert not [name for name in sys.modules if name.split(".")[0] in ("offpolicy", "lightning_modules", "lightning")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array(eval(done.stdout)) == pytest.approx(method.act(obs), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_method_stays_as_it_was(dtype: torch.dtype, replay: Replay, tmp_path: Path) -> None:
    method = made("TD3BC", replay).to(dtype).train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    deploy(method, tmp_path / "p.pt2")
    after = method.state_dict()
    assert method.training and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in method.actor.parameters())
    assert method.dtype_of_weights == dtype


def test_command(replay: Replay, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = made("TD3BC", replay)
    method.save(tmp_path / "policy.ckpt")
    assert main([str(tmp_path / "policy.ckpt"), str(tmp_path / "p.pt2")]) == 0
    told = capsys.readouterr().out
    assert "actions differ by at most" in told and "torch.export.load(" in told
    with pytest.raises(UsageError, match="exists already"):
        main([str(tmp_path / "policy.ckpt"), str(tmp_path / "p.pt2")])


def test_refusals(replay: Replay, tmp_path: Path) -> None:
    sizes = Sizes.of(replay)
    sequence = offpolicy.DecisionTransformer().initialize(sizes, 0)
    with pytest.raises(UsageError, match="acts by more than the observation at hand"):
        deploy(sequence, tmp_path / "p.pt2")
    several = offpolicy.TD3BC(hidden_dims=(8, 8))
    several.seeds = (0, 1)
    with pytest.raises(UsageError, match="holds the seeds"):
        deploy(several.initialize(sizes), tmp_path / "p.pt2")
    with pytest.raises(UsageError, match=r"ending in .onnx or .pt2"):
        deploy(made("BC", replay), tmp_path / "p.bin")
    with pytest.raises(UsageError, match="no networks yet"):
        deploy(offpolicy.BC(), tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_is_not_kept(replay: Replay, tmp_path: Path, monkeypatch) -> None:
    from offpolicy.training import deploy as deploying

    answers = deploying._answers
    monkeypatch.setattr(deploying, "_answers", lambda *args: answers(*args) + 0.01)
    with pytest.raises(UsageError, match="Nothing was written"):
        deploy(made("BC", replay), tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named(replay: Replay, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"needs the package onnxscript.*offpolicy\[deploy\]"):
        deploy(made("BC", replay), tmp_path / "p.onnx")
    assert ROOT.exists() and not list(tmp_path.iterdir())
