"""Answers by vLLM, which runs in a process of its own beside the trainer.

The process (:mod:`offpolicy.language.rl.vllm_worker`) may run on another interpreter, so that vLLM's versions of torch
and transformers need not be those of the trainer. Requests and answers go through pipes, weights through a folder in
memory. vLLM itself is never imported here.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import socket
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from offpolicy.compute import processes
from offpolicy.errors import UsageError, check_choice, check_range
from offpolicy.language import policy as policies
from offpolicy.language.rl import vllm_worker
from offpolicy.language.rl.engine import Completion, EngineContext, Request, Sampling
from offpolicy.language.rl.vllm_checks import (
    INSTALL,
    START_ADVICE,
    as_option,
    cards_of,
    check_options_given,
    check_temperature,
    check_version,
    interpreter,
)
from offpolicy.language.rl.vllm_files import adapter_rank, check_model, forget_weights, write_for_engine
from offpolicy.language.rl.vllm_process import PrivateFolder, WorkerFault, WorkerProcess, end_all, end_of_log
from offpolicy.language.weights import ADAPTER
from offpolicy.trust import check_program

FAULTS = 2  # in a row, at which a run ends
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
HIDDEN = (*LAUNCHED, "NODE_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "PYTHONHOME")
Message = tuple[str, dict[str, np.ndarray], dict[str, Any]]  # kind, arrays, facts


@dataclass
class _Ticket:
    """Requests whose answers are not collected yet.

    Attributes:
        requests, how: what was asked.
        weights: the folder of the weights that answer.
        found: answers by their number among all of the ticket.
    """

    requests: list[Request]
    how: Sampling
    weights: Path
    found: dict[int, Completion] = field(default_factory=dict)

    @property
    def wanted(self) -> int:
        return sum(r.samples for r in self.requests)

    def answers(self) -> list[list[Completion]]:
        """The answers of each request; none of a request that lacks one."""
        out, first = [], 0
        for r in self.requests:
            some = [self.found.get(first + k) for k in range(r.samples)]
            out.append([] if any(one is None for one in some) else [one for one in some if one is not None])
            first += r.samples
        return out


class VllmEngine:
    """An engine that draws with vLLM in a process of its own; extra ``vllm``.

    The process is started when the engine is made and loads while the run gets ready. Every answer has a seed of its
    own, so the same request gets the same answer on a CPU however requests are batched; on GPUs up to rounding. A
    process that ends, or shows no sign of life for ``timeout`` seconds, is started once more and draws again what was
    not collected; a second fault in a row ends the run.

    Args:
        context: of the run.
        devices: numbers of the cards for the engines of all processes of a machine, ``tensor_parallel`` for each;
            None for the trainer's own card, which the engine leaves while the trainer works.
        tensor_parallel: cards over which an engine is cut, ≥ 1.
        memory: share of a card for weights and cache, in (0, 1], None for 0.4 of the trainer's own card and 0.9 of
            others; on a CPU GiB of cache, None for 1.
        dtype: "auto" for what the policy computes in, "float32", "bfloat16" or "float16".
        eager: run the model without compiling it; None for a CPU alone.
        adapter: "merge" adds adapters to the weights at every sync, "keep" hands them over by themselves.
        python: interpreter that has vLLM; None for the trainer's.
        timeout: seconds without a sign of life after which the process counts as hanging, > 0.
        options: further arguments of ``vllm.LLM``.

    Raises:
        UsageError: vLLM is missing or too old, or cannot run this model so.
    """

    worker = Path(vllm_worker.__file__)

    def __init__(
        self,
        context: EngineContext,
        *,
        devices: Sequence[int] | None = None,
        tensor_parallel: int = 1,
        memory: float | None = None,
        dtype: str = "auto",
        eager: bool | None = None,
        adapter: str = "merge",
        python: str | None = None,
        timeout: float = 300.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "context", "__class__")}
        check_range("engine.tensor_parallel", tensor_parallel, 1)
        check_range("engine.timeout", timeout, 0.0, lower_open=True)
        check_choice("engine.dtype", dtype, ("auto", *DTYPES))
        check_choice("engine.adapter", adapter, ADAPTER)
        check_temperature(context.temperature)
        check_options_given(options or {})
        if python is not None:
            check_program(python, "engine.python", as_option(given, inspect.signature(VllmEngine).parameters))
        self.context, self.timeout, self.adapter = context, float(timeout), adapter
        self.on_cpu = devices is None and torch.device(context.device).type != "cuda"
        self.shares_card = devices is None and not self.on_cpu
        own = "float32" if context.dtype == torch.float64 else str(context.dtype).removeprefix("torch.")
        self.dtype_name = own if dtype == "auto" else dtype
        self.dtype = DTYPES[self.dtype_name]
        self.longest = context.longest or context.longest_prompt + context.longest_answer
        check_model(context.model, longest=self.longest, on_cpu=self.on_cpu)
        self.cards = [] if self.on_cpu else cards_of(context, devices, tensor_parallel)
        self.vocabulary = policies.base_of(context.model).config.get_text_config().vocab_size
        self.python = interpreter(python)
        self.tensor_parallel, self.memory, self.eager = tensor_parallel, memory, eager
        self.lora_rank = adapter_rank(context.model) if adapter == "keep" else 0
        self.more = dict(options or {})
        self.restarts, self.sync_seconds, self.drawing_seconds = 0, 0.0, 0.0
        self._syncs, self._acknowledged, self._faults, self._own = 0, 0, 0, 0
        self._weights: Path | None = None
        self._tickets: dict[int, _Ticket] = {}
        self._held: list[WorkerProcess] = []  # the process, as long as there is one
        self._failed = False
        needed = 3 * sum(p.numel() for p in context.model.parameters()) * self.dtype.itemsize
        folder = context.folder or Path.cwd()
        self._folder = PrivateFolder(needed, folder)
        self.log = folder / ("engine.log" if context.rank == 0 else f"engine-rank{context.rank}.log")
        self._log_was_there = self.log.exists()
        self._cleanup = weakref.finalize(self, end_all, self._folder, self._held)
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._launch()
            self.version = self._checked_version()
            self._first = self._written(context.model, "base" if adapter == "keep" else "v000000", alone=False)
            self._living().send("start", options=self._options())
        except BaseException:
            self.close()
            raise

    # -- what training asks for ----------------------------------------------------------------------------------------

    def sync(self, model: nn.Module, version: int) -> None:
        began = time.monotonic()
        self._living()
        self._syncs += 1
        self._weights = self._written(model, f"v{self._syncs:06d}", alone=self.adapter == "keep")
        self._leave_memory()
        self._say(*self._sync_message(self._weights, self._syncs))
        self._wait(lambda: self._acknowledged == self._syncs)
        self.sync_seconds = time.monotonic() - began
        forget_weights(self._folder.path, {t.weights for t in self._tickets.values()})

    def generate(
        self, requests: Sequence[Request], how: Sampling, stopped: Callable[[], bool] | None = None
    ) -> list[list[Completion]]:
        self._own -= 1
        self.submit(self._own, requests, how)
        return self.collect(self._own, stopped)

    def submit(self, ticket: int, requests: Sequence[Request], how: Sampling) -> None:
        self._living()
        if self._weights is None:
            raise UsageError("the engine vLLM has no weights yet; expected a sync before requests.")
        if ticket in self._tickets:
            raise KeyError(f"ticket {ticket} is open already")
        self._check(requests, how)
        self._leave_memory()
        self._tickets[ticket] = open_ = _Ticket(list(requests), how, self._weights)
        if open_.wanted:
            self._say(*self._request_message(ticket))

    def collect(self, ticket: int, stopped: Callable[[], bool] | None = None) -> list[list[Completion]]:
        open_ = self._tickets[ticket]
        whole = self._wait(lambda: len(open_.found) == open_.wanted, stopped)
        del self._tickets[ticket]
        if whole:
            self._faults = 0
        else:
            self._say("abort", {}, {"ticket": ticket})
        return open_.answers()

    def rest(self) -> None:
        """Leave the card to the trainer, if both are on one and nothing is asked."""
        if self.shares_card and not self._tickets:
            self._say("rest", {}, {})

    def _leave_memory(self) -> None:
        """Let the engine have what torch holds of the card and does not use."""
        if self.shares_card:
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the process and remove what it read; a second call does nothing."""
        end_all(self._folder, self._held)
        if self._forgets_log:
            self.log.unlink(missing_ok=True)

    @property
    def _forgets_log(self) -> bool:
        """Whether nobody will ask what the process printed: the run has not begun."""
        return self._syncs == 0 and not self._failed and not self._log_was_there

    @property
    def description(self) -> str:
        """What draws, where, for the first screen."""
        where = "cpu" if self.on_cpu else ", ".join(f"cuda:{card}" for card in self.cards)
        kept = ", adapters beside the weights" if self.adapter == "keep" else ""
        shared = ", shared with the trainer" if self.shares_card else ""
        slow = "" if self._folder.in_memory else f", weights by way of {self._folder.path.parent}"
        return f"vLLM {self.version} on {where} in {self.dtype_name}{shared}{kept}{slow}"

    def facts(self) -> dict[str, float]:
        """For the metrics of an iteration."""
        return {"engine/restarts": float(self.restarts), "perf/engine_sync_seconds": self.sync_seconds}

    # -- messages ------------------------------------------------------------------------------------------------------

    def _say(self, kind: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Send a message; if the process is gone, its successor is told all that still matters."""
        try:
            self._living().send(kind, arrays, **facts)
        except WorkerFault as fault:
            self._restart(self._last_words(fault))

    def _last_words(self, fault: WorkerFault) -> WorkerFault:
        """What a process said before it ended, of which messages may be unread, in place of how it ended."""
        try:
            while (message := self._living().receive(0.0)) is not None:
                self._take(message)
        except WorkerFault as last:
            return last
        return fault

    def _request_message(self, ticket: int) -> Message:
        requests, how = self._tickets[ticket].requests, self._tickets[ticket].how
        seeds = [answer_seed(how, r.number, k) for r in requests for k in range(r.samples)]
        arrays = {
            "prompt": np.concatenate([np.asarray(r.prompt, np.int64) for r in requests]),
            "length": np.array([len(r.prompt) for r in requests], np.int64),
            "row": np.repeat(np.arange(len(requests)), [r.samples for r in requests]).astype(np.int64),
            "seed": np.array(seeds, np.int64),
            "most": np.array([r.most(how) for r in requests for _ in range(r.samples)], np.int64),
        }
        sampling = {
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "stop_token_ids": sorted(set(how.stop)),
            "ignore_eos": True,  # the stop ids alone decide
            "logprobs": 0,  # that of the drawn token
            "flat_logprobs": True,
            "detokenize": False,
        }
        return "generate", arrays, {"ticket": ticket, "sampling": sampling}

    def _sync_message(self, folder: Path, number: int) -> Message:
        if self.adapter == "merge":
            return "sync", {}, {"weights": str(folder), "adapter": "", "number": number}
        return "sync", {}, {"weights": "", "adapter": str(folder), "number": number}

    def _wait(self, is_done: Callable[[], bool], stopped: Callable[[], bool] | None = None) -> bool:
        """Take messages until something holds; False if the user stopped before."""
        heard = time.monotonic()
        while not is_done():
            if stopped is not None and stopped():
                return False
            try:
                message = self._living().receive(0.1)
                if message is not None:
                    self._take(message)
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.timeout:
                    raise WorkerFault(f"it gave no sign of life for {self.timeout:g} seconds")
            except WorkerFault as fault:
                self._restart(fault)
                heard = time.monotonic()
        return True

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "synced":
            self._acknowledged = message["number"]
        elif kind == "error" and message["during"] == "start":
            self._give_up(f"vLLM cannot run this policy so: {message['text']}", START_ADVICE)
        elif kind == "error":
            raise WorkerFault(f"{message['text']}, while it was told to {message['during']}")
        elif kind == "drawn":
            self.drawing_seconds += message["seconds"]
            self._take_answers(message)

    def _take_answers(self, message: dict[str, Any]) -> None:
        if message["ticket"] in self._tickets:  # else given up
            found, end = self._tickets[message["ticket"]].found, np.cumsum(message["length"])
            for number, ended, last, length in zip(message["number"], message["ended"], end, message["length"]):
                token, logp = (message[name][last - length : last].copy() for name in ("token", "logp"))
                found[int(number)] = Completion(token, logp, bool(ended))

    # -- the process ---------------------------------------------------------------------------------------------------

    def _living(self) -> WorkerProcess:
        if not self._held:
            raise UsageError("the engine vLLM was closed; expected an open one. Make it anew.")
        return self._held[0]

    def _launch(self) -> None:
        command = [self.python, str(self.worker)]
        self._held[:] = [WorkerProcess(command, self._environment(), self.log, self.timeout)]

    def _checked_version(self) -> str:
        """The version of vLLM, before it is imported, which takes seconds."""
        heard = time.monotonic()
        try:
            hello = None
            while hello is None:
                hello = self._living().receive(0.1)
                if hello is None and time.monotonic() - heard > self.timeout:
                    raise WorkerFault(f"it gave no sign of life for {self.timeout:g} seconds")
        except WorkerFault as fault:
            self._give_up(f"the interpreter {self.python} cannot be used for vLLM: {fault}", INSTALL)
        version = hello["version"]
        if version is None:
            raise UsageError(f"`engine` is 'vllm', and {self.python} has no vllm. {INSTALL}")
        check_version(version, self.python)
        return version

    def _restart(self, fault: WorkerFault) -> None:
        """Start the process again, and tell it all that its predecessor was asked and did not give."""
        self._faults += 1
        self._living().end()
        if self._faults >= FAULTS:
            self._give_up(f"the engine vLLM failed {FAULTS} times in a row, at last as {fault}", "Mend what it says.")
        self.restarts += 1
        warnings.warn(f"The engine vLLM was started again: {fault}. See {self.log}.", stacklevel=2)
        self._launch()
        self._acknowledged = 0
        for open_ in self._tickets.values():
            open_.found.clear()  # the whole of what was asked is drawn again
        try:
            self._living().send("start", options=self._options())
            for kind, arrays, facts in self._unfinished():
                self._living().send(kind, arrays, **facts)
        except WorkerFault as again:
            self._restart(again)

    def _unfinished(self) -> Iterator[Message]:
        """What a new process has to be told, in order: requests behind the weights that they were asked of."""
        before = sorted({t.weights for t in self._tickets.values()} - {self._weights})
        for weights in [*before, *([] if self._weights is None else [self._weights])]:
            yield self._sync_message(weights, self._syncs if weights == self._weights else -1)
            for ticket, open_ in self._tickets.items():
                if open_.weights == weights and open_.wanted:
                    yield self._request_message(ticket)

    def _give_up(self, what: str, advice: str) -> NoReturn:
        tail, self._failed = end_of_log(self.log), True
        self.close()
        raise UsageError(f"{what}. {advice} The end of {self.log}:\n{tail}" if tail else f"{what}. {advice}")

    def _options(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        own = 0.4 if self.shares_card else 0.9
        cache = {"kv_cache_memory_bytes": int((self.memory or 1.0) * 2**30), "gpu_memory_utilization": 0.1}
        return {
            "model": str(self._first if self.adapter == "keep" or self._weights is None else self._weights),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # nothing of the model's own settings
            "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
            "dtype": self.dtype_name,
            "seed": self.context.seed % 2**31,
            "max_model_len": self.longest,
            "max_num_seqs": self.context.answers_at_once,
            "max_num_batched_tokens": max(4096, self.longest, self.context.answers_at_once),
            "enforce_eager": self.on_cpu if self.eager is None else self.eager,
            "tensor_parallel_size": self.tensor_parallel,
            **(cache if self.on_cpu else {"gpu_memory_utilization": self.memory or own}),
            **({"enable_sleep_mode": True} if self.shares_card else {}),
            **({"enable_lora": True, "max_loras": 1, "max_lora_rank": self.lora_rank} if self.lora_rank else {}),
            **self.more,
        }

    def _environment(self) -> dict[str, str]:
        hidden = [n for n in os.environ if n in HIDDEN or n.startswith(("TORCHELASTIC_", "PL_"))]
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        kept |= {
            # tensor parallel engines need processes of their own; a single one draws in a fixed order without
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if self.tensor_parallel == 1 else "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        }
        if self.on_cpu:
            kept |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        else:
            kept["CUDA_VISIBLE_DEVICES"] = ",".join(self.cards)
        return kept

    def _written(self, model: Any, name: str, *, alone: bool) -> Path:
        """The folder of the policy's weights, or adapters alone; one process of each machine writes for all of it."""
        writes = self.context.local_rank == 0
        place = self._folder.path / name
        write_for_engine(model, place, adapter=self.adapter, dtype=self.dtype, writes=writes, alone=alone)
        host = socket.gethostname()
        everyone = processes.gathered((host, self.context.local_rank, str(self._folder.path)))
        return next(Path(path) for other, rank, path in everyone if other == host and rank == 0) / name

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check(self, requests: Sequence[Request], how: Sampling) -> None:
        """Refuse what vLLM would change in silence, or die of."""
        check_temperature(how.temperature)
        for r in requests:
            if len(r.prompt) + r.most(how) > self.longest:
                raise UsageError(
                    f"request {r.number} has {len(r.prompt)} tokens and asks for {r.most(how)} more; expected "
                    f"{self.longest} at most together, for which the engine was made."
                )
            if int(np.max(r.prompt)) >= self.vocabulary or int(np.min(r.prompt)) < 0:
                raise UsageError(
                    f"request {r.number} has the token {int(np.max(r.prompt))}; expected ids below "
                    f"the {self.vocabulary} of the policy. Take the tokenizer that belongs to it."
                )


def answer_seed(how: Sampling, number: int, sample: int) -> int:
    """The seed of an answer, in [0, 2⁶³): no two answers of a run share one."""
    text = f"{how.seed}/{how.iteration}/{number}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
