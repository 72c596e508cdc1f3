"""Checkpoints of models sharded by FSDP2: folders that two processes write, and one or two go on from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_pair
from tiny import fit, make_policy, method
from toy import differences, run_files

import offpolicy as op
from offpolicy.errors import UsageError
from offpolicy.export import export
from offpolicy.training import sharded
from offpolicy.training.archives import load_plain, save_plain
from offpolicy.training.checkpoints import newest_checkpoint, opens, read_checkpoint
from offpolicy.training.lightning_private import FullySharded

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharded pair")]

HALF, LAST = 3, 5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("SFT", {"micro_batch_size": 2}),
    "LoRA": ("SFT", {"micro_batch_size": 2, "lora_rank": 2}),
}


def train(case: str, root: Path, folder: Path, devices: int = 2, updates: int = LAST, **options: Any) -> Any:
    name, settings = CASES[case]
    run = {key: options.pop(key) for key in ("async_save", "keep", "final") if key in options}
    module = method(name, root / ("tied" if case == "SFT" else "policy"), **settings)
    for key, value in run.items():
        setattr(module.run, key, value)
    strategy = {"strategy": FullySharded()} if devices > 1 else {}
    return fit(module, max_steps=updates, folder=folder, devices=devices, **strategy, **options)


def copy_of(source: Path, target: Path, rank: int) -> Path:
    """A copy of a run, made by the first process."""
    if rank == 0:
        shutil.copytree(source, target, symlinks=True)
    torch.distributed.barrier()
    return target / "checkpoints" / f"step={HALF:08d}.ckpt"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    for case in CASES:
        module = train(case, root, root / case / "whole", async_save=False)
        rank = module.global_rank
        if rank == 0:
            module.finish_files(root / case / "whole")
        train(case, root, root / case / "beside", async_save=True)
        half = copy_of(root / case / "whole", root / case / "resumed", rank)
        train(case, root, root / case / "resumed", ckpt_path=half)
        half = copy_of(root / case / "alone", root / case / "from_one", rank)
        train(case, root, root / case / "from_one", ckpt_path=half)
    train("SFT", root, root / "last", keep="last", final="weights_only")
    wrong = ""
    try:
        half = root / "LoRA" / "whole" / "checkpoints" / f"step={HALF:08d}.ckpt"
        train("SFT", root, root / "wrong", ckpt_path=half)
    except RuntimeError as error:
        wrong = str(error)
    (root / f"rank{rank}.json").write_text(json.dumps({"wrong": wrong}))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("sharded")
    make_policy(root / "policy")
    make_policy(root / "tied", tie_word_embeddings=True)
    for case in CASES:
        train(case, root, root / case / "alone", 1)
    return root, run_pair(main, root)


def checkpoint(folder: Path, step: int = LAST) -> Path:
    return folder / "checkpoints" / f"step={step:08d}.ckpt"


def close(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = read_checkpoint(checkpoint(first)), read_checkpoint(checkpoint(second))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in ours["state_dict"].items():
        torch.testing.assert_close(value, theirs["state_dict"][name], rtol=tolerance, atol=tolerance)
    for own, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert [group["params"] for group in own["param_groups"]] == [g["params"] for g in other["param_groups"]]
        assert own["state"].keys() == other["state"].keys()
        for number, state in own["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(value, other["state"][number][key], rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_reads_as_a_file(case: str, found: tuple[Path, Any]) -> None:
    root, _ = found
    whole = checkpoint(root / case / "whole")
    assert whole.is_dir() and {p.name for p in whole.iterdir()} == {
        "checkpoint.pt", ".metadata", "__0_0.distcp", "__1_0.distcp",
    }  # fmt: skip
    close(root / case / "whole", root / case / "alone", 1e-4)
    content, of_file = read_checkpoint(whole), read_checkpoint(checkpoint(root / case / "alone"))
    assert content.keys() == of_file.keys()
    light = read_checkpoint(whole, weights=False)
    assert light["global_step"] == LAST and light["state_dict"] == {} and "optimizer_states" in light


@pytest.mark.parametrize("case", CASES)
def test_resumed_and_written_beside_training(case: str, found: tuple[Path, Any]) -> None:
    root, _ = found
    whole = run_files(root / case / "whole", LAST)
    assert not differences(whole, run_files(root / case / "resumed", LAST))
    assert not differences(whole, run_files(root / case / "beside", LAST))


@pytest.mark.parametrize("case", CASES)
def test_other_numbers_of_processes(case: str, found: tuple[Path, Any], tmp_path: Path) -> None:
    """From one process to two, and from two to one: equal up to rounding."""
    root, _ = found
    close(root / case / "from_one", root / case / "alone", 1e-4)
    shutil.copytree(root / case / "whole", tmp_path / "run")
    train(case, root, tmp_path / "run", 1, ckpt_path=checkpoint(tmp_path / "run", HALF))
    close(tmp_path / "run", root / case / "alone", 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_it_is_loaded_and_exported(case: str, found: tuple[Path, Any], tmp_path: Path) -> None:
    root, _ = found
    folder = root / case / "whole"
    weights = read_checkpoint(checkpoint(folder))["state_dict"]
    for place in (folder, checkpoint(folder)):
        loaded = op.load(place)
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())
    assert differences(op.load(folder, which=HALF).state_dict(), weights)
    best = folder / "checkpoints" / "best"
    assert best.is_symlink() and not differences(op.load(best).state_dict(), op.load(folder, which="best").state_dict())
    assert (folder / "hf").is_dir()
    assert export(folder, tmp_path / "out").is_dir()


def test_what_stays_and_weights_alone(found: tuple[Path, Any]) -> None:
    root, ranks = found
    left = sorted(path.name for path in (root / "last" / "checkpoints").iterdir() if path.name != "best")
    assert left == [f"step={LAST:08d}.ckpt"]
    content = read_checkpoint(checkpoint(root / "last"))
    assert "optimizer_states" not in content and content["state_dict"]
    assert all("loading state_dict" in one["wrong"] for one in ranks)


def test_tied_weights_are_written_once(found: tuple[Path, Any]) -> None:
    root, _ = found
    rest = sharded.read_rest(checkpoint(root / "SFT" / "whole"))
    same = rest["sharded"]["same"]
    assert same and not {f"model/{name}" for name in same} & set(rest["sharded"]["tensors"])


@pytest.fixture
def damaged(found: tuple[Path, Any], tmp_path: Path) -> Path:
    shutil.copytree(found[0] / "SFT" / "whole", tmp_path / "run")
    return tmp_path / "run"


def test_a_missing_part(damaged: Path) -> None:
    (checkpoint(damaged) / "__1_0.distcp").unlink()
    with pytest.raises(UsageError, match=r"step=00000005.ckpt .* its file __1_0.distcp is missing"):
        read_checkpoint(checkpoint(damaged))
    assert newest_checkpoint(damaged) == checkpoint(damaged, HALF)  # passed over, with a word


def test_a_part_cut_short_or_changed(damaged: Path) -> None:
    part = checkpoint(damaged) / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"__0_0.distcp is cut short"):
        read_checkpoint(checkpoint(damaged))
    table = sharded.read_rest(checkpoint(damaged, HALF))["sharded"]["tensors"]
    part = checkpoint(damaged, HALF) / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    pieces = [piece for one in table.values() for piece in one["pieces"] if piece[2] == part.name]
    start, length = max(((piece[3], piece[4]) for piece in pieces), key=lambda place: place[1])
    content[start + length // 3] ^= 16
    part.write_bytes(content)
    assert not opens(checkpoint(damaged, HALF)) and newest_checkpoint(damaged) is None


def test_what_is_half_written_is_none(damaged: Path) -> None:
    (checkpoint(damaged) / "checkpoint.pt").unlink()  # the last file that is written
    shutil.copytree(checkpoint(damaged, HALF), damaged / "checkpoints" / ".step=00000009.ckpt.77.tmp")
    assert newest_checkpoint(damaged) == checkpoint(damaged, HALF)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one["pieces"][0].__setitem__(2, "../../secret"), "which is none of a checkpoint"),
        (lambda one: one.update(size=(1 << 20, 1 << 20)), "has .* numbers"),
        (lambda one: one["pieces"][0].__setitem__(3, 1 << 40), "cut short"),
        (lambda one: one["pieces"][0].__setitem__(4, 3), "bytes on the disk"),
    ],
)
def test_a_table_that_lies(damaged: Path, change: Any, said: str) -> None:
    path = checkpoint(damaged) / "checkpoint.pt"
    rest = load_plain(path)
    one = rest["sharded"]["tensors"][sorted(rest["sharded"]["tensors"])[-1]]
    one["pieces"] = [list(piece) for piece in one["pieces"]]
    change(one)
    save_plain(rest, path)
    with pytest.raises(UsageError, match=said):
        read_checkpoint(checkpoint(damaged))


def test_the_pickled_table_is_never_read(damaged: Path) -> None:
    before = read_checkpoint(checkpoint(damaged))
    (checkpoint(damaged) / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    assert not differences(before, read_checkpoint(checkpoint(damaged)))
