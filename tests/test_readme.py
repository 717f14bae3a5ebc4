"""README.md and docs/: the lines, flags, files and tests that they name are there."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dae.config.lists import MakeListConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.pretext.methods import Pretext
from train_pretrain import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "\n".join(page.read_text() for page in PAGES)
LEDGER = (ROOT / "docs/paper-vs-code.md").read_text()
TESTS_OF_LEDGER = (ROOT / "tests/ledger.md").read_text()

# Flags of argparse, of torchrun, of the authors' code, and of `dae.weights convert`.
OTHER_FLAGS = {"help", "nproc_per_node", "nnodes", "rdzv_endpoint", "finetune_choice", "to"}


def rows_of(text: str) -> list[list[str]]:
    """The cells of every table row but the headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() != "choice"]


def without_comment(line: str) -> str:
    return re.sub(r"\s+", " ", line.partition("#")[0]).strip()


def test_the_lines_of_the_method_are_those_of_forward_in_their_order() -> None:
    block = re.search(r"```python\n(.*?)```", README, flags=re.S)
    assert block
    shown = [without_comment(line) for line in block[1].splitlines()]
    shown = [line for line in shown if line]
    forward = [without_comment(line) for line in inspect.getsource(Pretext.forward).splitlines()]
    places = [forward.index(line) for line in shown]
    assert len(shown) >= 6 and places == sorted(places)


def test_the_weights_can_be_taken_elsewhere_as_it_says(
    tiny: Callable[..., PretrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_stages = {"depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "crop": (64, 32, 32)}
    main(tiny(out=str(tmp_path / "runs/mine"), steps=1, **four_stages))

    page = (ROOT / "docs/weights.md").read_text()
    block = re.search(r"```python\n(.*?SwinUNETR.*?)```", page, flags=re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block[1], names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert model(torch.zeros(1, 1, 64, 32, 32)).shape == (1, 1, 64, 32, 32)


@pytest.mark.parametrize("path", sorted((ROOT / "dae").rglob("*.py")), ids=lambda p: p.name)
def test_every_file_or_its_folder_is_in_the_reading_guide(path: Path) -> None:
    if path.name == "__init__.py" or path.parent.name in ("config", "model", "evaluation"):
        return  # the guide of dae/__init__.py has these one by one; a test of layering holds that
    name = str(path.relative_to(ROOT))
    folder = str(path.parent.relative_to(ROOT)) + "/"
    assert (
        name in README
        or folder in README
        or name in ("dae/errors.py", "dae/files.py", "dae/boxes.py")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", TESTS_OF_LEDGER))))
def test_every_test_that_the_ledger_names_is_there(name: str) -> None:
    assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+\.py)`", TESTS_OF_LEDGER))))
def test_every_file_of_tests_that_the_ledger_names_is_there(name: str) -> None:
    assert list((ROOT / "tests").rglob(name))


def test_every_choice_that_a_test_holds_is_a_row_of_the_ledger() -> None:
    choices = {row[0] for row in rows_of(LEDGER)}
    assert {row[0] for row in rows_of(TESTS_OF_LEDGER)} <= choices
    assert len(choices) > 50


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w-]+)[ `]", DOCS))))
def test_every_flag_that_a_page_names_is_one(flag: str) -> None:
    configs = (
        PretrainConfig,
        SegConfig,
        MakeListConfig,
        *importlib.import_module("eval").CONFIGS.values(),
    )
    known = {field.name for config in configs for field in fields(config)}
    name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
    assert name in known | OTHER_FLAGS
