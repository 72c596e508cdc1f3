"""The Python interface: fit, load, evaluate, and a plain Trainer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from toy import differences, toy_replay, weights

import offpolicy as op
from offpolicy import api
from offpolicy.data.module import DataModule
from offpolicy.files import Table
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

SMALL: dict[str, Any] = {"hidden_dims": (8, 8), "batch_size": 16}
SHORT: dict[str, Any] = {"max_steps": 60, "eval_every": 30, "log_every": 20, "eval_episodes": 2, "verbose": False}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def arrays(n: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "obs": rng.normal(size=(n, 3)),
        "action": rng.uniform(-1, 1, size=(n, 1)),
        "reward": rng.normal(size=n),
        "terminated": np.zeros(n, bool),
        "episode_end": np.arange(n) % 50 == 49,
    }


def test_fit_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    method = op.TD3BC(alpha=1.0, **SMALL)
    result = op.fit(method, toy_replay(), seed=3, **SHORT)
    assert capsys.readouterr().out == ""
    assert result.folder == Path("runs", "toy", "TD3BC", "seed3-1")
    assert result.updates == 60 and result.interrupted == 0
    last = Table(result.folder / "evals.csv").rows()[-1]
    assert result.scores["return_mean"] == last["eval/return_mean"]

    loaded = op.load(result.folder)
    assert type(loaded) is op.TD3BC and loaded.hparams.alpha == 1.0 and loaded.hparams.hidden_dims == (8, 8)
    assert not differences(weights(method), weights(loaded)) and not loaded.training
    obs = np.ones((5, 3), np.float32)
    np.testing.assert_array_equal(method.act(obs), loaded.act(obs))
    assert loaded.act(obs[0]).shape == (1,)

    found = op.evaluate(result.folder, episodes=2)
    assert found["return_mean"] == last["eval/return_mean"] and len(found["returns"]) == 2
    assert op.evaluate(loaded, episodes=3, seed=1)["returns"][:2] != found["returns"]


def test_a_method_that_has_weights_begins_with_them_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    method, short = op.TD3BC(**SMALL), SHORT | {"verbose": True}
    first = op.fit(method, toy_replay(), **short).folder
    assert "has already" not in capsys.readouterr().out
    for again in (method, op.load(first)):
        before = weights(again)
        result = op.fit(again, toy_replay(), **short | {"max_steps": 1})
        assert "weights" in (said := capsys.readouterr().out) and "those that this method has already" in said
        assert result.folder != first and result.updates == 1
        moved = [float((weights(again)[name] - value).abs().max()) for name, value in before.items()]
        assert 0 < max(moved) < 0.01  # one step from where it was
    op.fit(method, toy_replay(), ckpt_path=first, **short | {"max_steps": 70})
    assert "has already" not in capsys.readouterr().out


def test_command_line_and_python_train_the_same(tmp_path: Path) -> None:
    toy_replay().save(tmp_path / "toy")
    result = op.fit(op.IQL(**SMALL), "toy", seed=2, **SHORT)
    argv = [
        "--data",
        "toy",
        "--model",
        "IQL",
        "--model.hidden_dims",
        "[8,8]",
        "--model.batch_size",
        "16",
        "--seed",
        "2",
    ]
    argv += ["--trainer.max_steps", "60", "--run.eval_every", "30", "--run.log_every", "20", "--run.eval_episodes", "2"]
    assert op.fit.main([*argv, "--folder", "by-command"]) == 0
    assert op.fit.main(["--config", str(result.folder), "--folder", "by-config"]) == 0
    contents = [read_checkpoint(newest_checkpoint(f) or "") for f in (result.folder, "by-command", "by-config")]
    for other in contents[1:]:
        for part in ("state_dict", "optimizer_states", "hyper_parameters", "offpolicy"):
            assert not differences(contents[0][part], other[part]), part


def test_continuing_equals_going_through(tmp_path: Path) -> None:
    whole = op.fit(op.BC(**SMALL), toy_replay(), folder="whole", **SHORT)
    half = op.fit(op.BC(**SMALL), toy_replay(), **{**SHORT, "max_steps": 37})
    again = op.fit(op.BC(**SMALL), toy_replay(), ckpt_path="last", **SHORT)
    assert again.folder == half.folder
    assert not differences(weights(whole.method), weights(again.method))
    done = op.fit(op.BC(**SMALL), toy_replay(), ckpt_path=again.folder, **SHORT)
    assert done.updates == 60 and not differences(weights(done.method), weights(whole.method))
    assert done.scores == again.scores


def test_data_of_every_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "steps.npz", **arrays())
    for data in (arrays(), "steps.npz", Path("steps.npz"), op.load_data("steps.npz"), op.load_data("steps.npz").replay):
        result = op.fit(op.BC(**SMALL), data, **{**SHORT, "max_steps": 4})
        assert result.updates == 4 and result.scores == {}
    assert len(list(Path("runs").glob("steps/BC/seed0-*"))) == 4  # the arrays are called otherwise
    data = DataModule("steps.npz", env_id="Pendulum-v1", max_episode_steps=5)
    result = op.fit(op.BC(**SMALL), data, **{**SHORT, "max_steps": 4})
    assert result.scores["length_mean"] == 5.0 and "score" not in result.scores


def test_a_plain_trainer_works_too(tmp_path: Path) -> None:
    data = DataModule.of(toy_replay())
    method = op.TD3BC(**SMALL)
    method.run.eval_episodes = 0
    trainer = Trainer(
        max_steps=10, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.fit(method, data)
    assert trainer.global_step == 10
    (path,) = tmp_path.rglob("*.ckpt")
    assert not differences(weights(op.load(path)), weights(method))


def test_options_of_run_and_trainer_go_where_they_belong() -> None:
    class Counter(Callback):
        blocks = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.blocks += 1

    counter = Counter()
    method = op.BC(**SMALL)
    op.fit(method, toy_replay(), callbacks=counter, block=7, precision="64-true", **{**SHORT, "eval_every": 0})
    assert counter.blocks == 9  # blocks of 7 cut at 20, 40 and 60
    assert method.dtype_of_weights == torch.float64
    with pytest.raises(op.UsageError, match="Did you mean 'eval_every'"):
        op.fit(method, toy_replay(), evel_every=3, **SHORT)
    with pytest.raises(op.UsageError, match="bf16-mixed"):
        op.fit(op.BC(**SMALL), toy_replay(), precision=16, **SHORT)
    with pytest.raises(op.UsageError, match="max_grad_norm"):
        op.fit(op.BC(**SMALL), toy_replay(), gradient_clip_val=1.0, **SHORT)
    with pytest.raises(TypeError, match="max_steps"):
        op.fit(op.BC(**SMALL), toy_replay())


def test_the_process_is_left_as_it_was(recwarn: pytest.WarningsRecorder) -> None:
    levels = [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")]
    op.fit(op.BC(**SMALL), toy_replay(), threads=2, **SHORT)
    assert [logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")] == levels
    assert torch.get_num_threads() == 1
    assert not [w for w in recwarn if "lightning" in str(w.filename)]


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        assert api.is_first_process()
        monkeypatch.setenv(name, "1")
        assert not api.is_first_process()
        monkeypatch.delenv(name)


@pytest.mark.parametrize("root", ["runs", "some/where"])
def test_a_run_that_is_refused_leaves_nothing(root: str) -> None:
    for wrong in ({"gradient_clip_val": 1.0}, {"accelerator": "abacus"}):
        with pytest.raises(op.UsageError):
            op.fit(op.BC(**SMALL), toy_replay(), root=root, **wrong, **SHORT)
        assert not list(Path().iterdir())
    Path(root).mkdir(parents=True)  # a folder of the user's stays
    with pytest.raises(op.UsageError):
        op.fit(op.BC(**SMALL), toy_replay(), root=root, gradient_clip_val=1.0, **SHORT)
    assert Path(root).is_dir() and not list(Path(root).iterdir())


# -- load --------------------------------------------------------------------------------------------------------------

OWN = """
from offpolicy import BC


class Mine(BC):
    pass
"""


def test_a_users_class_is_found_by_its_import_path_or_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = __import__("own_method").Mine
    folder = op.fit(mine(**SMALL), toy_replay(), **{**SHORT, "max_steps": 4}).folder
    assert type(op.load(folder, trust="own_method")) is mine
    (tmp_path / "own_method.py").unlink()
    sys.modules.pop("own_method")
    with pytest.raises(op.UsageError, match=r"own_method\.Mine, which cannot be imported.*method=MyClass"):
        op.load(folder)
    assert type(op.load(folder, method=mine)) is mine


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(op.UsageError, match="nowhere"):
        op.load("nowhere")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(op.UsageError, match="not written by this library"):
        op.load("foreign.ckpt")


def test_evaluation_without_an_environment_says_so() -> None:
    result = op.fit(op.BC(**SMALL), arrays(), **{**SHORT, "max_steps": 4})
    with pytest.raises(op.UsageError, match="name no environment"):
        op.evaluate(result.folder)
