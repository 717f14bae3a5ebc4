"""README.md and docs/: the lines, flags and files that they name are there."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch

from dae.config.pretrain import PretrainConfig
from dae.pretext.methods import Pretext
from tests.conftest import environment
from tests.test_ledger import config_classes
from train_pretrain import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "\n".join(page.read_text() for page in PAGES)

# Flags of argparse, of torchrun, of the authors' code, and of `dae.weights convert`.
OTHER_FLAGS = {"help", "nproc_per_node", "nnodes", "rdzv_endpoint", "finetune_choice", "to"}

# A script of the project or a module of it, and what follows it on its line.
SCRIPT = re.compile(r"(?:^|\s)(-m dae[\w.]*|(?:tests/benchmarks/)?\w+\.py)(?:\s+(.*))?$")


# Those whose first word is a command with flags of its own. Each --help takes seconds.
WITH_COMMANDS = ("eval.py", "-m dae.weights", "-m dae.illustrate")


class Command(NamedTuple):
    """A command line of a page, from its script on."""

    script: str  # "eval.py" or "-m dae.weights"
    words: tuple[str, ...]


class Help(NamedTuple):
    """The flags that --help lists, with the values that each takes; none for numbers and names."""

    choices: dict[str, tuple[str, ...]]


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


# --- flags


@cache
def known_flags() -> dict[str, set[str]]:
    """Every flag of every class in dae/config, with the values of a Literal: --to -> {dae, monai}.

    A flag of several classes takes what one of them does.
    """
    flags: dict[str, set[str]] = {}
    for config in config_classes():
        hints = get_type_hints(config)
        for field in fields(config):
            hint = hints[field.name]
            values = set(get_args(hint)) if get_origin(hint) is Literal else set()
            flags.setdefault(field.name, set()).update(values)
    return flags


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z][\w-]+)[ `]", DOCS))))
def test_every_flag_that_a_page_names_is_one(flag: str) -> None:
    name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
    assert name in known_flags().keys() | OTHER_FLAGS


@pytest.mark.parametrize("words", sorted(set(re.findall(r"`(--[a-z][\w-]+ [a-z]\w*)`", DOCS))))
def test_a_value_that_a_page_gives_a_flag_is_one(words: str) -> None:
    flag, value = words.split()
    values = known_flags().get(flag.removeprefix("--").replace("-", "_"), set())
    assert not values or value in values


# --- commands


def commands_in(text: str) -> list[Command]:
    """The commands of a page: lines of code, and code within a line.

    A script without flags may be a name in a list of files; a module after -m is always a command.
    """
    text = re.sub(r"\\\n\s*", "", text)  # a line that goes on in the next one
    lines = re.findall(r"^    .*$", text, flags=re.M)
    lines += re.findall(r"`([^`\n]+)`", text)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S):
        lines += block.splitlines()

    commands = []
    for line in lines:
        for part in re.split(r" && | \| |; | # ", line):
            found = SCRIPT.search(part)
            if not found:
                continue
            words = tuple((found[2] or "").split())
            has_flags = any(word.startswith("--") for word in words)
            if has_flags or found[1].startswith("-m"):
                commands.append(Command(found[1], words))
    return commands


@cache
def help_of(script: str, command: str = "") -> Help | None:
    """What a script, or a command of it, says to --help; None where it has no such command."""
    arguments = [*script.split(), *([command] if command else []), "--help"]
    process = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    choices: dict[str, tuple[str, ...]] = {}
    entry = r"^ +(--[a-z][\w-]*(?:, --[a-z][\w-]*)*)(?: \{([^}]*)\})?"
    for names, values in re.findall(entry, process.stdout, flags=re.M):
        for name in names.split(", "):
            choices[name] = tuple(values.split(",")) if values else ()
    return Help(choices) if process.returncode == 0 and choices else None


def problems_with(command: Command) -> list[str]:
    """Flags of a command that its script does not have, and values that a flag does not take."""
    first = command.words[0] if command.words else ""
    is_name = re.fullmatch(r"[a-z][\w-]*", first) is not None
    of_command = None
    if is_name and command.script in WITH_COMMANDS:
        of_command = help_of(command.script, first)
    known = of_command or help_of(command.script)
    if known is None:
        return [f"{command.script}: has no flags"]

    problems = []
    flag = ""
    for word in command.words:
        if word.startswith("--"):
            flag, _, _ = word.partition("=")
            if flag not in known.choices and flag != "--help":
                problems.append(f"{command.script}: no flag {flag}")
            continue
        allowed = known.choices.get(flag, ())
        for value in word.split("|"):
            if allowed and re.fullmatch(r"[a-z][\w-]*", value) and value not in allowed:
                problems.append(f"{command.script}: {flag} does not take {value}")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_the_flags_that_it_is_given(page: Path) -> None:
    for command in commands_in(page.read_text()):
        assert not problems_with(command)


@pytest.mark.parametrize(
    "line, problems",
    [
        ("train_pretrain.py --method mae --mask-ratio .4", []),
        ("train_pretrain.py --label-fraction 1", ["train_pretrain.py: no flag --label-fraction"]),
        ("train_pretrain.py --method simmim", ["train_pretrain.py: --method does not take simmim"]),
        ("eval.py predict --tta", []),
        ("eval.py score --tta", ["eval.py: no flag --tta"]),
        ("python -m dae.weights convert FILE --to dae|monai", []),
        (
            "python -m dae.weights convert FILE --to onnx",
            ["-m dae.weights: --to does not take onnx"],
        ),
        ("python -m dae.illustrate masking --ratio 1", ["-m dae.illustrate: no flag --ratio"]),
        ("python -m dae.illustration", ["-m dae.illustration: has no flags"]),
        ("torchrun --nproc_per_node=8 train_seg.py --fold $K", []),
    ],
)
def test_a_wrong_flag_of_a_command_is_found(line: str, problems: list[str]) -> None:
    (command,) = commands_in(f"    {line}\n")
    assert problems_with(command) == problems


def test_commands_are_found_over_several_lines_and_within_a_line() -> None:
    text = """
Give `eval.py predict --tta` a try; `--tta` alone is no command.

    pip install x && python train_seg.py --preset btcv \\
        --fold 0  # a comment --of words

```
python -m dae.check --device cpu
```
"""
    assert set(commands_in(text)) == {
        Command("eval.py", ("predict", "--tta")),
        Command("train_seg.py", ("--preset", "btcv", "--fold", "0")),
        Command("-m dae.check", ("--device", "cpu")),
    }


# --- numbers that follow from others


def test_the_hours_of_a_table_are_its_crops_at_the_measured_rate() -> None:
    speed = (ROOT / "docs/performance.md").read_text()
    page = (ROOT / "docs/reproduce.md").read_text()
    found = re.search(r"\*\*`--compile`\*\*.*?\*\*([\d.]+)\*\*", speed)
    assert found
    seconds_of_two_crops = float(found[1]) / 1000
    assert f"takes {found[1]} ms for a compiled step" in page

    rows = re.findall(r"^\| [\w, ]+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", page, flags=re.M)
    assert len(rows) == 7
    for *crops, hours in rows:
        total = sum(int(number.replace(",", "")) for number in crops)
        assert float(hours) == pytest.approx(total / 2 * seconds_of_two_crops / 3600, abs=0.06)
