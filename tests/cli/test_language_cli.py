"""Language models from the command line: options, messages, files of a run, continuing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_policy, write_pairs

from offpolicy import evaluate, fit, load
from offpolicy.api import data_name
from offpolicy.cli.arguments import read_command
from offpolicy.cli.parser import parse
from offpolicy.data.texts.module import TextData
from offpolicy.errors import DataError, UsageError
from offpolicy.files import Table

pytestmark = pytest.mark.usefixtures("in_home")

SMALL = ["--data", "pairs.jsonl", "--model.policy", "policy", "--model.batch_size", "16", "--model.lr", "1e-3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_policy(folder / "policy")
    write_pairs(folder / "pairs.jsonl", 60)
    (folder / "own_loss.py").write_text(OWN)
    return folder


OWN = '''
import torch
from offpolicy.language.module import LanguageModule


class Hinge(LanguageModule):
    """A margin between mean log-probabilities.

    Args:
        margin: in nats.
    """

    uses_reference = False

    def __init__(self, *, margin: float = 1.0, **language) -> None:
        super().__init__(**language)
        self.save_hyperparameters()

    def loss(self, scores):
        gap = scores.chosen.mean_logps - scores.rejected.mean_logps
        return (self.hparams.margin - gap).clamp(min=0.0), {"gap": gap.detach()}
'''


def message(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(read_command(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_train_and_go_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit.main(["--model", "dpo", *SMALL, "--run.eval_every", "2", "--run.log_every", "2"]) == 0
    said = capsys.readouterr().out
    folder = home / "runs" / "pairs" / "DPO" / "seed0-1"
    for part in ("DPO on pairs", "preference pairs", "4 of 16 rows, 1 epochs", "held-out rows", "▶", "generate", "hf'"):
        assert part in said
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints", "command.txt", "config.yaml", "evals.csv", "hf", "margins.csv", "metrics.csv", "tokenizer",
        "versions.json",
    }  # fmt: skip
    assert [row["step"] for row in Table(folder / "metrics.csv").rows()] == [2, 4]
    assert "eval/rewards/accuracies" in Table(folder / "evals.csv").rows()[-1]
    shutil.rmtree(folder / "hf")
    assert fit.main(["--model", "DPO", *SMALL, "--ckpt_path", "last"]) == 0
    assert "nothing to do" in capsys.readouterr().out and (folder / "hf").is_dir()
    before = tuned(folder)
    assert fit.main(["--ckpt_path", str(folder), "--model.epochs", "1.5"]) == 0
    said = capsys.readouterr().out
    assert not torch.equal(before, tuned(folder)) and torch.equal(tuned(folder), last_weights(folder))
    assert not list(folder.glob(".hf*"))
    assert evaluate.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    accuracy = Table(folder / "evals.csv").rows()[-1]["eval/rewards/accuracies"]
    assert re.search(rf"rewards/accuracies +{accuracy:.4g}\n", shown) and "after update 6" in shown
    assert "continuing at update 4 of 6" in said and "found" in said
    assert [row["step"] for row in Table(folder / "metrics.csv").rows()] == [2, 4, 6]


def tuned(folder: Path) -> torch.Tensor:
    """The head of the model that a run left for transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "hf").lm_head.weight.detach()


def last_weights(folder: Path) -> torch.Tensor:
    loaded: Any = load(folder)
    return loaded.model.lm_head.weight


def test_converted_texts(home: Path) -> None:
    """A folder of our format may hold either world; the wrong method says so."""
    from offpolicy.data.__main__ import main

    assert main(["convert", "pairs.jsonl", "converted", "--tokenizer", "policy"]) in (0, None)
    assert fit.main(["--model", "DPO", *SMALL[2:], "--data", "converted", "--trainer.max_steps", "1"]) == 0
    with pytest.raises(DataError, match=r"holds token and no `obs`.*such as DPO"):
        fit.main(["--model", "BC", "--data", "converted", "--trainer.max_steps", "1"])
    assert not (home / "runs" / "converted" / "BC").exists()


def test_a_users_own_loss(home: Path) -> None:
    assert fit.main(["--model", "own_loss.Hinge", *SMALL, "--model.margin", "0.5", "--trainer.max_steps", "1",
                     "--model.export", "none"]) == 0  # fmt: skip
    assert not (home / "runs" / "pairs" / "Hinge" / "seed0-1" / "hf").exists()
    row = Table(home / "runs" / "pairs" / "Hinge" / "seed0-1" / "metrics.csv").rows()[0]
    assert row["step"] == 1 and row["train/gap"] != 0.0


def test_defaults_are_those_of_language_models() -> None:
    cli = parse(read_command(["--model", "SimPO", *SMALL]))
    assert cli.config.run.log_every == 10 and cli.config.run.eval_every is None
    assert cli.config.trainer.max_steps == -1 and cli.config.data.max_length == 1024


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model", "DPO"], ["needs --data", ".jsonl"]),
        (["--model", "DPO", "--data", "pendulum-stitch-v0"], ["which pendulum-stitch-v0 does not hold"]),
        (["--model", "BC", "--data", "pairs.jsonl"], ["control method", "pairs.jsonl is read as texts"]),
        (["--model", "DPO", *SMALL, "--model.btach_size", "3"], ["not an option of DPO", "'--model.batch_size'"]),
        (["--model", "DPO", *SMALL, "--model.bata", "3"], ["'--model.beta'"]),
        (["--model", "DPO", *SMALL, "--model.batch_size", "x"], ["--model.batch_size is 'x'", "int"]),
        (["--model", "DPO", *SMALL, "--data.max_lenght", "3"], ["'--data.max_length'"]),
        (["--model", "DPO", *SMALL, "--model.lr_schedule", "up"], ["cosine, linear, constant"]),
        (["--model", "DPO", *SMALL, "--model.export", "gguf"], ["auto, merged, none"]),
        (["--model", "BC", "--data", "org/set"], ["no data set is called 'org/set'"]),
    ],
    ids=str,
)
def test_mistakes(argv: list[str], parts: list[str]) -> None:
    said = message(*argv)
    assert all(part in said for part in parts), said


def test_an_id_of_the_hub_is_one_for_language_models_only() -> None:
    for name in ("org/set", "org/set-v2"):  # the second looks like one of Minari
        assert read_command(["--model", "DPO", "--data", name]).texts
        assert data_name(TextData(name)) == name
    assert read_command(["--model", "BC", "--data", "org/set-v2"]).texts is False
    with pytest.raises(UsageError):
        read_command(["--model", "BC", "--data", "org/set"])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model", "DPO", "--data", "pairs.jsonl"], "given no policy"),
        (["--model", "DPO", *SMALL, "--model.policy", "nowhere"], "'nowhere' is no folder here"),
        (["--model", "DPO", *SMALL, "--trainer.accumulate_grad_batches", "2"], "micro_batch_size"),
        (["--model", "DPO", *SMALL, "--trainer.max_epochs", "2"], "--model.epochs"),
    ],
    ids=str,
)
def test_mistakes_that_a_run_finds(argv: list[str], parts: str, home: Path) -> None:
    runs = set(home.glob("runs/*/*/*"))
    with pytest.raises(UsageError, match=parts):
        fit.main(argv)
    assert set(home.glob("runs/*/*/*")) == runs  # nothing is left


@pytest.mark.parametrize("what", ["--model.help=DPO", "--print_config"])
def test_help_and_settings(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [what] if "help" in what else ["--model", "DPO", *SMALL, what]
    with pytest.raises(SystemExit) as end:
        fit.main(argv)
    said = capsys.readouterr().out
    assert end.value.code in (0, None)
    for option in ("beta", "policy", "micro_batch_size", "lora_rank", "ref_cache", "shared_prompt"):
        assert option in said
