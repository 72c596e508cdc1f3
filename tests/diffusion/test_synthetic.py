"""Trajectories of a generator as data: drawn into a folder, and as a pool that training renews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toy import Crash, differences, fit, method, run_files, toy_replay, weights
from toy_generator import pool, toy_model, versions

import offpolicy as op
from offpolicy.api import load_data
from offpolicy.cli.arguments import read_command
from offpolicy.cli.parser import parse, run_command
from offpolicy.data.module import DataModule
from offpolicy.data.renewal import SyntheticOptions
from offpolicy.data.replay import Replay
from offpolicy.diffusion import drawing
from offpolicy.diffusion.drawing import sample
from offpolicy.diffusion.sampler import to_replay
from offpolicy.errors import UsageError
from offpolicy.files import Table
from offpolicy.sample import main as sample_main
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

LAST = 90  # updates; checkpoints and evaluations at 45 and 90, rows of metrics at every 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "run"
    module = method("TD3BC")
    module.run.eval_episodes = 0
    fit(module, toy_replay(), 3, folder)
    return folder


# -- into a folder -----------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_trajectories_of_the_stream(model: Path, tmp_path: Path) -> None:
    said: list[int] = []
    replay = op.sample(model, tmp_path / "out", trajectories=20, batch_size=8, seed=3, first=5, progress=said.append)
    generator = op.load(model)
    expected = to_replay(generator.generate(20, first=5, seed=3), generator.data_meta)
    for name, column in expected.steps.items():
        assert np.array_equal(replay.steps[name], column)
    assert np.array_equal(replay.length, expected.length) and np.array_equal(replay.tail["obs"], expected.tail["obs"])
    assert replay.num_episodes == 20 and replay.meta["env_id"] == "Pendulum-v1"
    assert said == sorted(said) and said[-1] == 20
    assert not (tmp_path / "out.parts").exists()
    data = load_data(tmp_path / "out")
    assert data.load().fingerprint() == replay.fingerprint() and not replay.is_mapped


def test_guidance_needs_a_policy_and_changes_actions(model: Path, policy: Path, tmp_path: Path) -> None:
    options = {"trajectories": 8, "batch_size": 8}
    plain, zero, pulled = (
        sample(model, tmp_path / f"{i}", **options, **more)  # type: ignore[arg-type]
        for i, more in enumerate([{}, {"policy": policy, "guidance": 0.0}, {"policy": policy}])
    )
    assert plain.fingerprint() == zero.fingerprint()
    assert np.array_equal(plain.steps["obs"], pulled.steps["obs"])
    agent = op.load(policy)
    obs = torch.from_numpy(np.asarray(plain.steps["obs"]))
    logp = [agent.log_prob(obs, torch.from_numpy(r.steps["action"] / 2.0)).mean().item() for r in (plain, pulled)]
    assert logp[1] > logp[0]
    with pytest.raises(UsageError, match=r"`guidance` is 1.0 and there is no policy; expected one. Pass --policy RUN"):
        sample(model, tmp_path / "none", guidance=1.0)


class Stop(Exception):
    pass


def test_an_interrupted_call_goes_on(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trajectories": 20, "batch_size": 8}
    whole = sample(model, tmp_path / "whole", **options)

    def stop(done: int) -> None:
        if done > 8:
            raise Stop

    with pytest.raises(Stop):
        sample(model, tmp_path / "out", **options, progress=stop)
    assert sorted(p.name for p in (tmp_path / "out.parts").iterdir()) == ["000000", "plan.json"]
    with pytest.raises(UsageError, match=r"trajectories of another call \(seed 0 → 1\); expected those of this one"):
        sample(model, tmp_path / "out", **options, seed=1)
    generator = op.load(model)
    assert sample(generator, tmp_path / "out", **options).fingerprint() == whole.fingerprint()
    assert generator.calls == [(8, 8), (16, 4)]
    sample(generator, tmp_path / "out", **options)  # nothing is left to do
    assert len(generator.calls) == 2
    with pytest.raises(UsageError, match="out exists and holds something else; expected a new folder"):
        sample(generator, tmp_path / "out", **options, horizon=4)


def test_large_replays_are_put_together_on_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample(model, tmp_path / "small", trajectories=20, batch_size=8)
    monkeypatch.setattr(drawing, "IN_MEMORY", 100)
    mapped = sample(model, tmp_path / "large", trajectories=20, batch_size=8)
    assert mapped.is_mapped and mapped.fingerprint() == whole.fingerprint()


def test_command(model: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [str(model), str(out), "--trajectories", "10", "--batch_size", "4", "--policy", str(policy)]
    assert sample_main([*command, "--guidance", "0.5", "--horizon", "4"]) == 0
    said = capsys.readouterr()
    replay = Replay.load(out)
    assert f"10 trajectories, {replay.num_steps} transitions" in said.out and f"--data {out}" in said.out
    assert said.err.split("\n")[:2] == ["4/10 trajectories", "8/10 trajectories"]
    assert replay.meta["drawn"]["guidance"]["coefficient"] == 0.5 and replay.length.max() == 3
    with pytest.raises(UsageError, match="run of TD3BC, which generates no trajectories"):
        sample_main([str(policy), str(tmp_path / "other")])
    for name, value in (("trajectories", 0), ("guidance", -1.0), ("sampling_steps", 1), ("horizon", 1)):
        given = [str(model), str(tmp_path / "other"), "--policy", str(policy), f"--{name}", str(value)]
        with pytest.raises(UsageError, match=rf"^`{name}` is {value}; expected .* Change `--{name}` or leave it out"):
            sample_main(given)


def test_a_policy_of_other_sizes_is_named(model: Path, tmp_path: Path) -> None:
    module = method("BC").initialize(op.Sizes(2, 1), 0)
    with pytest.raises(UsageError, match="the policy takes 2 numbers of observation and 1 of action and the diffusion"):
        sample(model, tmp_path / "out", policy=module)


# -- a pool in training ------------------------------------------------------------------------------------------------


def state(folder: Path, update: int) -> Any:
    """What a checkpoint knows of the data."""
    return read_checkpoint(folder / "checkpoints" / f"step={update:08d}.ckpt")["DataModule"]


def test_a_guided_pool_is_renewed_under_the_policy_of_then(model: Path, tmp_path: Path) -> None:
    data, module = pool(model), method("TD3BC")
    drawn: list[Any] = []
    renew = DataModule.on_block_start

    def watch(policy: Any) -> None:
        renew(data, policy)
        assert data.renewal is not None and data.renewal.replay is not None
        drawn.append((policy.global_step, data.renewal.replay.version, data.renewal.replay))
        assert data.replay is not None and data.replay.num_steps == 300 + data.renewal.replay.num_steps

    data.on_block_start = watch  # type: ignore[method-assign]
    fit(module, data, LAST, tmp_path)
    assert [(at, version) for at, version, _ in drawn] == [(0, 1), (40, 2), (80, 3)]
    assert data.renewal is not None
    calls = data.renewal.model.calls
    assert calls == [(8 * i + 20 * v, n) for v in range(3) for i, n in enumerate([8, 8, 4])]

    generator = op.load(model)
    first = to_replay(generator.generate(20, seed=0), generator.data_meta)
    assert np.array_equal(drawn[0][2].steps["action"], first.steps["action"])
    third = to_replay(generator.generate(20, first=40, seed=0), generator.data_meta)
    assert np.array_equal(drawn[2][2].steps["obs"], third.steps["obs"])
    assert not np.array_equal(drawn[2][2].steps["action"], third.steps["action"])
    rows = run_files(tmp_path, LAST)["metrics"]
    assert [row.get("synthetic/version") for row in rows] == [1.0, None, 2.0, None, 3.0]
    assert rows[2]["synthetic/log_prob"] != rows[2]["synthetic/log_prob_before"]
    assert module.data_fingerprint == toy_replay().fingerprint()  # of the real data
    module.seed = 5
    plan = data.renewal.plan(module, 2)
    assert (plan.seed, plan.first, plan.guidance.coefficient) == (5, 20, 1.0)


def test_an_unguided_pool_stays(model: Path, tmp_path: Path) -> None:
    data = pool(model, "unguided", share=1.0, seed=7)
    fit(method("TD3BC"), data, LAST, tmp_path)
    assert data.renewal is not None and data.renewal.model.calls == [(0, 8), (8, 8), (16, 4)]
    assert versions(tmp_path) == ["v1"]
    assert data.replay is not None and data.renewal.replay is not None
    assert data.replay.num_steps == data.renewal.replay.num_steps  # share 1: nothing real
    assert data.renewal.replay.meta["drawn"]["seed"] == 7


@pytest.mark.parametrize("crash", [41, 60, 85], ids=["soon after a renewal", "before the next", "after the last"])
def test_resume(crash: int, model: Path, whole: Path, tmp_path: Path) -> None:
    """Checkpoints are at 45 and 90, so the run that dies at 41 starts anew, in the folder with its versions."""
    module = method("TD3BC")
    module.run.block = 1
    with pytest.raises(ZeroDivisionError):
        fit(module, pool(model), LAST, tmp_path, callbacks=[Crash(crash)])
    path = newest_checkpoint(tmp_path)
    data = pool(model)
    fit(method("TD3BC"), data, LAST, tmp_path, ckpt_path=path)
    assert not differences(run_files(whole, LAST), run_files(tmp_path, LAST))
    states = [state(folder, LAST) for folder in (whole, tmp_path)]
    assert states[0] == states[1] and states[0]["source"] == "policy-guided" and states[0]["version"] == 3
    assert versions(tmp_path) == versions(whole) == ["v2", "v3"]  # of the two checkpoints
    assert data.renewal is not None
    redrawn = {41: 6, 60: 3, 85: 0}  # pieces; versions that lie on disk, 2, 2 and 3 of them, are taken from there
    assert len(data.renewal.model.calls) == redrawn[crash]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    fit(method("TD3BC"), pool(model), LAST, folder)
    return folder


def test_a_kill_while_drawing_loses_no_piece(model: Path, whole: Path, tmp_path: Path) -> None:
    data = pool(model)
    data.load()
    assert data.renewal is not None
    generate, calls = data.renewal.model.generate, data.renewal.model.calls

    def dying(*args: Any, **options: Any) -> Any:
        if len(calls) == 5:  # version 2 has two of its three pieces
            raise Stop
        return generate(*args, **options)

    data.renewal.model.generate = dying  # type: ignore[method-assign]
    module = method("TD3BC")
    module.run.eval_every = 40  # a checkpoint at the very update
    with pytest.raises(Stop):
        fit(module, data, LAST, tmp_path)
    path = newest_checkpoint(tmp_path)
    assert path is not None and path.name == "step=00000040.ckpt"
    again = pool(model)
    fit(method("TD3BC"), again, LAST, tmp_path, ckpt_path=path)
    assert again.renewal is not None and again.renewal.model.calls == [(36, 4), (40, 8), (48, 8), (56, 4)]
    ends = [run_files(folder, LAST)["state_dict"] for folder in (whole, tmp_path)]
    assert not differences(*ends)


@pytest.mark.parametrize("block", [1, 7])
def test_block_length_never_matters(block: int, model: Path, whole: Path, tmp_path: Path) -> None:
    module = method("TD3BC")
    module.run.block, module.run.eval_every = block, 30
    fit(module, pool(model), LAST, tmp_path)
    assert not differences(weights(module), run_files(whole, LAST)["state_dict"])


def test_versions_stay_while_a_checkpoint_needs_them(model: Path, tmp_path: Path) -> None:
    module = method("TD3BC")
    module.run.eval_every = 20
    fit(module, pool(model, every=20), 100, tmp_path)
    kept = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    needed = {read_checkpoint(path)["DataModule"]["version"] for path in kept}
    assert versions(tmp_path) in ([f"v{n}" for n in sorted(needed)], [f"v{n}" for n in sorted({*needed, 3})])
    for folder in (tmp_path / "new", tmp_path):  # every checkpoint can be continued, in its folder or another
        end = fit(method("TD3BC"), pool(model, every=20), 100, folder, ckpt_path=kept[-2])
        assert not differences(weights(end), weights(module))


def test_versions_stay_where_other_checkpoints_are_written(model: Path, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = method("TD3BC")
    module.run.eval_every = 20
    own = ModelCheckpoint(dirpath=tmp_path / "own", every_n_train_steps=20, save_top_k=-1)
    fit(module, pool(model, every=20), 100, tmp_path, callbacks=[own])
    assert versions(tmp_path) == ["v1", "v2", "v3", "v4", "v5"]


def test_a_run_that_never_draws_again_says_so(model: Path) -> None:
    data = pool(model)
    data.load()
    assert data.renewal is not None
    said = [str(data.renewal.facts(updates)) for updates in (40, 41)]
    assert ["which this run does not reach" in text for text in said] == [True, False]


def test_a_pool_serves_fit_after_fit(model: Path, tmp_path: Path) -> None:
    data = pool(model)
    ends = [weights(fit(method("TD3BC"), data, 45, tmp_path / name)) for name in ("one", "two")]
    assert not differences(*ends)


def test_trained_under_other_precisions(model: Path, tmp_path: Path) -> None:
    pools = []
    for precision in ("32-true", "64-true", "bf16-mixed"):
        data = pool(model, "unguided")
        fit(method("TD3BC"), data, 5, tmp_path / precision, precision=precision)
        assert data.renewal is not None and data.renewal.replay is not None
        pools.append(data.renewal.replay.fingerprint())
    assert len(set(pools)) == 1
    fit(method("IQL-dropout"), pool(model, every=3), 5, tmp_path / "guided", precision="64-true")


# -- the command line, with the diffusion model itself ----------------------------------------------------------------


@pytest.mark.slow
def test_train_draw_and_train_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny diffusion model; then a policy on its guided samples, mixed and alone."""
    toy_replay([12] * 20).save(tmp_path / "toy")
    root = ["--root", str(tmp_path / "runs"), "--recipe", "none", "--run.eval_episodes", "0", "--run.log_every", "5"]
    size = ["--model.horizon", "8", "--model.num_features", "16", "--model.num_blocks", "2"]

    def train(name: str, data: str, steps: int, *more: str) -> Path:
        command = ["--model", name, "--data", str(tmp_path / data), "--trainer.max_steps", str(steps), *root, *more]
        assert run_command(read_command(command)) == 0
        (found,) = (tmp_path / "runs").glob(f"*/{name}/seed0-*")
        return found

    model = train("TrajectoryDiffusion", "toy", 5, *size)
    few = ["--trajectories", "6", "--batch_size", "4", "--sampling_steps", "3"]
    drawn = {
        "source": "policy-guided",
        "synthetic.model": str(model),
        "synthetic.every": "5",
        "synthetic.guidance": "50",
    }
    drawn |= {f"synthetic.{name[2:]}": value for name, value in zip(few[::2], few[1::2])}
    small = ["--model.hidden_dims", "[8,8]", "--model.batch_size", "16"]
    agent = train("IQL", "toy", 10, *small, *(f"--data.{name}={value}" for name, value in drawn.items()))
    said = " ".join(capsys.readouterr().out.split())
    assert "240 steps in 20 episodes" in said  # the real data
    assert "synthetic 6 trajectories of 8 steps, 93.75 % of the rows of a batch" in said
    assert "drawn once, without guidance; again every 5 updates, guided by the policy (coefficient 50)" in said
    settings = yaml.safe_load((agent / "config.yaml").read_text())["data"]
    assert settings["source"] == "policy-guided" and settings["synthetic"]["trajectories"] == 6
    row = Table(agent / "metrics.csv").rows()[-1]
    assert row["synthetic/version"] == 2.0 and row["synthetic/log_prob"] > row["synthetic/log_prob_before"]

    assert sample_main([str(model), str(tmp_path / "out"), "--policy", str(agent), "--guidance", "3", *few]) == 0
    replay = Replay.load(tmp_path / "out")
    assert replay.num_episodes == 6 and replay.meta["name"] == "toy synthetic"
    assert replay.meta["max_episode_steps"] == 10
    assert train("BC", "out", 5, *small).parent.parent.name == "out"


def test_options_inside_options_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, answer in (
        ("--data.synthetic.modle=x", "--data.synthetic.modle is not an option. Did you mean '--data.synthetic.model'?"),
        ("--data.synthetic.every=often", "--data.synthetic.every is 'often'; expected int."),
        ("--data.sorce=unguided", "--data.sorce is not an option. Did you mean '--data.source'?"),
    ):
        with pytest.raises(UsageError) as caught:
            parse(read_command(["--model", "TD3BC", argument]))
        assert str(caught.value).startswith(answer)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(model: Path, policy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`data.source` is 'guidance'; expected one of .* Did you mean 'unguided'"):
        DataModule(source="guidance")
    assert DataModule(source="Policy_Guided").source == "policy-guided"
    with pytest.raises(UsageError, match=r"but `data.source` is 'real'; expected 'policy-guided' or 'unguided'"):
        DataModule(synthetic=SyntheticOptions(model="x"))
    for ignored in ({"share": 0.5}, {"every": 10_000}, {"guidance": 0.0}, {"seed": 3}):  # the second is a default
        with pytest.raises(UsageError, match=rf"`data.synthetic.{next(iter(ignored))}` is .* 'real'.* or leave it out"):
            DataModule(synthetic=SyntheticOptions(**ignored))
    with pytest.raises(UsageError, match=r"no diffusion model is given; .* pass --data.synthetic.model RUN"):
        load_data(toy_replay(), source="unguided").load()
    with pytest.raises(UsageError, match="is a run of TD3BC, which generates no trajectories; expected one of Traj"):
        pool(policy).load()
    with pytest.raises(UsageError, match="Found no nowhere"):
        pool(Path("nowhere")).load()
    other = load_data(toy_replay(name="others"), source="unguided", synthetic=SyntheticOptions(str(model)))
    with pytest.raises(UsageError, match=r"was trained on toy, but the data are others; expected the same. Train one"):
        other.load()
    wide = load_data(toy_replay(obs_dim=5), source="unguided", synthetic=SyntheticOptions(str(model)))
    with pytest.raises(UsageError, match="makes 3 numbers of observation and 1 of action, but toy has 5 numbers"):
        wide.load()
    for name, value in (("share", 0.0), ("share", 1.1), ("every", 0), ("horizon", 1), ("guidance", -1.0)):
        with pytest.raises(UsageError, match=f"`data.synthetic.{name}` is {value}; expected a value in"):
            SyntheticOptions(**{name: value})


def test_a_source_that_nothing_draws_from_is_named() -> None:
    """A data module made by hand and given to a Trainer; offpolicy.load_data and offpolicy.fit say what draws."""
    data = DataModule.of(toy_replay())
    data.source = "unguided"
    assert data.load() is data.replay
    with pytest.raises(UsageError, match=r"'unguided', but the data module has no `renewer`, .* offpolicy.load_data\("):
        data.setup("fit")


def test_a_policy_without_probabilities_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    module = method("DecisionTransformer")
    with pytest.raises(UsageError):
        fit(module, pool(model), LAST, tmp_path)
    assert module.global_step == 0
    fit(method("DecisionTransformer"), pool(model, "unguided"), 5, tmp_path / "unguided")


def test_the_source_of_a_run_cannot_change(model: Path, whole: Path, tmp_path: Path) -> None:
    path = whole / "checkpoints" / "step=00000045.ckpt"
    with pytest.raises(UsageError, match=r"trained with `data.source` 'policy-guided', which is 'real' now; expected"):
        fit(method("TD3BC"), toy_replay(), LAST, tmp_path, ckpt_path=path)
    fit(method("TD3BC"), toy_replay(), 45, tmp_path)
    with pytest.raises(UsageError, match=r"trained with `data.source` 'real', which is 'unguided' now; expected"):
        path = tmp_path / "checkpoints" / "step=00000045.ckpt"
        fit(method("TD3BC"), pool(model, "unguided"), LAST, tmp_path, ckpt_path=path)
