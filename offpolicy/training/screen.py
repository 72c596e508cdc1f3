"""What a run tells its user: the first screen, the last lines, and the versions it was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offpolicy.compute.room import size
from offpolicy.evaluation.scores import score_kind, simulator_version
from offpolicy.given import seeds_text
from offpolicy.training.background import LEAST
from offpolicy.training.description import Description
from offpolicy.training.headlines import scores_line
from offpolicy.training.keeping import Keeping
from offpolicy.training.seed_room import memory_words
from offpolicy.version import __version__

DROPOUT = "Dropout masks are drawn for all seeds together, so each seed has others than its single run."
LABEL = 10  # width of the labels


def line(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def first_screen(
    trainer: Any, method: Any, folder: Path, extra: list[str], described: Description | None = None
) -> str:
    """What will happen, in lines; shown once the data are open and the settings chosen.

    Args:
        trainer: the Lightning Trainer at the start of training.
        method: the module being trained.
        folder: of the run.
        extra: further lines, after that of the method.
        described: what the method says of itself; None asks it.
    """
    meta, now, total = method.data_meta, trainer.global_step, trainer.max_steps
    device = str(trainer.strategy.root_device)
    if device.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(trainer.strategy.root_device)
    if trainer.world_size > 1:
        device = f"{trainer.world_size} processes on {device}"
    from offpolicy.compute.matmul import library_in_words

    threads, matmul = settings_in_use(method)
    described = described or method.describe()
    which = f"seeds {seeds_shown(method.seeds)}" if method.seeds else f"seed {method.seed}"
    start = f"continuing at update {now:,} of {total:,}" if now else "new"
    lines = [
        f"{type(method).__name__} on {meta.get('name', 'data')}, {which}",
        *(line(label, text) for label, text in described.facts),
        *extra,
        line("updates", f"{total:,} of {described.batch}"),
        line("evaluate", evaluated(method, described.evaluates) if described.evaluates else "none"),
        line("save", saved(method)),
        line(
            "device", f"{device}, precision {trainer.precision}, threads {threads}, matmul {library_in_words(matmul)}"
        ),
        *([line("memory", memory_words(method, trainer.strategy.root_device))] if method.seeds else []),
        line("folder", f"{folder} ({start})"),
    ]
    notes = [DROPOUT] if method.seeds and method.has_dropout else []
    notes += [str(text) for key in ("notes", "warnings") for text in meta.get(key) or []] + [*described.notes]
    samples = ["", described.samples] if described.samples else []
    return "\n".join([*lines, *(line("note", text) for text in notes), *samples])


def evaluated(method: Any, what: str) -> str:
    """When a run is evaluated, and on what; with the rule where the user has not said when."""
    when = f"every {method.eval_every:,} updates" if method.eval_every else "after the last update"
    rule = f" ({method.evaluations.words})" if method.run.eval_every is None else ""
    return f"{when}, {what}{rule}"


def saved(method: Any) -> str:
    """When checkpoints are written, which stay, and what writing them beside training takes."""
    run, when = method.run, "before each evaluation"
    if run.save_every is not None:
        when = f"every {run.save_every:,} updates" if run.save_every else "after the last update"
    last = "; the last holds weights alone, so that the run cannot go on from it" * (run.final != "whole")
    kept = Keeping.of(run.keep).words
    kept = kept if run.select == "none" else f"all until one is selected, then {kept} and the selected"
    room = checkpoint_bytes(method)
    beside = run.async_save is True or (run.async_save == "auto" and room >= LEAST and not method.seeds)
    copy = f"; written while training goes on, out of a copy of about {size(room)} on the host" * beside
    return f"{when}, kept: {kept}{last}{copy}"


def checkpoint_bytes(method: Any) -> int:
    """About how large a checkpoint will be: weights (of adapters alone where there are some) and two moments."""
    each = [(p.numel() * p.element_size(), p.requires_grad) for p in method.parameters()]
    trained = sum(count for count, learns in each if learns)
    return 2 * trained + (trained if method.has_adapters else sum(count for count, _ in each))


def seeds_shown(seeds: tuple[int, ...]) -> str:
    """Seeds for a person: 0–7, 9."""
    return seeds_text(seeds).replace("..", "–").replace(",", ", ")


def lines_of_seeds(folders: Mapping[int, Path], notes: Iterable[str]) -> list[str]:
    """Where each seed of several has its run folder."""
    places = list(folders.values())
    if not places:
        return []
    shown = [*places[:2], *(["…"] if len(places) > 3 else []), *places[2:][-1:]]
    return [line("each seed", ", ".join(map(str, shown))), *(line("note", text) for text in notes)]


def settings_in_use(method: Any) -> tuple[int, str]:
    """Threads and matmul library of the running fit."""
    import torch

    return torch.get_num_threads(), method.run.matmul


def recipe_lines(recipe: Any, used: Mapping[str, Any]) -> list[str]:
    """The recipe with its values; a value that was overridden is shown with what is used instead."""
    lines: list[str] = []
    for origin, keys in recipe.origin.items():
        values = []
        for key in keys:
            value, found = recipe.settings[key], used.get(key, recipe.settings[key])
            value = tuple(value) if isinstance(value, list) else value
            found = tuple(found) if isinstance(found, list) else found
            shown = f"{key.partition('.')[2] if key.startswith('model.') else key} {found}"
            values.append(shown if found == value else f"{shown} (recipe: {value})")
        lines += [line("recipe" if not lines else "", f"{recipe.name}, {origin}:")]
        lines += [line("", "  " + part) for part in textwrap.wrap(", ".join(values), 96, break_on_hyphens=False)]
    return lines


def last_lines(
    folder: Path,
    scores: Mapping[str, float],
    updates: int,
    seconds: float,
    resume: str | None,
    look: str,
    failed: bool = False,
    best: str = "",
    selected: str = "",
    online: str = "",
) -> str:
    """Scores, files, and the commands to go on: ``resume`` after an interruption, else ``look``.

    ``failed``: the last evaluation raised an error, so that it has no scores. ``best``: the best checkpoint.
    ``selected``: the one selected without an environment. ``online``: how an offline run went on online.
    """
    known = ("metrics.csv", "evals.csv", "curves.png", "checkpoints/", "hf/")
    files = [name for name in known if (folder / name).exists()]
    found = "the last evaluation failed, see evals.csv" if failed else scores_line(scores)
    lines = [
        ("Interrupted" if resume else "Done") + f" at update {updates:,} after {seconds:,.0f} s. {found}",
        line("files", f"{folder}/: {', '.join(files)}"),
        *([line("best", best)] if best else []),
        *([line("selected", selected)] if selected else []),
        *([line("online", online)] if online else []),
        line("resume", resume) if resume else line("evaluate" if "offpolicy.evaluate" in look else "next", look),
    ]
    if (folder / "hf").is_dir() and not resume:
        lines.append(line("open with", f"transformers.AutoModelForCausalLM.from_pretrained({str(folder / 'hf')!r})"))
    return "\n".join(lines)


def versions(method: Any) -> dict[str, Any]:
    """What decides the numbers of a run: versions, commit, data and the settings that change last bits."""
    meta = method.data_meta
    names = ["torch", "lightning", "gymnasium", "numpy", "jsonargparse", "transformers"]
    names += ["peft"] if method.has_adapters else []
    threads, matmul = settings_in_use(method)
    env = meta.get("env_id")
    data = {"name": meta.get("name"), "sha256": meta.get("sha256"), "fingerprint": method.data_fingerprint}
    each = {seed: {**data, "fingerprint": own} for seed, (own, _) in method.data_each.items()}
    return {
        "offpolicy": __version__,
        "git": git_commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: importlib.metadata.version(name) for name in names},
        "simulator": simulator_version(env) if env else None,
        "score_kind": score_kind(meta),
        "data": data | ({"of_seeds": each} if each else {}),
        "threads": threads,
        "matmul": matmul,
    }


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that holds the package (with '+' when files differ from it), None outside of one."""
    if not (folder.parent / ".git").exists():
        return None
    command = ["git", "-C", str(folder.parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
