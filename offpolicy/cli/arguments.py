"""The command line before parsing: names are resolved, recipe and files are merged, mistakes answered.

Nothing heavy is imported here, so a misspelt name is answered in a fraction of a second. What is left is put into the
order that ``parser.py`` needs: one configuration, then the flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from offpolicy.cli.help import option_lines, options_of
from offpolicy.cli.objective_help import TOPICS, topic_text
from offpolicy.cli.pages import page
from offpolicy.cli.reader import spelled
from offpolicy.data.names import HUB_ID, Target, resolve
from offpolicy.errors import UsageError, nearest, nearest_options, resembles
from offpolicy.given import TEXTS, as_whole, expanded, refuse_empty, seed_numbers, seeds_text
from offpolicy.recipes import Recipe, named_recipe, recipe, recipes
from offpolicy.registry import class_path
from offpolicy.training.options import RunOptions
from offpolicy.trust import NAME, Words, check_settings, names_in, trusting, words

EPOCHS, LEAST_STEPS = 100, 10_000  # of data of the user's own, where nobody says how many updates
MAX_STEPS = 1_000_000  # where neither a recipe nor the user says; what published numbers mostly use
DEFAULT_METHOD, DEFAULT_DATA = "TD3BC", "pendulum-stitch-v0"
PLACES = {"model", "data.name", "recipe", "root", "folder", "ckpt_path"}  # whatever they look like, these are text
MOSTLY = ("eval_every", "eval_episodes", "log_every", "threads")  # options of a run on the short screen of help
CONTROL_ONLY = ("extra_columns", "holdout")  # options of the data that language methods have not
SEEDS = ("seed_everything", "seeds")  # one, or several
GROUPS = ("model", "data", "run", "trainer")
TOP = (
    "config", "model", "data", "recipe", "root", "folder", "ckpt_path", "seed_everything", "seeds", "trust",
    "print_config", "help",
)  # fmt: skip
OF_THE_COMMAND = ("config", "trust", "print_config", "help")  # never in files
NO_NAMES = ("config", "data.name", "folder", "root", "ckpt_path", "trust")  # whose values are places
ALIASES = {"-h": "--help", "-c": "--config", "--seed": "--seed_everything", "--data": "--data.name"}

HELP = """\
usage: python -m offpolicy.fit [--model NAME] [--data NAME|FILE] [options]

  --model NAME          method: {methods}, or an import path package.module.Class
  --data NAME|FILE      known data set, or .hdf5, .npz or folder    (pendulum-stitch-v0)
                        for language models: .jsonl, .json, .parquet, .arrow, folder or hub id
  --model.policy DIR    the language model to tune: folder or hub id, for DPO and its relatives
  --trainer.max_steps N updates to train in all                     ({steps})
  --seed_everything N   seed                                        (0)
  --seeds 0..7          several, trained at once; also 0,3,5; each gets a run folder of its own
  --ckpt_path WHAT      continue: last, a run folder or a checkpoint
  --config FILE|NAME    settings from a YAML file, or a recipe by method/name; may be repeated
  --recipe NAME         auto (the one for this task), none, or by name
  --trust PACKAGES      run code of these packages where a file (config, run, data) names it
  --root DIR            where run folders are made (runs); --folder DIR names one

{run}
  --model.OPTION X      settings of the method; --model.help NAME lists them
                        --model.help objective and --model.help variants: parts and variants of GRPO's objective
  --data.OPTION X       reading the data: download, on_bad, clip_actions, timeout_step, sha256;
                        for your own files: env_id, env_kwargs, obs_keys, max_episode_steps
                        texts: columns, split, tokenizer, max_length, eval_data, eval_fraction, show
  --data.online.X Y     collect while training: env (an environment), env_steps, round_steps, utd, random_steps,
                        mix (with --data: union, half, none, a share), episodes (cut, whole, keep), ...
  --data.source WHAT    real, or mostly trajectories of a diffusion model: policy-guided, unguided;
                        model-rollouts of a world model
  --data.synthetic.X Y  of these trajectories: model (its run), trajectories, every, share, guidance, steps, ...
  --trainer.OPTION X    Lightning's Trainer: accelerator, devices, strategy, precision, logger, ...

  --print_config        print the settings that result, and stop
  --help=all            every option

A class default gives way to the recipe, the recipe to --config, and --config to the flags.
Look at a run: python -m offpolicy.evaluate RUN        Data: python -m offpolicy.data show NAME
Compare runs: python -m offpolicy.compare runs/        A page of all: python -m offpolicy.report runs/
Many runs by one plan: python -m offpolicy.sweep --methods BC IQL --data A B --seeds 0..4
Draw data from a diffusion model: python -m offpolicy.sample RUN OUT
A language model answers: python -m offpolicy.generate RUN     It becomes a folder: python -m offpolicy.export RUN OUT
"""


@dataclass
class Command:
    """What was asked for.

    Attributes:
        method: import path of its class.
        settings: dotted key → value from recipe and files, with the names resolved; flags come on top.
        flags: the rest, ready for the parser.
        recipe: the recipe that is applied, if any.
        notes: sentences to show before training.
        texts: whether the data hold texts; None where nobody has looked.
        data_given: whether the user named data.
        words: what the user named or trusts.
        own_data: whether the data are steps of the user's own, no task that the library knows.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    flags: list[tuple[str, str | None]] = field(default_factory=list)
    recipe: Recipe | None = None
    notes: list[str] = field(default_factory=list)
    texts: bool | None = None
    data_given: bool = True
    words: Words = field(default_factory=Words)
    own_data: bool = False

    @property
    def parser_args(self) -> list[str]:
        return [f"--{name}" if value is None else f"--{name}={value}" for name, value in self.flags]


def read_command(argv: Iterable[str]) -> Command:
    """Read the arguments of ``python -m offpolicy.fit``.

    Raises:
        UsageError: an unknown name or option, a missing value, a file that cannot be read.
        SystemExit: after ``--help``.
    """
    pairs = split(argv)
    last = dict(pairs)
    if "help" in last and last["help"] != "all":
        print(help_text(last.get("model")), end="")
        raise SystemExit(0)
    if last.get("model.help") in TOPICS:
        print(topic_text(str(last["model.help"])), end="")
        raise SystemExit(0)
    if "help" in last or "model.help" in last:
        path = class_path(last.get("model.help") or last.get("model") or DEFAULT_METHOD)
        flags: list[tuple[str, str | None]] = [("help", None)] if "help" in last else [("model.help", path)]
        return Command(path, flags=flags, words=Words(packages=(path.partition(".")[0],)))  # the user typed it

    check_options((name for name, _ in pairs), {"run": [f.name for f in fields(RunOptions)]})
    typed = names_in([parsed(value) for name, value in pairs if name not in NO_NAMES])
    packages = [package for name, value in pairs if name == "trust" and value for package in value.split(",")]
    classes = names_in([parsed(value) for name, value in pairs if name == "model" or name.startswith("trainer.")])
    packages += {name.partition(".")[0] for name in classes if NAME.fullmatch(name)}  # whose code runs in any case
    with trusting(packages, names=typed, in_file=True):
        return _read(pairs, last)


def help_text(method: str | None) -> str:
    """The help of ``python -m offpolicy.fit``; with a method named, its defaults and its own options too."""
    from offpolicy.registry import import_class, method_names

    cls = None if method is None else import_class(class_path(method))  # importing a method takes seconds
    defaults = {} if cls is None else cls.run_defaults
    if cls is not None and cls.trains_on_texts:
        steps = "as --model.epochs or --model.iterations says"
    else:
        steps = f"recipe, else {MAX_STEPS}; own data: {EPOCHS} epochs"
    shown = [one for one in options_of(RunOptions, defaults) if cls is not None or one.name in MOSTLY]
    text = HELP.format(
        methods=", ".join(method_names()),
        docs=page("getting-started.md"),
        steps=steps,
        run="\n".join(option_lines("run", shown, short=cls is None)),
    )
    if cls is not None:
        text += "\n".join(["", f"Settings of {cls.__name__}:", *option_lines("model", options_of(cls)), ""])
    return text


def _read(pairs: list[tuple[str, str | None]], last: dict[str, str | None]) -> Command:
    """Recipe, files and flags put together."""
    sources = [value for name, value in pairs if name == "config"]
    if not sources and (run := _run_folder(last.get("ckpt_path"))):
        sources = [str(run / "config.yaml")]
    layers = [read_settings(str(source)) for source in sources]
    for source, layer in zip(sources, layers):
        check_options(layer, {"run": [f.name for f in fields(RunOptions)]})
        for name in OF_THE_COMMAND:
            if name in layer:
                raise UsageError(f"{source} sets `{name}`, which only the command line may. Remove it from the file.")
        check_settings(layer, str(source))
    in_files = {key: value for layer in layers for key, value in layer.items()}

    method = class_path(last.get("model") or in_files.get("model") or DEFAULT_METHOD)
    notes = [f"Settings of {' and '.join(map(str, sources))} were taken."] if sources else []
    for source, layer in zip(sources, layers):
        if class_path(layer.get("model", method)) != method and _drop(layer, "model."):
            notes.append(f"The settings of `model` in {source} are for {layer['model']} and were left out.")
    given = last.get("data.name") or in_files.get("data.name")
    target = find_data(given, method, environment_of(last, in_files))

    chosen = last.get("recipe") or in_files.get("recipe") or "auto"
    short = method.rpartition(".")[2]
    ours = method.startswith("lightning_modules.")  # a user's class of the same name has other options
    found = recipe(short, target.name) if chosen == "auto" and ours else None
    if found and target.kind == "online" and not any(key.startswith("data.online.") for key in found.settings):
        found = None  # one for data of the same task
    if chosen not in ("auto", "none"):
        found = named_recipe(short, chosen)
    settings = dict(found.settings) if found else {}
    for source, layer in zip(sources, layers):
        merge(settings, layer, str(source))
    name = str(target.path) if target.path is not None else target.name
    settings |= {"model": method, "data.name": name, "recipe": chosen}
    flags = [pair for pair in pairs if pair[0] not in ("config", "model", "data.name", "recipe", "trust", *SEEDS)]
    typed = {name: value for name, value in pairs if name in SEEDS}
    merge(settings, typed, "the command")
    flags += [(name, str(settings[name])) for name in SEEDS if typed and name in settings]
    texts = None if target.kind == "replay" else target.kind == "language"  # a converted folder may hold either
    own = target.kind in ("hdf5", "npz", "replay") or (target.kind == "minari" and not target.info)
    return Command(method, settings, flags, found, notes, texts, given is not None, words(), own)


def merge(settings: dict[str, Any], layer: Mapping[str, Any], source: str) -> None:
    """Put one layer of settings over those below it, in place; one seed replaces several, and several one.

    Raises:
        UsageError: it has both, or seeds that are none.
    """
    layer = dict(layer)
    one = layer.get("seed_everything")
    if isinstance(one, (list, tuple)) or (isinstance(one, str) and re.search(r"\d\s*(,|\.\.)", one)):
        raise UsageError(f"`seed` is {one!r}; expected one whole number. Did you mean --seeds {one}?")
    if "seeds" in layer and one is not None:
        raise UsageError(
            f"{source} sets both `seed_everything` ({one}) and `seeds` ({layer['seeds']}); expected one of the two. "
            "Leave one out."
        )
    if "seeds" in layer:
        seeds = seed_numbers(layer.pop("seeds"))
        layer |= {"seeds": seeds_text(seeds)} if len(seeds) > 1 else {"seed_everything": seeds[0]}
    if any(name in layer for name in SEEDS):
        for name in SEEDS:
            settings.pop(name, None)
    settings |= layer


def environment_of(last: Mapping[str, str | None], in_files: Mapping[str, Any]) -> str | None:
    """The environment that data are collected in, where one is named."""
    return last.get("data.online.env") or in_files.get("data.online.env")


def find_data(given: str | None, method: str, env: str | None = None) -> Target:
    """What data are meant; an id of the Hugging Face hub (org/name) only where the method trains on texts.

    Args:
        given: by the user; None for the default set, or none at all where data are collected.
        method: import path of its class.
        env: in which data are collected, which stands for a run without other data.

    Raises:
        UsageError: no such file or name.
    """
    if env is not None and given in (None, env):
        return Target("online", env)
    text = given or DEFAULT_DATA
    if not HUB_ID.match(text):
        return resolve(text)
    from offpolicy.registry import import_class  # only now, as importing a method takes seconds

    return resolve(text, language=getattr(import_class(method), "trains_on_texts", False))


def split(argv: Iterable[str]) -> list[tuple[str, str | None]]:
    """``--name value`` and ``--name=value`` as pairs, in order; a path ``~/x`` with the home folder."""
    words, pairs = list(argv), []
    refuse_empty(words)
    while words:
        word = spelled(words.pop(0))
        head, equals, text = word.partition("=")
        head = ALIASES.get(head, head)
        if not head.startswith("--") or head == "--":
            raise UsageError(f"found '{word}'; expected an option, --name VALUE. Put its name first. See --help.")
        name, value = head[2:], text if equals else None
        if value is None and words and not words[0].startswith("--"):
            value = words.pop(0)
        if value is None and name not in ("help", "print_config", "model.help"):
            raise UsageError(f"--{name} has no value; expected --{name} VALUE.")
        if value is not None and name.rpartition(".")[2] not in TEXTS:
            value = expanded(value)
        pairs.append((name, value))
    return pairs


def check_options(names: Iterable[str], known: Mapping[str, Iterable[str]], where: str = "") -> None:
    """Answer a misspelt option.

    Args:
        names: dotted, as given.
        known: group → the names in it; groups that are not there are not checked, and with a single group neither are
            names that resemble nothing in it.
        where: what the options belong to, for the message.

    Raises:
        UsageError: one sentence with the nearest name.
    """
    dotted = [f"{group}.{option}" for group, options in known.items() for option in options]
    for name in names:
        group, _, rest = name.partition(".")
        option = rest.split(".")[0].rstrip("+")
        if not rest and group in TOP:
            continue
        if rest and group in GROUPS and (group not in known or option in known[group]):
            inner = [n for n in known.get(group, ()) if n.startswith(f"{option}.")]  # the fields of a group of options
            if inner and rest != option and rest not in inner:
                guess = nearest(rest, inner).replace("'", f"'--{group}.", 1)
                raise UsageError(f"--{name} is not an option.{guess} See --help=all.")
            continue
        if group == "data" and option in CONTROL_ONLY and group in known:
            raise UsageError(f"--{name} is an option of control data alone, and this method reads texts. Leave it out.")
        if rest and group in known:
            near = [f"'--{group}.{one}'" for one in nearest_options(option, known[group])]
            guess = f" Did you mean {' or '.join(near)}?" if near else ""
            of, help_ = (f" of {where}", f"--model.help {where}") if group == "model" else ("", "--help")
            raise UsageError(f"--{name} is not an option{of}.{guess} See {help_}.")
        short: dict[str, str] = {}
        for d in dotted:
            short.setdefault(d.partition(".")[2], d)
        found = nearest_options(rest or group, [*TOP, *short])
        if len(known) == 1 and not any(resembles(rest or group, one) for one in found):
            continue  # more will be known once the method is imported
        near = [f"'--{short.get(one, one)}'" for one in found]
        raise UsageError(
            f"--{name} is not an option." + (f" Did you mean {' or '.join(near)}?" if near else "") + " See --help."
        )


def read_settings(source: str) -> dict[str, Any]:
    """Settings of a YAML file, of the ``config.yaml`` in a run folder, or of a recipe ``method/name``, dotted."""
    path = Path(expanded(source))
    path = path / "config.yaml" if path.is_dir() else path
    if not path.exists():
        known = {one.name: one for one in recipes()}
        if source in known:
            return {"model": source.partition("/")[0], **known[source].settings}
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(
            f"`config` is '{source}'; expected a YAML file, a run folder or a recipe such as td3bc/pendulum-stitch-v0."
            f"{nearest(path.name, siblings) or nearest(source, known)}"
        )
    try:
        text = path.read_text("utf-8")
        raw, written = yaml.load(text, SettingsLoader), yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} cannot be read as YAML: {reason}. Correct the file.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds {type(raw).__name__}; expected settings such as `model:` and `trainer:`.")
    flat, texts = flatten(raw), flatten(written)
    for key in PLACES & flat.keys():  # a folder may be called 007 or true
        flat[key] = flat[key] if isinstance(flat[key], str) else texts[key]
        if isinstance(flat[key], str) and not flat[key].strip():
            raise UsageError(f"{path} sets `{key}` to an empty text; expected a name. Leave it out or correct it.")
    return flat


class SettingsLoader(yaml.SafeLoader):
    """YAML whose dates are text, as no option is one."""


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as in ``config.yaml`` with dotted keys; ``None`` at the top level is left out."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if not isinstance(key, str):
            raise UsageError(f"the settings have {key!r} as a name; expected text, such as `model:`. Correct the file.")
        if key == "model" and isinstance(value, Mapping):
            inner = value.get("init_args") or {}
            if not isinstance(inner, Mapping):
                raise UsageError(
                    f"the settings have `init_args` {inner!r}; expected names and values. Correct the file."
                )
            value = {k: v for k, v in {**value, **inner}.items() if k != "init_args"}
            if "class_path" in value:
                flat["model"] = value.pop("class_path")
        elif key == "data" and value is not None:
            value = grouped(value) if isinstance(value, Mapping) else {"name": value}
        if isinstance(value, Mapping):
            flat |= {f"{key}.{option}": _local(option, v) for option, v in value.items()}
        elif value is not None:
            flat[key] = _local(key, value)
    return flat


def grouped(data: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the data with those of ``online`` by themselves, as ``online.env``."""
    inner = data.get("online")
    if not isinstance(inner, Mapping):
        return dict(data)
    return {k: v for k, v in data.items() if k != "online"} | {f"online.{k}": v for k, v in inner.items()}


def _local(option: str, value: Any) -> Any:
    """A path of a file with the home folder in it."""
    return expanded(value) if isinstance(value, str) and option not in TEXTS else value


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings in the form the parser reads."""
    tree: dict[str, Any] = {"model": {"class_path": settings["model"], "init_args": {}}}
    for key, value in settings.items():
        group, dot, option = key.partition(".")
        if dot:
            part = tree["model"]["init_args"] if group == "model" else tree.setdefault(group, {})
            if key.startswith("data.online."):
                part, option = part.setdefault("online", {}), option.partition(".")[2]
            part[option] = value
        elif key != "model":
            tree[key] = value
    return tree


def parsed(value: str | None) -> Any:
    """The value of a flag as the parser will read it: lists and mappings are written as YAML."""
    try:
        return value if value is None or not set("[{:") & set(value) else [value, yaml.safe_load(value)]
    except yaml.YAMLError:
        return value


def whole_text(value: Any) -> Any:
    """1e6 and 4.0, as text or numbers, for an option of whole numbers; anything else as it is."""
    if isinstance(value, str):
        number = re.fullmatch(r"[+-]?\d+(\.\d*|(?=[eE]))([eE]\+?\d+)?", value)  # digits alone are exact as they are
        return str(int(float(value))) if number and float(value).is_integer() else value
    return as_whole(value)


def _run_folder(ckpt: str | None) -> Path | None:
    """The run folder that a checkpoint path points into, when it holds the settings of the run."""
    path = Path(expanded(ckpt or "last"))
    candidates = [path, path.parent, path.parent.parent] if path.exists() else []
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def _drop(layer: dict[str, Any], prefix: str) -> bool:
    keys = [key for key in layer if key.startswith(prefix)]
    for key in keys:
        del layer[key]
    return bool(keys)
