"""What a method says of itself: every word on the first screen, and the command at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import fit, toy_replay

import offpolicy as op
from offpolicy.training.description import Description
from offpolicy.training.origin import Origin, resume_words
from offpolicy.trust import packages_to_trust


class Talkative(op.TD3BC):
    def describe(self) -> Description:
        return Description(
            facts=[("weather", "fair")],
            batch="one spoon",
            evaluates="the taste",
            notes=["Stir well."],
            samples="a row of the data",
            look="taste {folder}",
        )


def test_every_line_reaches_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    op.fit(Talkative(hidden_dims=(8,), batch_size=4), toy_replay(), max_steps=2, eval_episodes=0, folder=tmp_path)
    before, samples, after = capsys.readouterr().out.partition("\n\na row of the data\n")
    assert samples and f"taste {tmp_path} --trust {__name__}" in after  # the class is none of the library's
    for line in ("weather   fair", "updates   2 of one spoon", "updates, the taste", "note      Stir well."):
        assert line in before, line


def test_commands_that_go_on_name_what_has_to_be_trusted(tmp_path: Path) -> None:
    own = packages_to_trust(
        [f"{__name__}.Talkative", f"{__name__}:Mine-v0", "offpolicy.BC", "lightning.a.B", "Hopper-v5"]
    )
    assert own == (__name__,)
    assert packages_to_trust(["json.jsonl", "no_such_package.f", "__main__.Mine"]) == ()
    folder = tmp_path / "a run"
    told = resume_words(folder, Origin(command="python -m offpolicy.fit", trust=("mine", "yours")))
    assert told == f"python -m offpolicy.fit --ckpt_path '{folder}' --trust mine,yours"
    assert "--trust" not in resume_words(folder, Origin(command="python -m offpolicy.fit"))


def test_a_control_method_tells_data_sizes_batch_and_evaluation() -> None:
    """30 episodes of 10 steps are 300 rows; 90 updates of 16 rows see them 90·16/300 = 4.8 times."""
    told: list[Description] = []

    class Ask(op.BC):
        def on_train_start(self) -> None:
            told.append(self.describe())

    module: Any = Ask(hidden_dims=(8, 8), batch_size=16)
    module.run.eval_episodes = 0
    fit(module, toy_replay(), 90)
    (found,) = told
    assert found.batch == "batch size 16, 4.8 epochs" and found.evaluates == ""
    assert dict(found.facts)["data"] == "300 steps in 30 episodes, 10 steps at most (arrays)"
    assert dict(found.facts)["sizes"] == "observation 3, action 1, 113 parameters"
    module.run.eval_episodes = 2
    assert module.describe().evaluates == "2 episodes of Pendulum-v1"
    assert module.describe().look == "python -m offpolicy.evaluate {folder}"
    module.run.eval_episodes = 1
    assert module.describe().evaluates == "1 episode of Pendulum-v1"
    module.data_meta = {**module.data_meta, "env_id": None}  # there is nothing to evaluate in
    assert module.describe().look == "python -m offpolicy.export {folder} policy.pt2"
