"""Whole runs of methods on the pretend device, in a process of their own: ``runs.py FOLDER NAME …``.

Prints one JSON object per method: what was tried → "" or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers"), str(HERE.parents[1])]

import pretend  # noqa: E402

if __name__ == "__main__":
    torch = pretend.install()  # before anything imports torch

import inspect  # noqa: E402

import counting  # noqa: E402
import numpy as np  # noqa: E402
import recorded  # noqa: E402
import tiny  # noqa: E402
import tiny_rl  # noqa: E402
import toy  # noqa: E402

import offpolicy  # noqa: E402
from offpolicy.data.texts.module import TextData  # noqa: E402
from offpolicy.data.texts.problems import ProblemData  # noqa: E402
from offpolicy.export import export  # noqa: E402
from offpolicy.language import policy as policies  # noqa: E402
from offpolicy.language.generation import sample  # noqa: E402
from offpolicy.language.preference import PreferenceModule  # noqa: E402
from offpolicy.language.rl.iterating import IteratingModule  # noqa: E402
from offpolicy.registry import find_method  # noqa: E402
from offpolicy.training import graph, run_folder  # noqa: E402
from offpolicy.training.checkpoints import read_checkpoint  # noqa: E402
from offpolicy.training.goals import GoalModule  # noqa: E402
from offpolicy.training.offline import OfflineModule, Sizes  # noqa: E402

SMALL: dict[str, Any] = {  # options that a method may have, for methods without a line in `toy.METHODS`
    "batch_size": 16,
    "hidden_dims": (8, 8),
    "actor_hidden_dims": (8, 8),
    "critic_hidden_dims": (8, 8),
    "value_hidden_dims": (8, 8),
    "num_critics": 3,
}
CRITIC = {"advantage": "gae", "value": "squared"}
GROUPS = {"advantage": "drpo", "weight": ["empg"], "terms": ["drpo_contrast", "kl_limit", "empg_clarity"]}
BOUNDS_OF_STEPS = {
    "ratio": "turn",
    "trust": "bapo",
    "entropy": {"name": "siren", "aggregation": "token_mean"},
    "anchors": ["kl_cov", "lp_reg", {"name": "gated_tail", "coef": 0.1, "gate": "low_probability"}],
    "weight": ["steer", "hapo"],
    "terms": ["copg", "sft"],
    "lr": "ess",
}
MASKS_OF_STEPS = {
    "trust": "clip_cov",
    "entropy": "epo",
    "anchors": [{"name": "dph", "divergence": "js"}],
    "lr": {"name": "skip", "ess": 0.01, "kl": 9.0},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {  # of methods, that lead to other code
    "PRDC": [{"search": "tree", "num_neighbors": 3}, {"search": "brute"}, {"state_weight": 0.0}],
    "DPO": [
        {"shared_prompt": False, "micro_batch_size": 1},
        {
            **{"rounds": 2, "prompts": 2, "answers": 4, "batch_size": 4, "max_new_tokens": 4},  # a step each
            **{"rewards": ["tiny_rl.early_letters"], "reference": "round"},
        },
    ],
    "SFT": [{"weighting": "otr", "draws": 3}],
    "GRPO": [
        {
            "engine": "tiny",
            "replay_fraction": 0.5,
            "replay_window": 2,
            "min_ess": 0.1,
            "demonstrations": 1,
            "demonstration_share": 0.5,
        },
        {"objective": CRITIC, "critic": "head"},
        {"objective": BOUNDS_OF_STEPS, "demonstrations": 1, "micro_batch_size": 4},
        {"objective": MASKS_OF_STEPS, "demonstrations": 1},
        {"objective": CRITIC, "critic": "model", "micro_batch_size": 3},
        {"objective": GROUPS},
        {"objective": {"advantage": "opob", "trust": "capo"}, "micro_batch_size": 4},
        {"curriculum": "gain", "hints": {"name": "scaffold", "patience": 1}},
        {"hints": {"name": "written", "tiers": ["a"], "instruction": "{tier}{prompt}{solution}"}, "batch_size": 16},
        {"variant": "aepo", "rewards": ["tiny_rl.ends_early"], "micro_batch_size": 3},
        {"variant": "t_ppo", "window": 2, "group_size": 1, "minibatches": 1, "micro_batch_size": 3},
        {"correction": "score", "objective": {"anchors": [{"name": "turn_kl", "coef": 0.1}]}},
    ],
}
WHOLE = ("DPO", "KTO", "ORPO", "SFT", "GRPO", "ReMix", "RLPlus")  # others differ from one of them in their losses alone
BLOCK: Counter[str] = Counter()  # reads of the host inside blocks of updates


def watch_blocks() -> None:
    run_folder.plot_curves = lambda *_: None  # the picture costs more than the runs here
    os.fsync = lambda handle: None  # and so does waiting for the disk
    graph.GraphRecorder = recorded.Recorder  # type: ignore[misc, assignment]
    run_block = OfflineModule.run_block

    def watched(self: OfflineModule, t: int, k: int) -> None:
        with pretend.reads() as found:
            run_block(self, t, k)
        BLOCK.update(found)

    OfflineModule.run_block = watched  # type: ignore[method-assign]
    for kind in (PreferenceModule, IteratingModule):
        watch_steps(kind)


def watch_steps(kind: Any) -> None:
    """Count the reads of a step of a language method; the first one of answers is heard on the host."""
    step = kind.training_step

    def watched(self: Any, tick: Any, batch_idx: int) -> Any:
        first = self.course.begins(self.global_step) if kind is IteratingModule else self.global_step == 0
        with pretend.reads() as found:
            loss = step(self, tick, batch_idx)
        if not first:
            BLOCK.update(found)
        return loss

    kind.training_step = watched


class Place:
    """A folder for the runs of one method, the policy that language methods tune, and how methods are made."""

    def __init__(self, name: str, root: Path, policy: Path) -> None:
        self.name, self.root, self.policy = name, root, policy
        self.kind: Any = find_method(toy.METHODS[name][0] if name in toy.METHODS else name)
        self.rolls_out = issubclass(self.kind.data_class(), ProblemData)
        self.short = (2, 2) if self.kind.trains_on_texts else (4, 4)  # updates, and those between evaluations

    def method(self, **options: Any) -> Any:
        if self.kind.trains_on_texts:
            return (tiny_rl if self.rolls_out else tiny).method(self.name, self.policy, **options)
        if self.name not in toy.METHODS:
            known = {name for cls in self.kind.__mro__ for name in inspect.signature(cls.__init__).parameters}
            toy.METHODS[self.name] = (self.name, {k: v for k, v in SMALL.items() if k in known})
        return toy.method(self.name, **options)

    def data(self, method: Any) -> Any:
        if self.rolls_out or getattr(method, "in_rounds", False):
            told = method.hparams.get("hints") or method.hparams.get("correction")  # these need texts
            problems = tiny_rl.told_problems(self.policy) if told else tiny_rl.toy_problems()
            return ProblemData.of(problems, tiny_rl.toy_problems(5, seed=1))
        if self.kind.trains_on_texts:
            return TextData.of(tiny.toy_texts(self.name), tiny.toy_texts(self.name, 5, 1))
        return toy.toy_replay()

    def fit(self, folder: str, method: Any, max_steps: int, every: int, **options: Any) -> Any:
        BLOCK.clear()
        found = offpolicy.fit(
            method,
            self.data(method),
            max_steps=max_steps,
            folder=self.root / self.name / folder,
            verbose=False,
            log_every=every,
            eval_every=every,
            eval_episodes=1,
            **options,
        )
        assert found.updates == max_steps
        assert not BLOCK, f"the host reads values inside a block of updates: {dict(BLOCK)}"
        return found

    def checkpoint(self, folder: str, update: int) -> Path:
        return self.root / self.name / folder / "checkpoints" / f"step={update:08d}.ckpt"


def state(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    return {part: content[part] for part in ("state_dict", "optimizer_states")}


def on_device(place: Place) -> None:
    """A fit trains there, with evaluation and checkpoints; an interrupted one goes on bit by bit."""
    total, every = (4, 2) if place.kind.trains_on_texts else (12, 6)
    method, recorded.Recorder.repeated = place.method(), 0
    with pretend.reads() as reads:
        found = place.fit("whole", method, total, every)
    waits = sum(count for what, count in reads.items() if what.startswith("synchronize"))
    assert 2 <= waits <= 4, reads  # for each of the two rows, and for the evaluation beside it
    assert method.trainer.strategy.root_device.type == "cuda"
    assert set(found.method.metric_row) > {"step"}
    half = place.checkpoint("whole", every)
    place.fit("resumed", place.method(), total, every, ckpt_path=half)
    apart = toy.differences(state(place.checkpoint("whole", total)), state(place.checkpoint("resumed", total)))
    assert not apart, apart[:3]
    if isinstance(method, OfflineModule):
        assert bool(method.has_dropout) != bool(recorded.Recorder.repeated), "blocks are repeated as graphs"
        place.fit("dry", place.method(), *place.short, graph="dry")


def mixed(place: Place) -> None:
    """bf16-mixed, in a script whose default device is the GPU."""
    torch.set_default_device("cuda")
    try:
        place.fit("mixed", place.method(), *place.short, precision="bf16-mixed")
    finally:
        torch.set_default_device(None)


def low(place: Place) -> None:
    """bf16-true."""
    place.fit("low", place.method(), *place.short, precision="bf16-true")


def adapters(place: Place) -> None:
    """LoRA under bf16-mixed, merged at the end."""
    options = {"lora_rank": 2, "export": "merged", "gradient_checkpointing": True}
    if getattr(place.kind, "uses_reference", False):
        options["reference"] = "adapter_off"
    found = place.fit("adapters", place.method(**options), 2, 2, precision="bf16-mixed")
    assert (found.folder / "hf" / "config.json").exists()


def live(place: Place) -> None:
    """The reference as a frozen copy beside the policy."""
    place.fit("live", place.method(reference="live"), 2, 2)


def answers(place: Place) -> None:
    """A trained model answers prompts there, and is written for others."""
    model = offpolicy.load(place.root / place.name / "whole").to("cuda").model
    drawn = sample(model, [np.array([5, 6, 7]), np.array([8])], stop=[2], num_samples=2, max_new_tokens=4, top_p=0.9)
    assert [len(some) for some in drawn] == [2, 2]
    loaded = offpolicy.load(place.root / place.name / "whole").to("cuda")
    export(loaded, place.root / place.name / "written")
    assert policies.open_model(str(place.root / place.name / "written")) is not None


def acts(place: Place) -> None:
    """A trained policy acts there on arrays and on tensors."""
    if place.kind.__name__ in ("TrajectoryDiffusion", "WorldModel", "FQE"):
        return
    method = offpolicy.load(place.root / place.name / "whole").to("cuda")
    obs, there = np.zeros((2, 3), np.float32), torch.zeros(2, 3, device="cuda")
    if place.kind.__name__ == "DecisionTransformer":
        agent = method.agent()
        agent.reset(2)
        action = agent.act(obs)
        agent.observe(np.zeros(2), np.zeros(2, dtype=bool))
    elif isinstance(method, GoalModule):
        action = method.act_goal(obs, np.ones(3, np.float32), temperature=0.5)
        assert method.act_goal(there, there).device.type == "cuda"
    else:
        action = method.act(obs)
        assert method.act(there).device.type == "cuda"
    assert isinstance(action, np.ndarray) and action.shape == (2, 1)


def seeds(place: Place) -> None:
    """A block of updates of two seeds at once."""
    replay = toy.toy_replay()
    method = place.method()
    if not method.seed_axis:
        return
    method.seeds = (0, 1)
    method.initialize(Sizes.of(method.select(replay)), 0).to("cuda").prepare(replay)
    BLOCK.clear()
    method.run_block(0, 4)
    assert not BLOCK, dict(BLOCK)
    if place.name == "TD3BC":  # files are the same for all
        joint = place.fit("seeds", place.method(), 8, 4, seeds=(0, 1))
        assert place.fit("alone", place.method(), 12, 4, ckpt_path=joint.folders[1]).updates == 12


def draws(place: Place) -> None:
    """Trajectories are drawn there from a trained model."""
    if place.kind.__name__ == "TrajectoryDiffusion":
        model = offpolicy.load(place.root / place.name / "whole").to("cuda")
        found = offpolicy.sample(model, place.root / place.name / "drawn", trajectories=4, sampling_steps=3, bf16=True)
        assert found.num_episodes >= 4
    if place.kind.__name__ == "WorldModel":
        model = offpolicy.load(place.root / place.name / "whole").to("cuda")
        found = model.rollout(np.zeros((2, 3), np.float32), lambda obs: torch.zeros(2, 1, device=obs.device), steps=3)
        assert found["obs"].device.type == "cuda"


def options(place: Place) -> None:
    """Options that lead to other code."""
    for i, those in enumerate(OPTIONS.get(place.name, [])):
        place.fit(f"options{i}", place.method(**those), *place.short)


def collects(place: Place) -> None:
    """Data are collected by the policy there, and a run goes on bit by bit in the middle of a round."""
    if place.name != "SAC":
        return
    BLOCK.clear()
    found, half = {}, None
    for part in ("collected", "on"):
        folder = place.root / place.name / part
        run = counting.collect(
            None if half else folder, counting.scratch(episodes="keep"), place.method(), ckpt_path=half
        )
        half = run.folder / "checkpoints" / "step=00000015.ckpt"
        found[part] = state(run.folder / "checkpoints" / "step=00000040.ckpt")
    assert not BLOCK, dict(BLOCK)
    assert not toy.differences(*found.values())
    several = counting.collect(place.root / place.name / "several", method=place.method(), seeds=(0, 1))
    assert several.updates == 40 and not BLOCK, dict(BLOCK)


def checks(place: Place) -> list[Callable[[Place], None]]:
    if place.kind.trains_on_texts:
        more = [low, adapters, answers, options] if place.name in WHOLE else []
        return [on_device, mixed, *more, *([live] if place.name == "DPO" else [])]
    return [on_device, mixed, low, acts, seeds, draws, options, collects]


def tried(check: Callable[[Place], None], place: Place) -> str:
    try:
        check(place)
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        lines = [f"{Path(f.filename).name}:{f.lineno}" for f in trace if f.filename.startswith(str(HERE.parents[1]))]
        return f"{type(error).__name__}: {error} ({' > '.join(lines[-4:])})"
    return ""


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch_blocks()
    policy = tiny.make_policy(root / "policy")
    for name in names:
        place = Place(name, root, policy)
        found = {}
        for check in checks(place):
            began = time.process_time()
            found[check.__name__] = tried(check, place)
            print(f"{name} {check.__name__}: {time.process_time() - began:.1f} s", file=sys.stderr)
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # threads that torch started for a device that is none may abort the end of the interpreter
