"""dae/quiet.py: threads that wait for work soon sleep, unless the user says otherwise."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SHOW = "import os, dae.quiet; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
    ],
)
def test_threads_soon_sleep_unless_the_user_says_how_they_wait(
    own: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    line = [sys.executable, "-c", SHOW]
    done = subprocess.run(
        line, capture_output=True, text=True, env={**environment, **own}, cwd=ROOT
    )
    assert done.stdout.strip() == expected


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
