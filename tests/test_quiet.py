"""dae/quiet.py: threads that wait for work sleep, unless the user says otherwise."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOW = "import os, dae.quiet; print(os.environ['OMP_WAIT_POLICY'])"


@pytest.mark.parametrize("before, after", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_policy_is_passive_or_the_users_own(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before:
        environment["OMP_WAIT_POLICY"] = before
    line = [sys.executable, "-c", SHOW]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == after


@pytest.mark.parametrize(
    "file", ["train_pretrain.py", "train_seg.py", "eval.py", "dae/check.py", "tests/conftest.py"]
)
def test_it_is_set_before_torch_is_imported(file: str) -> None:
    """OpenMP reads it once, with torch. Nothing before it may import torch by another name."""
    names: list[str] = []
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    before = names[: names.index("dae.quiet")]
    assert not [name for name in before if name.split(".")[0] not in sys.stdlib_module_names]
