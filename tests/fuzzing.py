"""Damage to files of every kind, and what opening them then does: sound, a clear error, or a fault of ours.

As a script it prints a table: ``python tests/fuzzing.py --mutations 2000 --seed 1 [--kinds folder,parquet]``. A worker
process does the opening and tells what it is about to do, so that a crash or a hang costs one file, not the table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT, IMPORTS = 20.0, 40.0  # seconds of a processor for one file, and once for each kind; most need a hundredth of it
WALL = 240.0  # seconds, for what waits and computes nothing
TEXT = (".json", ".jsonl", ".csv", ".yaml")


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(content: bytes, rng: random.Random, *, text: bool = False) -> bytes:
    """The content of a file with one of the faults that files have."""
    kinds = [flip_bits, cut, insert, zero, swap, huge_number] + [other_digits] * (2 if text else 0)
    changed = content
    for _ in range(20):
        changed = rng.choice(kinds)(content, rng)
        if changed != content:
            break
    return changed


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice([1, 2, 8, 100])) + content[at:]


def zero(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content) + 1), rng.choice([1, 8, 64, 1024])
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def swap(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice([4, 16, 128])
    first, second = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    if second < first + size:
        return content
    one, other = content[first : first + size], content[second : second + size]
    return content[:first] + other + content[first + size : second] + one + content[second + size :]


def huge_number(content: bytes, rng: random.Random) -> bytes:
    """A whole number of 2, 4 or 8 bytes, most often near the start or end where heads and indices stand."""
    width = rng.choice([2, 4, 8])
    span = rng.choice([64, 512, len(content)])
    at = rng.randrange(max(1, min(span, len(content))))
    at = at if rng.random() < 0.5 else max(0, len(content) - at - width)
    value = rng.choice([(1 << 8 * width) - 1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1, 1 << (6 * width)])
    return content[:at] + value.to_bytes(width, "little")[: len(content) - at] + content[at + width :]


def other_digits(content: bytes, rng: random.Random) -> bytes:
    """A word or number of a text replaced by what does not belong there."""
    places = [i for i, byte in enumerate(content) if chr(byte).isalnum()]
    if not places:
        return content
    at = rng.choice(places)
    end = at
    while end < len(content) and chr(content[end]).isalnum():
        end += 1
    other = [
        b"-1",
        b"99999999999999999999",
        b"null",
        b"1e999",
        b"NaN",
        b"[]",
        b"{}",
        b'""',
        b'"\\ud800"',
        b"0",
        b"true",
    ]
    return content[:at] + rng.choice(other) + content[end:]


# -- kinds of files ----------------------------------------------------------------------------------------------------


def make_all(root: Path) -> None:
    """A small file or folder of every kind, below ``root``."""
    import datasets
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import yaml
    from tiny import make_policy, toy_pairs
    from toy import fit, method, toy_replay

    from offpolicy.data.sources.d4rl import write

    replay = toy_replay((6, 4, 5))
    replay.save(root / "folder" / "set")
    toy_pairs().save(root / "texts-folder" / "set")
    write(replay, root / "hdf5" / "set.hdf5")
    arrays = {k: np.asarray(v) for k, v in replay.steps.items()}
    (root / "npz").mkdir()
    np.savez_compressed(root / "npz" / "set.npz", **arrays)
    (root / "lock").mkdir()
    np.savez(root / "lock" / "set.npz", **arrays)
    open_data(root / "lock" / "set.npz")
    shutil.copytree(HERE / "fixtures" / "minari", root / "fixtures")
    for found in sorted(root.glob("fixtures/**/data/metadata.json")):
        record = json.loads(found.read_text())
        kind = "minari-" + record.get("data_format", "hdf5")
        if not (root / kind).exists():
            shutil.copytree(found.parent.parent, root / kind / "set-v0")
    rng = np.random.default_rng(0)
    if not (root / "minari-parquet").exists():
        shutil.copytree(root / "minari-arrow", root / "minari-parquet")
        record = json.loads((root / "minari-parquet/set-v0/data/metadata.json").read_text()) | {
            "data_format": "parquet"
        }
        (root / "minari-parquet/set-v0/data/metadata.json").write_text(json.dumps(record))
        for part in (root / "minari-parquet").rglob("*.arrow"):
            with pa.memory_map(str(part)) as file:
                parquet.write_table(pa.ipc.open_file(file).read_all(), part.with_suffix(".parquet"))
            part.unlink()
    trajectories = {"observations": rng.normal(size=(20, 3)).astype(np.float32), "terminals": np.arange(20) % 5 == 4}
    (root / "ogbench").mkdir()
    np.savez_compressed(root / "ogbench" / "set.npz", actions=rng.uniform(-1, 1, (20, 2)), **trajectories)

    rows = [
        {"prompt": f"{a} plus {b}", "chosen": str(a + b), "rejected": str(a - 1)} for a in range(4) for b in range(4)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for kind, content in (
        ("set.jsonl", lines.encode()), ("set.json", json.dumps(rows).encode()),
        ("set.jsonl.gz", gzip.compress(lines.encode(), mtime=0)),
        ("set.csv", "\n".join(map(",".join, [rows[0].keys(), *(row.values() for row in rows)])).encode()),
    ):  # fmt: skip
        (root / kind.partition(".")[2]).mkdir()
        (root / kind.partition(".")[2] / kind).write_bytes(content)
    table = pa.Table.from_pylist([{**row, "more": [{"role": "user", "content": "é"}]} for row in rows])
    (root / "parquet").mkdir()
    parquet.write_table(table, root / "parquet" / "set.parquet")
    (root / "arrow").mkdir()
    with pa.ipc.new_file(root / "arrow" / "set.arrow", table.schema) as out:
        out.write_table(table)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(root / "datasets" / "set")

    fit(method("BC"), replay, 45, root / "run" / "set")
    (root / "checkpoint").mkdir()
    shutil.copy(next((root / "run" / "set").glob("checkpoints/*.ckpt")), root / "checkpoint" / "step=00000045.ckpt")
    settings = {"model": {"class_path": "BC", "init_args": {"actor_lr": 1e-3}}, "trainer": {"max_steps": 2}}
    (root / "yaml").mkdir()
    (root / "yaml" / "set.yaml").write_text(yaml.safe_dump(settings | {"run": {"eval_every": 5}}))
    (root / "csv-of-run").mkdir()
    shutil.copy(root / "run" / "set" / "metrics.csv", root / "csv-of-run" / "metrics.csv")
    record = {"prompt": [5, 6], "completions": [[7, 2]], "ended": [True], "logps": [[-1.0, -2.0]]}
    (root / "records").mkdir()
    (root / "records" / "set.jsonl").write_text(
        "".join(json.dumps(record | {"request": i, "iteration": i}) + "\n" for i in range(5))
    )
    make_policy(root / "policy" / "set")


def open_data(path: Path) -> None:
    from offpolicy.data.sources import open_source

    open_source(path, download=False)


def open_texts(path: Path) -> None:
    from offpolicy.data.names import resolve
    from offpolicy.data.texts.opening import sketch

    sketch(resolve(path, language=True), download=False)


def open_tokens(path: Path) -> None:
    from offpolicy.data.texts.opening import open_texts as opened

    opened(path, tokenizer=None, download=False)


def open_checkpoint(path: Path) -> None:
    import offpolicy as op

    op.load(path)


def open_settings(path: Path) -> None:
    from offpolicy.cli.arguments import read_command
    from offpolicy.cli.parser import parse

    parse(read_command(["--config", str(path), "--data", "pendulum-stitch-v0"]))


def open_table(path: Path) -> None:
    from offpolicy.files import Table, plot_curves

    Table(path).rows()
    Table(path).append({"step": 100, "train/loss": 1.0})
    Table(path).cut(45)
    plot_curves(path.parent)


def open_records(path: Path) -> None:
    from offpolicy.language.rl.records import Recorder, ReplayEngine

    ReplayEngine(path)
    Recorder(path, 1)


def open_policy(path: Path) -> None:
    from offpolicy.data.texts.tokens import load_tokenizer
    from offpolicy.language.policy import open_model

    open_model(str(path))
    load_tokenizer(str(path))


# kind → what is opened, how, and which files in it are damaged
KINDS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "folder": ("set", open_data, "**/*.*"),
    "texts-folder": ("set", open_tokens, "**/*.*"),
    "hdf5": ("set.hdf5", open_data, "set.hdf5"),
    "npz": ("set.npz", open_data, "set.npz"),
    "ogbench": ("set.npz", open_data, "set.npz"),
    "lock": ("set.npz", open_data, "*.lock.json"),
    "minari-hdf5": ("set-v0", open_data, "**/*.*"),
    "minari-arrow": ("set-v0", open_data, "**/*.*"),
    "minari-parquet": ("set-v0", open_data, "**/*.*"),
    "jsonl": ("set.jsonl", open_texts, "set.jsonl"),
    "json": ("set.json", open_texts, "set.json"),
    "jsonl.gz": ("set.jsonl.gz", open_texts, "set.jsonl.gz"),
    "csv": ("set.csv", open_texts, "set.csv"),
    "parquet": ("set.parquet", open_texts, "set.parquet"),
    "arrow": ("set.arrow", open_texts, "set.arrow"),
    "datasets": ("set", open_texts, "**/*.*"),
    "checkpoint": ("step=00000045.ckpt", open_checkpoint, "*.ckpt"),
    "yaml": ("set.yaml", open_settings, "set.yaml"),
    "csv-of-run": ("metrics.csv", open_table, "metrics.csv"),
    "records": ("set.jsonl", open_records, "set.jsonl"),
    "policy": ("set", open_policy, "**/*.*"),
}


def one(root: Path, kind: str, seed: int, scratch: Path) -> str:
    """Damage a copy of one kind, open it, and say what happened: sound, usage, data, or the traceback."""
    from offpolicy.errors import DataError, UsageError

    rng = random.Random(f"{kind} {seed}")
    name, opened, pattern = KINDS[kind]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(root / kind, scratch)
    files = sorted(p for p in scratch.glob(pattern) if p.is_file())
    file = rng.choice(files)
    content = file.read_bytes()
    if rng.random() < 0.3 and file.suffix == ".npz":
        content = inner_damage(content, rng)
    file.write_bytes(damage(content, rng, text=file.suffix in TEXT))
    try:
        opened(scratch / name)
    except DataError:
        return "data"
    except UsageError:
        return "usage"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return traceback.format_exc()
    return "sound"


def inner_damage(content: bytes, rng: random.Random) -> bytes:
    """An archive whose checksums are right, and one of whose arrays is damaged."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, damage(old.read(name), rng) if name == chosen else old.read(name))
    return out.getvalue()


# -- many --------------------------------------------------------------------------------------------------------------


def work(root: Path) -> None:
    """What a worker does: a line of JSON in, a line out."""
    import resource
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # a file of a few kB must not take the machine
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            kind, seed = json.loads(line)
            began = time.process_time()
            found = one(root, kind, seed, Path(scratch) / "copy")
            answers.write(json.dumps([found, time.process_time() - began]) + "\n")


def seconds_used(pid: int) -> float:
    """Of a processor, by a process; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Worker:
    def __init__(self, root: Path) -> None:
        self.root, self.process, self.kind = root, None, ""

    def __call__(self, kind: str, seed: int) -> tuple[str, float]:
        if self.process is None:
            command = [sys.executable, __file__, "--work", str(self.root)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE / "helpers")])}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self.kind = ""
        process = self.process
        process.stdin.write(json.dumps([kind, seed]).encode() + b"\n")
        process.stdin.flush()
        began, used = time.monotonic(), seconds_used(process.pid)
        limit = LIMIT + IMPORTS * (kind != self.kind)
        ready: list[Any] = []
        while not ready and seconds_used(process.pid) - used < limit and time.monotonic() - began < WALL:
            ready, _, _ = select.select([process.stdout], [], [], 0.5)
        self.kind = kind
        line = process.stdout.readline() if ready else b""
        if line:
            found, seconds = json.loads(line)
            return found, seconds
        process.kill()
        self.process = None
        return ("hang" if not ready else f"crash: process ended with {process.wait()}"), LIMIT

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run(root: Path, mutations: int, seed: int, kinds: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Open so many damaged files, shared out over the kinds. Kind → counts of what happened, faults, seconds."""
    worker, chosen = Worker(root), kinds or list(KINDS)
    table: dict[str, dict[str, Any]] = {k: {"counts": Counter(), "faults": [], "slowest": 0.0} for k in chosen}
    try:
        for number in range(mutations):
            kind = chosen[number * len(chosen) // mutations]
            found, seconds = worker(kind, 1_000_000 * seed + number)
            word = found if found in ("sound", "usage", "data", "hang") else found.partition(":")[0]
            word = word if word in ("sound", "usage", "data", "hang", "crash") else "traceback"
            row = table[kind]
            row["counts"][word] += 1
            row["slowest"] = max(row["slowest"], seconds)
            if word not in ("sound", "usage", "data"):
                row["faults"].append((1_000_000 * seed + number, found))
    finally:
        worker.close()
    return table


def show(table: dict[str, dict[str, Any]]) -> str:
    words = ("sound", "data", "usage", "traceback", "crash", "hang")
    lines = [f"{'kind':<16}{''.join(f'{w:>11}' for w in words)}   slowest s"]
    for kind, row in table.items():
        counts = "".join(f"{row['counts'][word]:>11}" for word in words)
        lines.append(f"{kind:<16}{counts}{row['slowest']:>12.2f}")
    total: Counter[str] = sum((row["counts"] for row in table.values()), Counter())
    lines.append(f"{'all':<16}{''.join(f'{total[w]:>11}' for w in words)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--work", metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Path(args.work))
        return
    sys.path[:0] = [str(HERE.parent), str(HERE / "helpers")]
    with tempfile.TemporaryDirectory() as root:
        make_all(Path(root))
        table = run(Path(root), args.mutations, args.seed, [k for k in args.kinds.split(",") if k] or None)
    print(show(table))
    for kind, row in table.items():
        for seed, text in row["faults"]:
            print(f"\n{kind}, seed {seed}:\n{text}")


if __name__ == "__main__":
    main()
