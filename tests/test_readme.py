"""README.md: its Python runs, and its tree names every file."""

import importlib
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from train_pretrain import main

OTHERS = {
    "help",
    "nnodes",
    "rdzv_endpoint",
    "finetune_choice",
}  # argparse's, torchrun's, the authors'
CONFIGS = importlib.import_module("eval").CONFIGS
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_weights_can_be_taken_elsewhere_as_it_says(
    tiny: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(
        tiny(
            out=str(tmp_path / "runs/mine"),
            depths=(1, 1, 1, 1),
            heads=(1, 1, 1, 1),
            crop=(64, 32, 32),
            steps=1,
        )
    )
    block = re.search(r"((?:    .*\n|\n)*?    from dae\.model import.*\n(?:    .*\n|\n)+)", TEXT)
    assert block
    code = "\n".join(line.removeprefix("    ") for line in block[1].split("\n"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert model(torch.zeros(1, 1, 64, 32, 32)).shape == (1, 1, 64, 32, 32)


@pytest.mark.parametrize("path", sorted((ROOT / "dae").rglob("*.py")), ids=lambda p: p.name)
def test_every_file_or_its_folder_is_in_the_tree(path: Path) -> None:
    if path.name != "__init__.py":
        inside = str(path.relative_to(ROOT))
        assert inside in TEXT or str(path.parent.relative_to(ROOT)) + "/ " in TEXT


LEDGER = (ROOT / "docs/paper-vs-code.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", LEDGER))))
def test_every_test_that_the_ledger_names_is_there(name: str) -> None:
    assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w-]+)[ `]", TEXT + LEDGER))))
def test_every_flag_that_readme_and_ledger_name_is_one(flag: str) -> None:
    known = {
        f.name for config in (PretrainConfig, SegConfig, *CONFIGS.values()) for f in fields(config)
    }
    assert flag.removeprefix("--no-").removeprefix("--").replace("-", "_") in known | OTHERS
