"""The command line: names, order, precedence, messages, exit codes, files of a run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import start_command
from forks import finish
from toy import toy_replay

from offpolicy import evaluate, fit
from offpolicy.cli import entry
from offpolicy.cli import parser as cli_module
from offpolicy.cli.arguments import read_command
from offpolicy.cli.parser import FitCLI, parse
from offpolicy.errors import DataError, UsageError
from offpolicy.files import Table
from offpolicy.training.checkpoints import newest_checkpoint, read_checkpoint

pytestmark = pytest.mark.usefixtures("in_home")

SMALL = ["--model.hidden_dims", "[8,8]", "--model.batch_size", "16"]
SHORT = ["--trainer.max_steps", "60", "--run.eval_every", "30", "--run.log_every", "20", "--run.eval_episodes", "2"]

PAIRS = str(Path(__file__).parents[2] / "examples" / "preference" / "data" / "gsm8k_pairs_test.jsonl.gz")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small data and a user's own method in it."""
    folder = tmp_path_factory.mktemp("home")
    toy_replay().save(folder / "toy")
    (folder / "own_algo.py").write_text(OWN)
    return folder


OWN = '''
import offpolicy as op
from offpolicy.nn.policies import DeterministicPolicy


class Mine(op.OfflineModule):
    """Cloning, once more.

    Args:
        strength: factor of the loss.
    """

    def __init__(self, *, strength: float = 1.0, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def build(self, sizes):
        self.actor = DeterministicPolicy(sizes.obs_dim, sizes.action_dim, (8,))

    def learning_rates(self):
        return {"actor": 1e-3}

    def update(self, batch, step):
        loss = self.hparams.strength * (self.actor(batch.obs) - batch.action).square().mean((-2, -1))
        self.step("actor", loss)
        return {"actor_loss": loss.detach()}

    def policy(self, obs):
        return self.actor(obs)
'''


def cli(*argv: str) -> FitCLI:
    return parse(read_command(argv))


def message(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        cli(*argv)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    return text


def run(*argv: str) -> Path:
    """Train in this process; returns the newest run folder."""
    assert fit.main([*argv]) == 0
    return max(Path("runs").glob("*/*/seed*-*"), key=lambda p: (p / "metrics.csv").stat().st_mtime_ns)


# -- names and messages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model", "TD4BC"], ["no method is called 'TD4BC'", "Did you mean 'TD3BC'?"]),
        (["--model", "DT"], ["Did you mean 'DecisionTransformer'?"]),
        (["--model", "wm"], ["Did you mean 'WorldModel'?"]),
        (["--model", "behavior-cloning"], ["Did you mean 'BC'?"]),
        (["--model", "PPO"], ["Did you mean 'GRPO'?"]),
        (["--model.lr", "1"], ["'--model.actor_lr' or '--model.critic_lr'"]),
        (["--model.learning_rate", "1", "--model", "IQL"], ["'--model.actor_lr' or"]),
        (["--model.gamma", "1"], ["'--model.discount'"]),
        (["--lr", "1"], ["'--model.actor_lr' or '--model.critic_lr'"]),
        (["--hidden_sizes", "1"], ["'--model.hidden_dims'"]),
        (["--data", "pendlum-stitch-v0"], ["pendlum-stitch-v0", "Did you mean 'pendulum-stitch-v0'?"]),
        (["--data", "nowhere.hdf5"], ["nowhere.hdf5 does not exist"]),
        (["--modle", "IQL"], ["--modle is not an option", "'--model'"]),
        (["--run.evel_every", "5"], ["--run.evel_every", "'--run.eval_every'"]),
        (["--model.alhpa", "3"], ["--model.alhpa is not an option of TD3BC", "'--model.alpha'"]),
        (["--alpha", "3"], ["--alpha is not an option", "'--model.alpha'"]),
        (["--max_steps", "3"], ["'--trainer.max_steps'"]),
        (["--trainer.max_step", "3"], ["--trainer.max_step is not an option.", "'--trainer.max_steps'"]),
        (["--data.downlaod", "false"], ["'--data.download'"]),
        (["--model.alpha"], ["--model.alpha has no value"]),
        (["TD3BC"], ["found 'TD3BC'", "--name VALUE"]),
        (["--model.alpha", "high"], ["--model.alpha is 'high'; expected float"]),
        (["--model.policy_freq", "1.5"], ["--model.policy_freq is '1.5'; expected int"]),
        (
            ["--model.hidden_dims", "64"],
            ["is '64'; expected tuple[int, ...]. A list is written in brackets: --model.hidden_dims '[64]'."],
        ),
        (["--run.block", "many"], ["--run.block is 'many'; expected int"]),
        (["--data.download", "maybe"], ["--data.download is 'maybe'; expected bool"]),
        (["--trainer.precision", "17"], ["--trainer.precision is '17'", "'bf16-mixed'"]),
        (["--trainer.logger", "TensorBoardLogger"], ["--trainer.logger cannot be used", "save_dir"]),
        (["--trainer.callbacks", "NoSuch"], ["--trainer.callbacks", "NoSuch"]),
        (["--model.discount", "2"], ["`discount` is 2.0; expected a value in [0.0, 1.0)"]),
        (["--run.block", "0"], ["`run.block` is 0"]),
        (["--run.matmul", "fast"], ["'fast'", "'onednn'"]),
        (["--model", "no_such.algo.Mine"], ["no module 'no_such'", "package.module.Class"]),
        (["--model", "own_algo.Mien"], ["own_algo has no 'Mien'", "'Mine'"]),
        (["--model", "pathlib.Path"], ["pathlib.Path", "subclass of offpolicy.OfflineModule"]),
        (["--recipe", "pendulum-stich-v0"], ["Did you mean 'pendulum-stitch-v0'?"]),
        (["--config", "absent.yaml"], ["'absent.yaml'", "YAML file"]),
        (["--ckpt_path"], ["--ckpt_path has no value"]),
        (["--seed_everything", "x"], ["--seed_everything is 'x'"]),
        (["--seed", "0..7"], ["`seed` is '0..7'", "Did you mean --seeds 0..7?"]),
        (["--seedz", "0..7"], ["--seedz is not an option", "'--seeds'"]),
        (
            ["--model", "DPO", "--data", PAIRS, "--data.extra_columns", "[a]"],
            ["an option of control data alone", "reads texts"],
        ),
        (
            [*["--model", "GRPO", "--data", "addition", "--model.variant", "ssb", "--model.replay_fraction", "0"]],
            ["--model.replay_fraction is 0.0, the default, in whose place the variant 'ssb' has 0.25"],
        ),
        (["--seeds", "5..2"], ["the range 5..2 is empty", "2..5"]),
        (["--seeds", "0,0"], ["'0,0', which has 0 twice"]),
        (["--seeds", "a"], ["`seeds` is 'a'; expected whole numbers ≥ 0, each once, such as 0..7 or 0,3,5"]),
        (["--seeds", "0..1", "--seed", "2"], ["the command sets both `seed_everything` (2) and `seeds` (0..1)"]),
    ],
)
def test_a_mistake_is_one_sentence(argv: list[str], parts: list[str]) -> None:
    text = message(*argv)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("argv", "kind", "part"),
    [
        (["--trainer.gradient_clip_val", "1"], UsageError, "max_grad_norm"),
        (["--trainer.accumulate_grad_batches", "2"], UsageError, "batch_size"),
        (["--trainer.precision", "16-mixed"], UsageError, "bf16-mixed"),
        (["--trainer.accelerator", "gpuu"], UsageError, "gpuu"),
        (["--trainer.default_root_dir", "x"], UsageError, "--folder"),
        (["--trainer.max_steps", "0"], UsageError, "`trainer.max_steps` is 0"),
        (["--data", "bad.npz", "--data.env_id", "Pendulum-v9"], UsageError, "Pendulum-v9"),
        (["--ckpt_path", "last", "--seed", "77"], UsageError, "seed77-*"),
        (["--data", "bad.npz"], DataError, "NaN"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_folder(
    argv: list[str], kind: type[Exception], part: str, home: Path
) -> None:
    n = 40
    column = np.where(np.arange(n) == 7, np.nan, 0.0)
    np.savez(home / "bad.npz", obs=column[:, None], action=np.zeros((n, 1)), reward=np.zeros(n), terminated=np.zeros(n))
    with pytest.raises(kind) as caught:
        fit.main(["--data", "toy", "--root", "refused", *argv])
    assert part in str(caught.value)
    assert not list(Path("refused").glob("*/*/*"))


def test_names_match_whatever_their_spelling() -> None:
    made = cli("--model", "td3+bc", "--data", "Pendulum_Stitch-V0")
    assert type(made.model).__name__ == "TD3BC" and made.datamodule.name == "pendulum-stitch-v0"


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fit.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(text.splitlines()) <= 40 and "TD3BC" in text
    for argv, part in (
        (["--model.help", "iql"], "--model.expectile"),
        (["--model.help", "examples.own_method.AWR"], "--model.beta"),
        (["--help=all"], "--trainer.gradient_clip_val"),
    ):
        with pytest.raises(SystemExit) as caught:
            fit.main(argv)
        assert not caught.value.code and part in capsys.readouterr().out


# -- precedence --------------------------------------------------------------------------------------------------------


def test_no_arguments_are_the_embedded_default() -> None:
    made = cli()
    assert type(made.model).__name__ == "TD3BC" and made.datamodule.name == "pendulum-stitch-v0"
    assert made.config.seed_everything == 0
    recipe = read_command([]).recipe
    assert recipe is not None and recipe.name == "td3bc/pendulum-stitch-v0"
    assert made.model.hparams.alpha == recipe.settings["model.alpha"]
    assert made.config.trainer.max_steps == recipe.settings["trainer.max_steps"]
    assert made.config_init.run.eval_every == 1000


def test_class_default_then_recipe_then_config_then_flag(home: Path) -> None:
    (home / "mine.yaml").write_text(
        "model:\n  class_path: TD3BC\n  init_args: {alpha: 7, tau: 1e-2}\ntrainer: {max_steps: 2e3}\n"
    )
    assert cli("--recipe", "none").model.hparams.alpha == 2.5
    assert cli().model.hparams.alpha == 10.0
    with_file = cli("--config", "mine.yaml")
    assert with_file.model.hparams.alpha == 7.0 and with_file.model.hparams.tau == 0.01
    assert with_file.config.trainer.max_steps == 2000
    assert with_file.model.hparams.hidden_dims == (64, 64)  # still the recipe's
    for argv in (["--model.alpha=3", "--config", "mine.yaml"], ["--model.alpha", "3", "--model", "td3bc"]):
        assert cli(*argv).model.hparams.alpha == 3.0  # whatever the order


def test_a_model_flag_wins_over_the_file(home: Path) -> None:
    (home / "td3.yaml").write_text("model: {class_path: TD3BC, init_args: {alpha: 7}}\nrun: {block: 5}\n")
    asked = read_command(["--config", "td3.yaml", "--model", "IQL"])
    made = parse(asked)
    assert type(made.model).__name__ == "IQL" and made.config_init.run.block == 5
    assert any("left out" in note for note in asked.notes)


def test_a_misspelt_key_in_a_file_is_named(home: Path) -> None:
    (home / "typo.yaml").write_text("model: {init_args: {alpa: 7}}\n")
    assert "'--model.alpha'" in message("--config", "typo.yaml")
    (home / "broken.yaml").write_text("model: {")
    assert "broken.yaml cannot be read as YAML" in message("--config", "broken.yaml")
    (home / "list.yaml").write_text("- 1")
    assert "holds list" in message("--config", "list.yaml")


def test_one_seed_replaces_several_and_several_one(home: Path) -> None:
    (home / "one.yaml").write_text("seed_everything: 5\n")
    (home / "several.yaml").write_text("seeds: [3, 4]\n")
    one, several = ["--config", "one.yaml"], ["--config", "several.yaml"]
    for argv, seed, seeds in (
        (["--seeds", "0..2"], None, "0..2"),
        (["--seeds", "7"], 7, None),
        (several, None, "3,4"),
        ([*one, "--seeds", "0,9"], None, "0,9"),
        ([*several, "--seed", "2"], 2, None),
        ([*several, *one], 5, None),
    ):
        config = cli(*argv).config
        assert (config.seed_everything, config.seeds) == (seed, seeds), argv
    (home / "both.yaml").write_text("seed_everything: 5\nseeds: 0..2\n")
    assert "both.yaml sets both `seed_everything` (5) and `seeds` (0..2)" in message("--config", "both.yaml")


def test_several_seeds_train_at_once_and_go_on(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    argv = ["--data", "toy", "--model", "BC", *SMALL, *SHORT]
    assert fit.main([*argv, "--seeds", "10..12", "--trainer.max_steps", "30"]) == 0
    joint = Path("runs", "toy", "BC", "seeds10-12-1")
    out, err = capsys.readouterr()
    assert re.search(r"30/30  .*return_mean -[\d.]+ ± [\d.]+  actor_loss [\d.]+ ± [\d.]+", err), err
    for part in (
        "BC on toy, seeds 10–12",
        f"each seed {joint.with_name('seed10-1')}, ",
        "  memory    about ",
        f"folder    {joint} (new)",
        "(95 % interval of the mean of 3 seeds)",
    ):
        assert part in out, out
    assert fit.main(["--ckpt_path", str(joint), "--trainer.max_steps", "60"]) == 0
    assert f"{joint} (continuing at update 30 of 60)" in capsys.readouterr().out

    own, alone = joint.with_name("seed11-1"), run(*argv, "--seed", "11")
    assert (own / "config.yaml").read_text() == (alone / "config.yaml").read_text()
    last = [Table(folder / "evals.csv").rows()[-1]["eval/return_mean"] for folder in (own, alone)]
    assert last[0] == pytest.approx(last[1], rel=1e-3)
    assert fit.main(["--config", str(joint), "--seed", "11", "--folder", "again"]) == 0
    assert Table("again/evals.csv").rows() == Table(alone / "evals.csv").rows()
    with pytest.raises(UsageError, match=r"holds the seeds 10..12, and `seed` is 11; expected no `seed`. Pass the fol"):
        fit.main(["--ckpt_path", str(joint), "--seed", "11"])


def test_recipes_by_name_and_where_none_fits() -> None:
    assert cli("--model", "BC", "--recipe", "best-tenth").model.hparams.top == 0.1
    assert cli("--config", "iql/antmaze").model.hparams.reward_transform == "r-1"
    plain = cli("--data", "toy", "--model", "own_algo.Mine", "--model.strength", "2")
    assert plain.config.trainer.max_steps == 1_000_000 and plain.model.hparams.strength == 2.0
    assert read_command(["--data", "toy"]).recipe is None


def test_print_config_repeats_itself(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        fit.main(["--model", "IQL", "--model.beta", "4", "--print_config"])
    assert caught.value.code == 0
    (home / "printed.yaml").write_text(capsys.readouterr().out)
    again = cli("--config", "printed.yaml")
    assert type(again.model).__name__ == "IQL" and again.model.hparams.beta == 4.0
    assert again.model.hparams == cli("--model", "IQL", "--model.beta", "4").model.hparams


def test_print_config_says_how_many_updates_own_data_get(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    """300 steps of a file: 10,000 updates, not the million of known tasks; what the user says stays."""
    for more, expected, words in (([], 10_000, "100 epochs of 300 steps"), (["--trainer.max_steps", "7"], 7, "")):
        with pytest.raises(SystemExit):
            fit.main(["--data", "toy", "--model", "BC", *more, "--print_config"])
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed)["trainer"]["max_steps"] == expected
        assert printed.startswith(f"# trainer.max_steps: {words}") == bool(words)
        (home / "printed.yaml").write_text(printed)
        assert cli("--config", "printed.yaml").config.trainer.max_steps == expected


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BC", "TD3BC", "IQL", "own_algo.Mine"])
def test_a_run_leaves_its_files_and_can_be_repeated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [] if "Mine" in name else SMALL
    folder = run("--data", "toy", "--model", name, *sizes, *SHORT)
    shown = capsys.readouterr()
    short = name.rpartition(".")[2]
    assert folder.parent == Path("runs", "toy", short)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "command.txt", "versions.json", "metrics.csv", "evals.csv", "checkpoints",
    }  # fmt: skip
    assert [row["step"] for row in Table(folder / "evals.csv").rows()] == [30, 60]
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["data"]["fingerprint"] and versions["simulator"]
    for part in (f"{short} on toy, seed 0", "300 steps in 30 episodes", "60 of batch size 16", f"{folder} (new)",
                 "Done at update 60", f"python -m offpolicy.evaluate {folder}"):  # fmt: skip
        assert part in shown.out, shown.out
    assert len(shown.out.splitlines()) < 20
    assert "60/60" in shown.err and "Warning" not in shown.err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["name"] == "toy" and config["recipe"] == "none" and config["ckpt_path"] is None

    trust = ["--trust", "own_algo"] if "Mine" in name else []  # a file does not name code of others by itself
    again = run("--config", str(folder / "config.yaml"), *trust)
    first, second = (read_checkpoint(newest_checkpoint(f) or "") for f in (folder, again))
    assert again != folder
    assert all(torch.equal(v, second["state_dict"][k]) for k, v in first["state_dict"].items())


def test_own_data_get_a_number_of_updates_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def not_fit(method: Any, data: Any, **options: Any) -> SimpleNamespace:
        seen.update(options, config=yaml.safe_load(options["origin"].config), lines=options["origin"].lines)
        return SimpleNamespace(interrupted=0)

    monkeypatch.setattr(cli_module.api, "fit", not_fit)
    argv = ["--data", "toy", "--model", "BC"]  # 300 steps
    for more, expected in (
        ([], 10_000),
        (["--model.batch_size", "2"], 15_000),
        (["--trainer.max_steps", "7"], 7),
        (["--recipe", "none"], 10_000),
    ):
        assert fit.main([*argv, *more]) == 0
        assert seen["max_steps"] == seen["config"]["trainer"]["max_steps"] == expected
        assert any("100 epochs of 300 steps" in line for line in seen["lines"]) == (expected != 7)
    monkeypatch.setattr(cli_module, "MAX_STEPS", 12_000)
    assert fit.main([*argv, "--model.batch_size", "2"]) == 0
    assert seen["max_steps"] == 12_000


def test_the_first_screen_counts_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    run("--data", "toy", "--model", "BC", *SMALL, *SHORT, "--seed", "8")
    rows = 300
    shown = capsys.readouterr().out
    assert f"60 of batch size 16, {60 * 16 / rows:.2g} epochs" in shown, shown
    assert "\n  evaluate  python -m offpolicy.evaluate runs" in shown


OWN_ENV = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

__version__ = "1.2"


class Reach(PendulumEnv):
    pass


gymnasium.register("Reach-v0", "own_reach:Reach", max_episode_steps=10)
"""


def test_an_environment_of_ones_own(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "own_reach.py").write_text(OWN_ENV)
    n = 40
    columns = {"obs": np.zeros((n, 3)), "action": np.zeros((n, 1)), "reward": np.zeros(n), "terminated": np.zeros(n)}
    np.savez(home / "reach.npz", **columns, episode_end=np.arange(n) % 10 == 9)
    argv = ["--data", "reach.npz", "--model", "BC", *SMALL, *SHORT, "--data.env_id"]
    with pytest.raises(UsageError, match="module:Id"):
        fit.main([*argv, "Reach-v0"])
    folder = run(*argv, "own_reach:Reach-v0")
    row = Table(folder / "evals.csv").rows()[-1]
    assert row["env"] == "own_reach:Reach-v0 on own_reach 1.2" and "not installed" not in str(row["score_kind"])
    assert row["eval/length_mean"] == 10.0


@pytest.mark.slow
def test_continuing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", "toy", "--model", "BC", *SMALL, *SHORT, "--seed", "5"]
    folder = run(*argv)
    assert fit.main([*argv, "--ckpt_path", "last"]) == 0
    assert "has 60 updates" in capsys.readouterr().out
    assert fit.main([*argv, "--ckpt_path", "last", "--trainer.max_steps", "90", "--model.actor_lr", "1e-4"]) == 0
    shown = capsys.readouterr().out
    assert f"{folder} (continuing at update 60 of 90)" in shown and "actor_lr 0.0003 → 0.0001" in shown
    assert [row["step"] for row in Table(folder / "evals.csv").rows()] == [30, 60, 90]
    assert len((folder / "command.txt").read_text().splitlines()) == 2

    earlier = folder / "checkpoints" / "step=00000060.ckpt"  # no longer the newest: goes on in a folder of its own
    assert fit.main(["--ckpt_path", str(earlier), "--trainer.max_steps", "120"]) == 0
    other = folder.with_name("seed5-2")
    assert [row["step"] for row in Table(other / "evals.csv").rows()] == [30, 60, 90, 120]
    assert [row["step"] for row in Table(folder / "evals.csv").rows()] == [30, 60, 90]

    with pytest.raises(UsageError, match="hidden_dims"):
        fit.main(["--ckpt_path", str(folder), "--model.hidden_dims", "[4]", "--trainer.max_steps", "200"])
    with pytest.raises(UsageError, match="Pass the same method"):
        fit.main(["--ckpt_path", str(folder), "--model", "TD3BC", "--trainer.max_steps", "200"])
    with pytest.raises(UsageError, match="holds a run"):
        fit.main(["--data", "toy", "--folder", str(folder)])


def test_evaluating_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("--data", "toy", "--model", "BC", *SMALL, *SHORT, "--seed", "6")
    assert evaluate.main([str(folder), "--episodes", "2"]) == 0
    shown = capsys.readouterr().out
    (file,) = folder.glob("evaluation-*.json")
    content = json.loads(file.read_text())
    assert content["updates"] == 60 and len(content["returns"]) == 2 and str(file) in shown
    assert content["return_mean"] == Table(folder / "evals.csv").rows()[-1]["eval/return_mean"]  # same start states
    for argv, part in (([str(folder), "--episods", "2"], "--episods"), (["nowhere"], "nowhere"), ([], "run")):
        with pytest.raises(UsageError, match=part):
            evaluate.main(argv)


def test_exit_codes(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("empty.npz", obs=np.zeros((0, 1)), action=np.zeros((0, 1)), reward=np.zeros(0), terminated=np.zeros(0))
    (home / "full").write_text("")
    cases = {
        2: (["--model", "TD4BC"], "TD3BC"),
        3: (["--data", "empty.npz"], "holds no steps"),
        1: (["--data", "toy", "--root", "full"], "Could not write full"),
    }
    for code, (argv, part) in cases.items():
        monkeypatch.setattr(sys, "argv", ["fit", *argv])
        with pytest.raises(SystemExit) as caught:
            entry.run(fit.main)
        error = capsys.readouterr().err
        assert caught.value.code == code and part in error and error.startswith("Error: ")


# -- as a process ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_and_name_the_command_that_goes_on(sent: signal.Signals, code: int, home: Path) -> None:
    """The run for Ctrl-C has two processes; each is stopped in a block and goes on as it printed."""
    argv = ["--data", "toy", "--model", "BC", *SMALL, "--trainer.max_steps", "100000000", "--run.eval_every", "100"]
    argv += ["--run.eval_episodes", "1", "--root", "stopped", "--seed", str(sent.value)]
    if sent is signal.SIGINT:
        argv += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    process = start_command("-m", "offpolicy.fit", *argv, folder=home)
    try:
        end = time.monotonic() + 150
        while "\n      100/" not in process.output and time.monotonic() < end and not process.ended():
            time.sleep(0.05)
        assert "\n      100/" in process.output, process.output
        os.kill(process.pid, sent)
    finally:
        finish(process, timeout=60)
    shown = process.output
    assert process.returncode == code, shown
    folder = Path("stopped", "toy", "BC", f"seed{sent.value}-1")
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None and "Traceback" not in shown
    resume = f"python -m offpolicy.fit --ckpt_path {folder}"
    assert shown.count(resume) == shown.count(f"seed {sent.value}") == 1
    assert ("2 processes" in shown) == (sent is signal.SIGINT)
    assert len(list(folder.parent.glob(f"seed{sent.value}-*"))) == 1
    updates = read_checkpoint(checkpoint)["global_step"]
    one = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.max_steps", str(updates + 10)]
    assert fit.main([*shlex.split(resume)[3:], *one]) == 0
    assert [row["step"] for row in Table(folder / "evals.csv").rows()][:1] == [100]
    assert read_checkpoint(newest_checkpoint(folder) or "")["global_step"] == updates + 10
