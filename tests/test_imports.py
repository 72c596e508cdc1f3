"""What imports what: the direction between the packages, and what stays out until it is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT

HEAVY = ("lightning", "transformers", "gymnasium", "matplotlib", "torch", "scipy", "minari", "datasets", "h5py")
ALLOWED = {"lightning_modules": {"offpolicy", "lightning_modules"}, "offpolicy": {"offpolicy"}, "datasets_cfg": set()}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file names in an import statement, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", list(ALLOWED))
def test_direction(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        wrong = imports(path) & set(ALLOWED) - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_importing_the_library_is_light_and_quick() -> None:
    code = f"""
import sys, time
began = time.process_time()
import offpolicy
assert "TD3BC" in dir(offpolicy)
import lightning_modules, datasets_cfg, offpolicy.cli.arguments, offpolicy.cli.entry
took = time.process_time() - began
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
print(took)
"""
    took = [float(run(code).stdout) for _ in range(2)]
    assert min(took) < 0.5, took


def test_opening_data_needs_no_trainer() -> None:
    run(f"""
import sys
import offpolicy.data.replay, offpolicy.data.views, offpolicy.data.sampling, offpolicy.data.normalize
import offpolicy.data.names, offpolicy.data.validate, offpolicy.data.sources
heavy = [name for name in {HEAVY} if name in sys.modules and name != "torch"]
assert not heavy, heavy
""")


def test_misspelt_names_are_answered_before_anything_heavy() -> None:
    run(f"""
import sys
from offpolicy.cli.arguments import read_command
from offpolicy.errors import UsageError
cases = [["--model", "TD4BC"], ["--data", "pendlum-stitch-v0"], ["--modle", "IQL"], ["--run.evel_every", "1"], ["x"],
         ["--config", "none.yaml"], ["--recipe", "slow"]]
for case in cases:
    try:
        read_command(case)
    except UsageError as error:
        assert "\\n" not in str(error)
    else:
        raise SystemExit(f"{{case}} was accepted")
read_command(["--model", "td3+bc", "--data", "Pendulum_Stitch-V0"])
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
""")


def test_a_wrong_name_on_the_command_line_takes_a_moment() -> None:
    began = os.times()
    command = [sys.executable, "-m", "offpolicy.fit", "--model", "TD4BC"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'TD3BC'?" in done.stderr and "Traceback" not in done.stderr
    used = os.times()  # of the processor: the machine may be busy
    assert used.children_user + used.children_system - began.children_user - began.children_system < 3.0


def test_public_names() -> None:
    import offpolicy

    for name in dir(offpolicy):
        assert getattr(offpolicy, name) is not None
    assert callable(offpolicy.fit) and callable(offpolicy.evaluate)
    assert offpolicy.TD3BC is __import__("lightning_modules.td3bc", fromlist=["TD3BC"]).TD3BC
    with pytest.raises(AttributeError, match="TD4BC"):
        _ = offpolicy.TD4BC


def test_a_foreign_package_of_the_same_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "lightning_modules").mkdir()
    (tmp_path / "lightning_modules" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nimport offpolicy; offpolicy.TD3BC"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "Remove the other distribution" in done.stderr and str(tmp_path) in done.stderr


def run(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_metrics_of_others_are_loaded_when_used() -> None:
    """Lightning takes two classes of torchmetrics; the whole package and what it imports wait for who uses it."""
    run("""
import sys
import offpolicy
import lightning.pytorch
late = [name for name in ("transformers", "scipy.signal", "torchmetrics.functional") if name in sys.modules]
assert not late, late
from torchmetrics import Accuracy, Metric  # as a user's method may
import torch, torchmetrics
assert issubclass(Accuracy, Metric)
accuracy = torchmetrics.Accuracy(task="binary")
assert isinstance(accuracy, Metric) and accuracy(torch.tensor([1, 0]), torch.tensor([1, 1])) == 0.5
assert torchmetrics.functional.accuracy and torchmetrics.__version__ and hasattr(torchmetrics, "nothing") is False
""")


def test_metrics_loaded_before_the_library_are_left_alone() -> None:
    run("""
import torchmetrics
before = torchmetrics.Accuracy
import offpolicy, sys
assert sys.modules["torchmetrics"].Accuracy is before
""")
