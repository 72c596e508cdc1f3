"""Import paths of earlier versions, which stand in checkpoints, run folders and users' code, and where they lead now.

A name is looked up here only where no module has it, so this costs nothing until an old path is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {  # module of version 0.1 → where its names are now
    "offpolicy.api": (
        "offpolicy.compute.processes",
        "offpolicy.training.beginning",
        "offpolicy.training.checkpoints",
        "offpolicy.training.origin",
        "offpolicy.training.trainer",
    ),
    "offpolicy.arguments": ("offpolicy.cli.arguments",),
    "offpolicy.callbacks": (
        "offpolicy.training.callbacks",
        "offpolicy.training.measurement",
        "offpolicy.training.run_folder",
        "offpolicy.training.bar",
        "offpolicy.training.headlines",
        "offpolicy.training.run_log",
        "offpolicy.training.checkpoints",
    ),
    "offpolicy.checkpoint": ("offpolicy.training.checkpoints",),
    "offpolicy.checkpoint_io": ("offpolicy.training.checkpoint_io",),
    "offpolicy.cli": ("offpolicy.cli.parser",),
    "offpolicy.data.module": ("offpolicy.api",),  # of a module that is still there, names that moved out of it
    "offpolicy.data.neighbors": ("offpolicy.data.neighbor_search",),
    "offpolicy.data.problems": ("offpolicy.data.texts.problems", "offpolicy.data.texts.sums"),
    "offpolicy.data.replay": ("offpolicy.data.ring", "offpolicy.data.columns"),
    "offpolicy.data.rollouts": ("offpolicy.data.texts.rollouts",),
    "offpolicy.data.sequences": ("offpolicy.data.texts.sequences",),
    "offpolicy.data.sources.formats": ("offpolicy.data.texts.formats",),
    "offpolicy.data.sources.hf": (
        "offpolicy.data.texts.hub",
        "offpolicy.data.texts.opening",
        "offpolicy.data.texts.parts",
    ),
    "offpolicy.data.text": ("offpolicy.data.texts.module",),
    "offpolicy.data.tokenised": ("offpolicy.data.texts.tokenised",),
    "offpolicy.data.trajectories": ("offpolicy.diffusion.trajectories",),
    "offpolicy.data.validate": ("offpolicy.data.report", "offpolicy.data.raw"),
    "offpolicy.diffusion": ("offpolicy.diffusion.sampler",),
    "offpolicy.entry": ("offpolicy.cli.entry",),
    "offpolicy.evaluation.synthetic": ("offpolicy.diffusion.measures", "offpolicy.evaluation.simulators"),
    "offpolicy.files": ("offpolicy.training.curves",),
    "offpolicy.goals": ("offpolicy.training.goals",),
    "offpolicy.language.answering": ("offpolicy.language.rl.answering",),
    "offpolicy.language.critic": ("offpolicy.language.rl.critic",),
    "offpolicy.language.engines": ("offpolicy.language.rl.engines", "offpolicy.language.rl.engine"),
    "offpolicy.language.head": ("offpolicy.language.answer_scores", "offpolicy.language.head_checks"),
    "offpolicy.language.layout": (
        "offpolicy.language.head",
        "offpolicy.language.answer_scores",
        "offpolicy.language.head_checks",
    ),
    "offpolicy.language.module": (
        "offpolicy.language.preference",
        "offpolicy.language.meters",
        "offpolicy.data.texts.sequences",
    ),
    "offpolicy.language.plan": (),
    "offpolicy.language.preview": ("offpolicy.data.texts.preview",),
    "offpolicy.language.records": ("offpolicy.language.rl.records",),
    "offpolicy.language.reference": ("offpolicy.language.reference_cache",),
    "offpolicy.language.rewards": ("offpolicy.language.rl.rewards", "offpolicy.language.rl.verifiers"),
    "offpolicy.language.rollouts": ("offpolicy.language.rl.rollouts",),
    "offpolicy.language.scores": ("offpolicy.losses.scores",),
    "offpolicy.language.scoring": ("offpolicy.language.rl.scoring",),
    "offpolicy.language.sharding": ("offpolicy.training.lightning_private",),
    "offpolicy.language.solving": ("offpolicy.language.rl.solving",),
    "offpolicy.language.tokens": ("offpolicy.data.texts.tokens", "offpolicy.data.texts.rendering"),
    "offpolicy.losses.policy_terms": (
        "offpolicy.losses.policy.ratios",
        "offpolicy.losses.policy.trust",
        "offpolicy.losses.policy.means",
        "offpolicy.losses.policy.anchors",
        "offpolicy.losses.policy.weights",
        "offpolicy.losses.tokens",
    ),
    "offpolicy.matmul": ("offpolicy.compute.matmul",),
    "offpolicy.memory": ("offpolicy.compute.memory",),
    "offpolicy.modules": (
        "offpolicy.training.module",
        "offpolicy.training.acting",
        "offpolicy.training.stepping",
        "offpolicy.training.offline",
        "offpolicy.training.drawing",
        "offpolicy.training.meter",
        "offpolicy.data.sizes",
        "offpolicy.data.views",
        "offpolicy.compute.optim",
    ),
    "offpolicy.optim": ("offpolicy.compute.optim",),
    "offpolicy.nn.critics": (),
    "offpolicy.options": ("offpolicy.training.options", "offpolicy.data.renewal", "offpolicy.given"),
    "offpolicy.screen": ("offpolicy.training.screen",),
    "offpolicy.synthetic": ("offpolicy.diffusion.pool", "offpolicy.diffusion.drawing", "offpolicy.diffusion.opening"),
}
RENAMED = {  # name of version 0.1 → where it is now under another name
    "offpolicy.cli.lines": "offpolicy.cli.parser.recipe_notes",
    "offpolicy.data.problems.select": "offpolicy.data.texts.problems.select_problems",
    "offpolicy.data.problems.sketch": "offpolicy.data.texts.problems.sketch_problems",
    "offpolicy.data.rollouts.joined": "offpolicy.data.texts.rollouts.merged_answers",
    "offpolicy.data.rollouts.select": "offpolicy.data.texts.rollouts.select_answers",
    "offpolicy.data.sources.hf.select": "offpolicy.data.texts.parts.select_rows",
    "offpolicy.nn.critics.joined": "offpolicy.nn.critics.state_action",
    "offpolicy.language.engines.choose": "offpolicy.language.rl.engines.draw_scored",
    "offpolicy.language.engines.uniforms": "offpolicy.language.rl.engines.answer_uniforms",
    "offpolicy.language.layout.States": "offpolicy.language.head.FinalStates",
    "offpolicy.language.layout.states": "offpolicy.language.answer_scores.final_states",
    "offpolicy.language.records.cut": "offpolicy.language.rl.records.cut_answer",
    "offpolicy.language.plan.Plan": "offpolicy.language.plan.RowPlan",
    "offpolicy.language.reference.cache_folder": "offpolicy.language.reference_cache.references_folder",
    "offpolicy.language.reference.Table": "offpolicy.language.reference.ReferenceTable",
    "offpolicy.losses.policy_terms.TokenMean": "offpolicy.losses.policy.means.StepTokenMean",
    "offpolicy.losses.policy_terms.choose": "offpolicy.errors.check_choice",
    "offpolicy.synthetic.Plan": "offpolicy.diffusion.drawing.TrajectoryPlan",
    "offpolicy.synthetic.opened": "offpolicy.diffusion.drawing.opened_replay",
    "offpolicy.synthetic.draw": "offpolicy.diffusion.drawing.draw_trajectories",
}
SPLIT = {  # class of version 0.1 that became several → the one that a class which extends it directly extends now
    "offpolicy.language.module.LanguageModule": "offpolicy.language.preference.PreferenceModule",
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old module: the new one under its old name, or an empty one that fetches names from several."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        names = MOVED[module.__name__]
        renamed = any(name.startswith(f"{module.__name__}.") for name in RENAMED)
        if len(names) == 1 and not renamed:  # the same module, so that what is set on the one is set on the other
            sys.modules[module.__name__] = importlib.import_module(names[0])
        else:
            module.__getattr__ = names_of(module.__name__)  # type: ignore[method-assign]


def names_of(old: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for the names that a module of version 0.1 had."""

    def get(name: str) -> Any:
        path = vars(sys.modules[old]).get("__path__", ())  # of a package that has the name of the former module
        if f"{old}.{name}" in RENAMED:
            return _named(RENAMED[f"{old}.{name}"])
        if not name.startswith("__") and PathFinder.find_spec(f"{old}.{name}", path) is None:
            for new in MOVED[old]:
                module = importlib.import_module(new)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module '{old}' has no attribute '{name}'")

    return get


def extend_successors(cls: type) -> None:
    """Let a new class of somebody else extend the successor where it extends a class of version 0.1 that was split.

    Called by that class's ``__init_subclass__``; classes of this library say what they extend themselves.
    """
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return
    cls.__bases__ = tuple(_successor(base) for base in cls.__bases__)


def _successor(base: type) -> type:
    found = SPLIT.get(f"{base.__module__}.{base.__qualname__}")
    return base if found is None else _named(found)


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def install() -> None:
    """Let old paths be found, after all others."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
