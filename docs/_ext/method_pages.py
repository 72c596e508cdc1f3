"""A page for each file of ``lightning_modules/``: what the file says, its options, recipes, scores and tests."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import rst
import yaml
from docstrings import escaped

from offpolicy.cli.help import options_of
from offpolicy.recipes import recipes
from offpolicy.registry import find_method, method_table
from offpolicy.report.published import published_scores

ROOT = Path(__file__).resolve().parents[2]
OTHER_NAMES = {"TD3BC": ("TD3+BC",), "SACN": ("SAC-N",), "BC": ("BC", "BC-10%")}  # in published tables and results
KINDS = {
    "Control": "BC TD3BC IQL PRDC A2PR ODICE CQL AWAC ReBRAC SAC TD3 EDAC SACN DecisionTransformer",
    "Goals": "GCBC GCIVL GCIQL HIQL OTA",
    "Models of data and values of policies": "TrajectoryDiffusion WorldModel RAVL MBPO FQE",
    "Preference tuning": "SFT DPO CDPO RDPO RPO IPO INPO SimPO CPO ORPO KTO CoPG MAPL SRPO DPA",
    "Reinforcement tuning": "GRPO ReMix RLPlus HPT SPEAR",
}


def file_of(method: str) -> str:
    """The name of a method's file, which is that of its page."""
    return method_table()[method].partition(":")[0].rpartition(".")[2]


@cache
def files() -> dict[str, tuple[str, ...]]:
    """File → its methods, those of this library alone."""
    found: dict[str, tuple[str, ...]] = {}
    for method, path in method_table().items():
        if path.startswith("lightning_modules."):
            found[file_of(method)] = (*found.get(file_of(method), ()), method)
    return found


def pages() -> dict[str, str]:
    """File name → page."""
    return {file: page(file, names) for file, names in files().items()} | {"index": index()}


def page(file: str, names: tuple[str, ...]) -> str:
    classes = {name: find_method(name) for name in names}
    module = inspect.getmodule(classes[names[0]])
    title, _, rest = (module.__doc__ or "").partition("\n\n")
    parts = [rst.heading(" and ".join(names), "="), escaped(title), "", equations(names), rst.prose(rest)]
    for name, cls in classes.items():
        parts += [options(name, cls)]
    for name in names:
        parts += [recipe_table(name)]
    parts += [measured(names), published(names), tested(file, names)]
    parts.append(f":download:`Source <../../lightning_modules/{file}.py>`\n")
    return "\n\n".join(part for part in parts if part)


def equations(names: tuple[str, ...]) -> str:
    """The main losses as formulas, from the table beside this file."""
    rows = [row for name in names for row in written_equations().get(name, ())]
    parts = [f"{row['what']}\n\n.. math::\n\n   {row['latex'].strip()}\n" for row in rows]
    return "\n".join([rst.heading("Losses", "-"), *parts]) if parts else ""


@cache
def written_equations() -> dict[str, list[dict[str, str]]]:
    return yaml.safe_load((Path(__file__).parent / "equations.yaml").read_text("utf-8"))


def options(name: str, cls: type) -> str:
    """The class's own words and its options with their defaults."""
    words = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:")[0]
    default = {option.name: option for option in options_of(cls)}
    own = set(inspect.signature(cls.__init__).parameters)
    rows, shared = [], []
    for key, option in default.items():
        given = option.default is inspect.Parameter.empty
        row = [f"``{key}``", "to be given" if given else f"``{shown(option.default)}``", escaped(option.text)]
        (rows if key in own else shared).append(row)
    parts = [
        rst.heading(f"Options of {name}", "-"),
        rst.prose(words),
        f"::\n\n   python -m offpolicy.fit --model {name}\n",
    ]
    parts.append(rst.table(["option", "default", "meaning"], rows))
    if shared:
        parts += [
            "Options that it shares with others of its kind:\n",
            rst.table(["option", "default", "meaning"], shared),
        ]
    return "\n".join(parts)


def shown(value: Any) -> str:
    return str(value) if str(value) else '""'


def recipe_table(name: str) -> str:
    """The settings per task that come with a method."""
    rows = []
    for one in recipes(name):
        tasks = ", ".join(f"``{task}``" for task in one.tasks) or "only by its name"
        source = "; ".join(escaped(origin) for origin in one.origin)
        settings = ", ".join(f"``{key} {value}``" for key, value in one.settings.items())
        rows.append([f"``{one.name.rpartition('/')[2]}``", tasks, settings, source])
    if not rows:
        return ""
    return "\n".join(
        [rst.heading(f"Recipes of {name}", "-"), rst.table(["recipe", "tasks", "settings", "source"], rows)]
    )


def measured(names: tuple[str, ...]) -> str:
    """The rows of the tables of :doc:`/results` that have the methods' scores."""
    known = {other for name in names for other in (name, *OTHER_NAMES.get(name, ()))}
    parts = []
    for heading, command, head, body in result_tables():
        rows = [row for row in body if row[0] in known]
        if rows:
            parts += [f"{heading}::\n\n   {command}\n", rst.table(head, rows)]
    if not parts:
        return ""
    return "\n".join([rst.heading("Measured here", "-"), "Machines and settings are in :doc:`/results`.\n", *parts])


@cache
def result_tables() -> list[tuple[str, str, list[str], list[list[str]]]]:
    """(section, the last command before it, head, rows) of the tables in docs/results.md."""
    found, section, command, block = [], "", "", []
    code = False
    for line in [*(ROOT / "docs" / "results.md").read_text("utf-8").splitlines(), ""]:
        if line.startswith("|"):
            block.append([escaped(cell.strip()) for cell in line.strip().strip("|").split("|")])
            continue
        if len(block) > 2:
            head = [cell or " " for cell in block[0]]
            found.append((section, command, head, [row for row in block[2:] if len(row) == len(head)]))
        block = []
        if line.startswith("```"):
            code = not code
        elif code and line.startswith("python "):
            command = line
        elif line.startswith("#"):
            section = escaped(line.lstrip("# "))
    return found


def published(names: tuple[str, ...]) -> str:
    """What others have published, with its source."""
    known = {other for name in names for other in OTHER_NAMES.get(name, (name,))}
    rows = [
        [one.method, f"``{one.task}``", one.told(), escaped(one.spread_kind), str(one.seeds or "?"), one.statistic,
         escaped(f"{one.source}, {one.table}")]
        for one in published_scores()
        if one.method in known
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["method", "task", "score", "spread", "seeds", "evaluation", "source"]
    words = "From ``datasets_cfg/published_scores.csv``. A dagger marks numbers read in a quotation alone.\n"
    return "\n".join([rst.heading("Published by others", "-"), words, rst.table(head, rows)])


def tested(file: str, names: tuple[str, ...]) -> str:
    """The tests that name the methods or a loss that their file imports."""
    rows = []
    wanted = set(names) | loss_functions(ROOT / "lightning_modules" / f"{file}.py")
    for folder in ("losses", "methods"):
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            found = [name for name, words in test_words(path) if words & wanted]
            if found:
                told = "; ".join(name.removeprefix("test_").replace("_", " ") for name in found)
                rows.append([f"``tests/{folder}/{path.name}``", escaped(told)])
    if not rows:
        return ""
    known = any("losses" in row[0] for row in rows)
    words = "Known answers of its losses are tested." if known else "Its updates are tested against an obvious version."
    return "\n".join([rst.heading("Tests", "-"), words + "\n", rst.table(["file", "tests that name it"], rows)])


def loss_functions(path: Path) -> set[str]:
    """The functions of offpolicy.losses with "loss" in their names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offpolicy.losses"):
            found |= {alias.name for alias in node.names if "loss" in alias.name or "td_" in alias.name}
    return found


@cache
def test_words(path: Path) -> list[tuple[str, set[str]]]:
    """The tests of a file, each with the names and words that stand in it and in its parameters."""
    text = path.read_text("utf-8")
    tests = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    lines = text.splitlines()
    found = []
    for node in tests:
        first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
        found.append((node.name, set(re.findall(r"\w+", "\n".join(lines[first - 1 : node.end_lineno])))))
    return found


def index() -> str:
    """All methods by what they are for."""
    listed = [name for names in KINDS.values() for name in names.split()]
    missing = sorted({name for names in files().values() for name in names} - set(listed))
    kinds = KINDS | ({"Others": " ".join(missing)} if missing else {})
    parts = [
        rst.heading("Methods", "="),
        "Each method is one file. Its page is made from that file, its recipes, the measured results and the tests. "
        ":doc:`/choose` says which to take.\n",
    ]
    for kind, names in kinds.items():
        rows = []
        for name in names.split():
            if name in method_table():
                words = inspect.cleandoc(find_method(name).__doc__ or "").partition("\n\n")[0].replace("\n", " ")
                rows.append([f":doc:`{name} <{file_of(name)}>`", escaped(words), paper(name)])
        parts += [rst.heading(kind, "-"), rst.table(["method", "what it does", "paper"], rows)]
    parts.append(".. toctree::\n   :hidden:\n\n" + "".join(f"   {file}\n" for file in files()))
    return "\n".join(parts)


def paper(name: str) -> str:
    """The first arXiv number in the file's docstring, as a link."""
    number = re.search(r"arXiv:(\d{4}\.\d{5})", inspect.getmodule(find_method(name)).__doc__ or "")
    return f"`{number[1]} <https://arxiv.org/abs/{number[1]}>`__" if number else "–"
