"""Files of strangers: whatever they name, nothing of theirs runs unless the user says so. `evil` marks that it ran."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from made_data import Bomb
from scripts import FIXTURES
from toy import fit, method, toy_replay

import offpolicy as op
from offpolicy.cli.arguments import read_command
from offpolicy.cli.parser import parse
from offpolicy.data.replay import Replay
from offpolicy.data.sources import open_source
from offpolicy.data.sources.d4rl import META, write
from offpolicy.environments.make import make_environment
from offpolicy.environments.wrappers import NoEnvironment
from offpolicy.errors import DataError, UsageError
from offpolicy.language.rl.answering import Answering
from offpolicy.losses.policy_gradient import Objective
from offpolicy.registry import find_method, import_callable, import_class
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint
from offpolicy.trust import allows, check_found, packages_of, trusting, words

EVIL = """
import pathlib, os
from subprocess import run
pathlib.Path({marker!r}).touch()

import gymnasium
from lightning.pytorch import Callback
from gymnasium.envs.classic_control import PendulumEnv
from lightning_modules.bc import BC

class Evil(BC): ...
class Stop(Callback): ...
def reward(prompt, answer, reference): return 1.0
if "Evil-v0" not in gymnasium.registry:
    gymnasium.register("Evil-v0", entry_point=PendulumEnv, max_episode_steps=200)
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that appears when the module `evil`, which lies on the path, is imported."""
    path = tmp_path / "it-ran"
    (tmp_path / "evil.py").write_text(EVIL.format(marker=str(path)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop("evil", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(method("BC"), toy_replay(), 45, folder)
    return folder


def forged(run: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a run's checkpoint with something changed in it."""
    content = read_checkpoint(newest_checkpoint(run) or "")
    change(content)
    to.mkdir(parents=True, exist_ok=True)
    torch.save(content, to / "step=00000045.ckpt")
    return to


# -- checkpoints -------------------------------------------------------------------------------------------------------

NAMES = (
    "evil.Evil", "evil:Evil", "evil.reward", "os.system", "posix.system", "subprocess.Popen", "builtins.exec",
    "offpolicy.api.os.system", "offpolicy.api.shutil.rmtree", "offpolicy.api.load", "offpolicy.files.WriteError",
    "lightning_modules.bc.torch.hub.load", "offpolicy.api.Trainer", "offpolicy.data.module.DataModule", "offpolicy",
    "lightning_modules.evil.Evil", "", ".", "x", 3, None, ["evil.Evil"],
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_the_class_of_a_checkpoint(name: Any, trained: Path, marker: Path, tmp_path: Path) -> None:
    run = forged(trained, tmp_path / "run", lambda content: content["offpolicy"].update({"class": name}))
    for opened in (op.load, op.evaluate):
        with pytest.raises(UsageError):
            opened(run)
    assert not marker.exists()


@pytest.mark.parametrize("lost", ["lr_schedulers", "optimizer_states", "threads", "meters"])
def test_going_on_from_a_checkpoint_that_lacks_a_part(lost: str, trained: Path, marker: Path, tmp_path: Path) -> None:
    """Its checksums are right, so only what reads a part can find that it is missing."""

    def change(content: dict[str, Any]) -> None:
        del (content if lost in content else content["offpolicy"])[lost]

    run = forged(trained, tmp_path / "run", change)
    with pytest.raises(UsageError, match=r"step=00000045\.ckpt"):
        op.fit(method("BC"), toy_replay(), max_steps=60, ckpt_path=run, verbose=False, eval_episodes=0)


def test_a_class_that_is_trusted(trained: Path, marker: Path, tmp_path: Path) -> None:
    run = forged(trained, tmp_path / "run", lambda content: content["offpolicy"].update({"class": "evil.Evil"}))
    with pytest.raises(UsageError, match=r"--trust evil .*trust='evil'.*offpolicy.load\(path, method=MyClass\)"):
        op.load(run)
    assert type(op.load(run, method=find_method("BC"))).__name__ == "BC" and not marker.exists()
    assert type(op.load(run, trust="other, evil")).__name__ == "Evil" and marker.exists()
    assert type(op.load(run, trust=["evil.Evil"])).__name__ == "Evil"
    assert type(op.load(run, trust=True)).__name__ == "Evil"
    with pytest.raises(UsageError, match="--trust evil"):  # trust lasts for one call
        op.load(run)
    with pytest.raises(UsageError, match="no method"):
        op.load(run, method=dict)  # type: ignore[arg-type]


def test_trust_in_a_package_is_none_in_what_it_imports(marker: Path) -> None:
    with trusting("evil", in_file=True):
        assert import_callable("evil.reward", "reward")("", "", "") == 1.0
        with pytest.raises(UsageError, match=r"subprocess\.run"):
            import_callable("evil.run", "reward")
        with pytest.raises(UsageError):
            import_callable("evil.os.system", "reward")
    with trusting(in_file=True):
        for path in (
            "offpolicy.export.export",
            "offpolicy.cli.entry:run",
            "offpolicy.fit.main",
            "lightning_modules.METHODS",
        ):
            with pytest.raises(UsageError):
                import_callable(path, "reward", lambda found: False)
    assert import_class("evil.Evil").__name__ == "Evil"  # the user's own word, in Python


def test_words_of_trust() -> None:
    before = words()
    assert packages_of(None) == packages_of(False) == () and packages_of(True) == ("all",)
    assert packages_of("a, b.c:D") == ("a", "b.c.D")
    with pytest.raises(UsageError, match="expected packages or modules"):
        packages_of("a/b")
    with trusting("a.b", names=["c.D"]):
        assert allows("a.b") and allows("a.b.c") and allows("a.b:C") and allows("c.D")
        assert not allows("a.bc") and not allows("a") and not allows("c.E") and not allows("c")
        check_found("x.y", json.loads, "reward")  # not in a file
    assert words() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("hyper_parameters"),
        lambda c: c["hyper_parameters"].update(surprise=1),
        lambda c: c["offpolicy"].pop("sizes"),
        lambda c: c["offpolicy"].update(data=None),
        lambda c: c["offpolicy"].update(sizes={"obs_dim": "x", "action_dim": 1, "max_steps": 0}),
        lambda c: c.update(state_dict={}),
        lambda c: c.update(global_step="many"),
        lambda c: c.update(offpolicy=[]),
        lambda c: c["offpolicy"].update(meters=3),
    ],
)
def test_a_checkpoint_with_other_content_is_a_clear_error(
    change: Callable[[dict[str, Any]], Any], trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        op.load(forged(trained, tmp_path / "run", change))


def test_lightning_takes_no_name_from_the_file_either(trained: Path, marker: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["hyper_parameters"] |= {"_instantiator": "evil.reward", "_class_path": "evil.Evil"}

    run = forged(trained, tmp_path / "run", change)
    with pytest.raises(UsageError):
        find_method("BC").load_from_checkpoint(run / "step=00000045.ckpt")
    assert not marker.exists()


def test_pickles_are_not_opened(trained: Path, marker: Path, tmp_path: Path) -> None:
    run = forged(trained, tmp_path / "run", lambda content: content.update(bomb=Bomb(marker)))
    with pytest.raises(UsageError):
        op.load(run)
    array = np.array([Bomb(marker)], dtype=object)
    np.savez(tmp_path / "data.npz", observations=np.zeros((4, 2)), actions=array)
    toy_replay().save(tmp_path / "folder")
    np.save(tmp_path / "folder" / "steps" / "00-obs.npy", array)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Bomb(marker)))
    for name in ("data.npz", "folder", "plain.npz"):
        with pytest.raises(DataError):
            open_source(tmp_path / name)
    assert not marker.exists()


# -- rewards, components, engines --------------------------------------------------------------------------------------


def rollouts(**options: Any) -> Any:
    return find_method("GRPO")(policy="none", batch_size=8, **options)


def answering(method: Any, problems: Replay) -> Answering:
    return Answering(problems, None, method.hparams, words=method.words)


def one_problem() -> Replay:
    tables = {"problems": np.zeros((1, 2), dtype=np.int64), "problems/answer": np.array(["1"])}
    return Replay({"token": np.zeros(1, dtype=np.uint8)}, tables=tables)


@pytest.mark.parametrize("name", ["evil.reward", "offpolicy.api.os.system", "offpolicy.export.export", "evil:reward"])
def test_parts_of_objectives_and_rewards(name: str, marker: Path) -> None:
    with trusting(in_file=True):
        for slot in ("trust", "advantage", "ratio", "aggregation", "anchors", "weight"):
            with pytest.raises(UsageError):
                rollouts(objective={slot: {"name": name}})
            with pytest.raises(UsageError):
                Objective(**{slot: name})
        late = rollouts(rewards=[{"name": name, "weight": 2.0}]), rollouts(engine=name)
        known = rollouts(objective={"trust": "offpolicy.losses.policy_terms.NoTrust"})
    assert type(known.objective._parts["trust"]).__name__ == "NoTrust"
    problems = one_problem()
    with pytest.raises(UsageError):  # named in a file, used when training begins
        answering(late[0], problems)
    with pytest.raises((UsageError, AttributeError)) as caught:
        answering(late[1], problems).open(torch.nn.Linear(1, 1))
    assert caught.type is UsageError or "get_base_model" in str(caught.value) or "config" in str(caught.value)
    assert not marker.exists()


def test_the_reward_that_data_name(marker: Path) -> None:
    problems = one_problem()
    problems.meta["reward"] = "evil.reward"
    with pytest.raises(UsageError):
        answering(rollouts(), problems)
    assert not marker.exists()
    assert answering(rollouts(rewards=["evil.reward"]), problems).rewards.names == ("reward",)  # the user's word


# -- configurations ----------------------------------------------------------------------------------------------------

CALLBACK = {"class_path": "evil.Stop"}
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
CONFIGS: dict[str, Any] = {
    "model": {"model": "evil.Evil"},
    "model class_path": {"model": {"class_path": "evil.Evil"}},
    "model not text": {"model": ["evil.Evil"]},
    "callback": {"trainer": {"callbacks": [CALLBACK]}},
    "callback alone": {"trainer": {"callbacks": CALLBACK}},
    "callback by name": {"trainer": {"callbacks": "evil.Stop"}},
    "callback as text": {"trainer": {"callbacks": '[{"class_path": "evil.Stop"}]'}},
    "callback escaped": {"trainer": {"callbacks": '[{"\\u0063lass_path": "evil.Stop"}]'}},
    "callback dotted": {"trainer.callbacks": [CALLBACK]},
    "callback of os": {"trainer": {"callbacks": {"class_path": "lightning.pytorch.trainer.trainer.os.system"}}},
    "function inside": {
        "trainer": {"callbacks": [{"class_path": LAMBDA, "init_args": {"on_fit_start": "evil.reward"}}]}
    },
    "function of ours": {"trainer": {"callbacks": [{"class_path": "offpolicy.export.export"}]}},
    "logger": {"trainer": {"logger": "evil.Stop"}},
    "plugin": {"trainer": {"plugins": ["evil.Stop"]}},
    "strategy": {"trainer": {"strategy": {"class_path": "evil.Stop"}}},
    "profiler": {"trainer": {"profiler": "evil.Stop"}},
    "accelerator": {"trainer": {"accelerator": "evil.Stop"}},
    "another file": {"trainer": {"callbacks": "more.yaml"}},
    "the trainer in another file": {"trainer": "more.yaml"},
    "config in config": {"config": "more.yaml"},
    "trust": {"trust": "all"},
    "call in data": {"data": {"env_kwargs": {"x": {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}}}},
    "call of ours": {"data": {"env_kwargs": {"x": {"class_path": "offpolicy.data.module.DataModule"}}}},
    "call in text": {"data": {"env_kwargs": '{"x": {"class_path": "evil.reward"}}'}},
    "call in a method": {"model": {"class_path": "GRPO", "init_args": {"rewards": [{"class_path": "evil.Stop"}]}}},
    "environment": {"data": {"env_id": "evil:Evil-v0"}},
    "a number as name": {1: 2},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_runs_no_code(kind: str, marker: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump([CALLBACK]))
    (tmp_path / "run").mkdir()
    content = {"data": {"name": "pendulum-stitch-v0"}} | CONFIGS[kind]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
    toy_replay().save(tmp_path / "toy")
    for argv in (["--config", "run/config.yaml"], ["--ckpt_path", "run"], ["--config", "run"]):
        with pytest.raises((UsageError, DataError)):
            parse(read_command([*argv, "--data", "toy"]))
    assert not marker.exists()


def test_names_on_the_command_line_are_trusted(marker: Path, tmp_path: Path) -> None:
    toy_replay().save(tmp_path / "toy")
    stored = {"model": {"class_path": "evil.Evil"}, "trainer": {"callbacks": [CALLBACK], "max_steps": 2}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(stored))
    common = ["--data", "toy", "--config", "own.yaml"]
    for trust in (
        ["--trust", "evil"],
        ["--trust", "all"],
        ["--model", "evil.Evil"],
        ["--trust", "evil.Evil,evil.Stop"],
    ):
        made = parse(read_command([*common, *trust]))
        assert type(made.model).__name__ == "Evil"
        assert [type(c).__name__ for c in made.config_init.trainer.callbacks] == ["Stop"]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"model": "BC", "trainer": {"logger": logger}}))
    made = parse(read_command(["--config", "plain.yaml", "--data", "toy", "--trainer.callbacks", "evil.Stop"]))
    assert type(made.config_init.trainer.logger).__name__ == "CSVLogger"


def test_too_much_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    Path("bomb.yaml").write_text(aliases + "trainer: {callbacks: *a8}\n")
    Path("deep.yaml").write_text("trainer: {callbacks: " + "[" * 5000 + "]" * 5000 + "}\n")
    Path("loop.yaml").write_text("trainer: {callbacks: &a [*a]}\n")
    for name in ("bomb.yaml", "deep.yaml", "loop.yaml"):
        with pytest.raises(UsageError):
            read_command(["--config", name, "--data", "pendulum-stitch-v0"])


# -- environments ------------------------------------------------------------------------------------------------------


def minari_copy(to: Path, env_id: str) -> Path:
    import shutil

    source = next((FIXTURES / "minari").rglob("mixed-v0"))
    shutil.copytree(source, to)
    record = json.loads((to / "data" / "metadata.json").read_text())
    spec = {"id": env_id, "kwargs": {}, "max_episode_steps": 200}
    for key in ("env_spec", "eval_env_spec"):
        record[key] = json.dumps(spec)
    (to / "data" / "metadata.json").write_text(json.dumps(record))
    return to


def with_environment(kind: str, folder: Path, env_id: str) -> Path:
    if kind == "folder":
        return toy_replay(env_id=env_id).save(folder / "set")
    if kind == "minari":
        return minari_copy(folder / "set", env_id)
    path = write(toy_replay(), folder / "set.hdf5")
    with h5py.File(path, "r+") as file:
        file.attrs[META] = json.dumps(json.loads(file.attrs[META]) | {"env_id": env_id})
    return path


@pytest.mark.parametrize("kind", ["folder", "hdf5", "minari"])
def test_the_environment_that_data_name(kind: str, marker: Path, tmp_path: Path) -> None:
    path = with_environment(kind, tmp_path, "evil:Evil-v0")
    replay = open_source(path)
    assert "env_id" not in replay.meta and any("--trust evil" in text for text in replay.meta["warnings"])
    with pytest.raises(NoEnvironment, match="evil:Evil-v0 is named in a file"):
        make_environment(replay.meta)
    assert not marker.exists()
    replay.save(tmp_path / "again")  # what was set aside comes back with trust, and only so
    assert "env_id" not in Replay.load(tmp_path / "again").meta
    with trusting("evil"):
        for found in (open_source(path), Replay.load(tmp_path / "again")):
            assert found.meta["env_id"] == "evil:Evil-v0"
            make_environment(found.meta).close()
    assert marker.exists()


def test_ids_that_import_by_their_arguments_are_set_aside(tmp_path: Path) -> None:
    kwargs = {"env_id": "evil:Evil-v0"}
    meta = Replay.load(toy_replay(env_id="GymV26Environment-v0", env_kwargs=kwargs).save(tmp_path / "set")).meta
    assert "env_id" not in meta and meta["refused_env_id"] == "GymV26Environment-v0"
    for wrong in ({"env_id": 3}, {"env_id": "Pendulum-v1", "env_kwargs": [1]}, {"env_kwargs": {"1": 1}, "env_id": [1]}):
        with pytest.raises(DataError):
            Replay.load(toy_replay(**wrong).save(tmp_path / "set", overwrite=True))


def test_the_environment_that_a_checkpoint_names(trained: Path, marker: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["offpolicy"]["data"]["meta"]["env_id"] = "evil:Evil-v0"

    run = forged(trained, tmp_path / "run", change)
    with pytest.raises(NoEnvironment, match="--trust evil"):
        op.evaluate(run, episodes=1)
    assert not marker.exists()
    assert op.evaluate(run, episodes=1, trust="evil")["episodes"] == 1 and marker.exists()


def test_an_environment_of_ones_own_is_named_once(marker: Path, tmp_path: Path) -> None:
    arrays = {k: np.asarray(v) for k, v in toy_replay().steps.items()}
    assert op.load_data(arrays, env_id="evil:Evil-v0").replay.meta["env_id"] == "evil:Evil-v0"
    path = with_environment("folder", tmp_path, "evil:Other-v0")
    assert op.load_data(path, env_id="evil:Evil-v0").replay.meta["env_id"] == "evil:Evil-v0"
    argv = ["--data", str(path), "--data.env_id", "evil:Evil-v0", "--model", "BC"]
    assert parse(read_command(argv)).datamodule.load().meta["env_id"] == "evil:Evil-v0"
