"""docs/paper-vs-code.md: every row has a flag that exists, or a test that exists, or both.

The rows of tests/ledger.md name the tests, in the same sections and in the same order.
"""

import importlib
import re
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch

from dae.config.command_line import parse
from dae.config.pretrain import PretrainConfig
from dae.config.segment import AugmentConfig, SegConfig
from dae.training.optim import adamw
from eval import CONFIGS
from tests.test_goldens import CASES as GOLDENS

ROOT = Path(__file__).parents[1]
LEDGER = (ROOT / "docs/paper-vs-code.md").read_text()
TESTS = (ROOT / "tests/ledger.md").read_text()

# Whose flags the rows of a section name.
SCRIPTS: dict[str, tuple[type[Any], ...]] = {
    "The method": (PretrainConfig,),
    "Pre-training: data and optimisation": (PretrainConfig,),
    "Fine-tuning": (SegConfig,),
    "Prediction and scoring": tuple(CONFIGS.values()),
}


class Row(NamedTuple):
    """A choice: what the last column of its table says."""

    section: str
    choice: str
    cell: str


def rows_of(text: str) -> list[Row]:
    """Every row of every table of a page but the headings."""
    rows = []
    section = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if not line.startswith("| "):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells[0] != "choice":
            rows.append(Row(section, cells[0], cells[-1]))
    return rows


# --- flags


class Flag(NamedTuple):
    """A flag as a cell names it."""

    name: str  # --mask-scope
    values: tuple[str, ...]  # that are given for it
    script: str  # in front of it, as "eval.py score"; empty for the script of the section


@cache
def config_classes() -> list[type[Any]]:
    """Every class in dae/config whose fields are flags."""
    classes = []
    for path in sorted((ROOT / "dae/config").glob("[a-z]*.py")):
        module = importlib.import_module(f"dae.config.{path.stem}")
        for config in vars(module).values():
            if isinstance(config, type) and is_dataclass(config):
                classes.append(config)
    return classes


@cache
def hints_of(config: type[Any]) -> dict[str, Any]:
    return get_type_hints(config)


def fields_of(config: type[Any]) -> Sequence[Field[Any]]:
    return fields(config)


def flags_in(cell: str) -> list[Flag]:
    """The flags of a cell: `--method mae --mask-block` are two, the first with a value.

    A bar between values is written with a backslash before it.
    """
    flags = []
    for code in re.findall(r"`([^`]+)`", cell):
        script, *others = re.split(r"(?:^|\s)(?=--)", code.replace("\\|", "|"))
        for text in others:
            name, *values = text.replace("|", " ").split()
            flags.append(Flag(name, tuple(values), script))
    return flags


def choices_of(flag: Flag, section: str) -> list[set[str]]:
    """For each class that has the flag, what a Literal allows; an empty set for other types."""
    configs = config_classes() if flag.script else SCRIPTS[section]
    name = flag.name.removeprefix("--").replace("-", "_")
    found = []
    for config in configs:
        for field in fields_of(config):
            hint = hints_of(config)[field.name]
            is_negated = hint is bool and name == f"no_{field.name}"
            if field.name == name or is_negated:
                found.append(set(get_args(hint)) if get_origin(hint) is Literal else set())
    return found


def problems_with_flags(row: Row) -> list[str]:
    """What is wrong with the flags of a row, a line each."""
    problems = []
    for command in re.findall(r"`eval\.py (\w+)", row.cell):
        if command not in CONFIGS:
            problems.append(f"{row.choice}: no command eval.py {command}")

    for flag in flags_in(row.cell):
        found = choices_of(flag, row.section)
        if not found:
            problems.append(f"{row.choice}: no flag {flag.name}")
            continue
        choices = found[0]
        values = set(flag.values)
        if choices and values - choices:
            unknown = ", ".join(sorted(values - choices))
            problems.append(f"{row.choice}: {flag.name} does not take {unknown}")
        if len(values) > 1 and values != choices:
            problems.append(f"{row.choice}: {flag.name} takes {', '.join(sorted(choices))}")
    return problems


def has_flag(row: Row) -> bool:
    """Whether the last column names a way to turn the choice: a flag, a command, the data list."""
    words = re.sub(r"`[^`]*`", "", row.cell)
    return "`" in row.cell or "list" in words or "the same" in words


# --- tests


def names_of_tests() -> set[str]:
    """Every test, and every golden that a test compares with."""
    names = {case[0] for case in GOLDENS}
    for path in (ROOT / "tests").rglob("test_*.py"):
        names |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), flags=re.M))
    return names


EXIST = names_of_tests()


def problems_with_tests(row: Row) -> list[str]:
    """What is wrong with the tests of a row, a line each."""
    named = re.findall(r"`([^`]+)`", row.cell)
    problems = [f"{row.choice}: no test {name}" for name in named if name not in EXIST]
    if not named:
        problems.append(f"{row.choice}: names no test")
    return problems


def problems_of(ledger: str, tests: str) -> list[str]:
    """Everything that is wrong between the two pages, a line each."""
    problems = []
    rows = rows_of(ledger)
    held = {(row.section, row.choice): row for row in rows_of(tests)}
    for row in rows:
        problems += problems_with_flags(row)
        if (row.section, row.choice) not in held:
            ending = "" if has_flag(row) else " and no flag"
            problems.append(f"{row.section}, {row.choice}: no test{ending}")

    for row in held.values():
        problems += problems_with_tests(row)
    choices = {(row.section, row.choice) for row in rows}
    for key in held:
        if key not in choices:
            problems.append(f"{key[1]}: held by a test, but no row of {key[0]}")
    return problems


# --- the pages as they are


def test_the_four_tables_are_read_whole() -> None:
    rows = rows_of(LEDGER)
    assert {row.section for row in rows} == set(SCRIPTS)
    assert len(rows) >= 60
    assert len({(row.section, row.choice) for row in rows}) == len(rows)


@pytest.mark.parametrize("row", rows_of(LEDGER), ids=lambda row: row.choice)
def test_the_flags_of_a_choice_exist_with_the_values_given(row: Row) -> None:
    assert not problems_with_flags(row)


@pytest.mark.parametrize("row", rows_of(TESTS), ids=lambda row: row.choice)
def test_the_tests_of_a_choice_exist(row: Row) -> None:
    assert not problems_with_tests(row)


def test_every_choice_is_held_by_a_test() -> None:
    assert not problems_of(LEDGER, TESTS)


def test_both_pages_have_the_same_choices_in_the_same_order() -> None:
    choices = [(row.section, row.choice) for row in rows_of(LEDGER)]
    assert [(row.section, row.choice) for row in rows_of(TESTS)] == choices


# --- that it can fail


@pytest.mark.parametrize(
    "before, after, problem",
    [
        ("`--noise-std`", "`--noise-sigma`", "noise: no flag --noise-sigma"),
        ("`--no-normalize-hidden`", "`--no-stem`", "hidden states: no flag --no-stem"),
        ("sample\\|batch\\|token", "sample\\|batch", "--mask-scope takes batch, sample, token"),
        ("sample\\|batch\\|token", "sample\\|rank", "--mask-scope does not take rank"),
        ("`--method mae ", "`--method simmim ", "MAE: --method does not take simmim"),
        ("`--loss dice\\|dice_ce`", "`--alpha`", "loss: no flag --alpha"),  # of another script
        ("`eval.py folds`", "`eval.py table`", "no command eval.py table"),
        ("score --ignore`", "score --ignored`", "no flag --ignored"),
        ("| how many of 48 |", "| how many |", "The method, how many: no test and no flag"),
        ("| alpha |", "| weight of CMCL |", "weight of CMCL: no test"),
    ],
)
def test_a_row_that_is_changed_in_a_copy_of_the_ledger_is_found(
    before: str, after: str, problem: str
) -> None:
    assert LEDGER.count(before) >= 1
    found = problems_of(LEDGER.replace(before, after), TESTS)
    assert any(problem in line for line in found), found


def test_a_test_that_is_renamed_is_found() -> None:
    name = "test_eq_5_is_l1_plus_alpha_times_cmcl"
    assert problems_of(LEDGER, TESTS.replace(name, "test_eq_6")) == ["alpha: no test test_eq_6"]
    golden = TESTS.replace("`merging_64`", "`merging_65`")
    assert problems_of(LEDGER, golden) == ["patch merging: no test merging_65"]
    assert "alpha: names no test" in problems_of(LEDGER, TESTS.replace(f"`{name}`", "by hand"))


def test_a_flag_that_leaves_the_configurations_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if --z had been renamed: no configuration has it any more."""

    def without_z(config: type[Any]) -> list[Any]:
        return [field for field in fields(config) if field.name != "z"]

    monkeypatch.setitem(globals(), "fields_of", without_z)
    assert problems_of(LEDGER, TESTS) == ["z, eq. 3: no flag --z"]


# --- choices that no other file of tests holds


def test_adamw_has_the_betas_of_the_ledger() -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = adamw(network.named_parameters(), PretrainConfig())
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def preset(name: str) -> SegConfig:
    return parse(SegConfig, ["--preset", name], prog="train_seg.py", description="")


def test_fine_tuning_has_the_rate_of_the_text_and_official_that_of_the_code() -> None:
    assert SegConfig().lr == preset("btcv").lr == preset("feta").lr == 4e-4
    assert preset("official-btcv").lr == 8e-4


def test_official_pre_training_is_the_column_of_the_code_in_numbers() -> None:
    """Its README's: 1000 epochs, 4 of warm-up, of 9,513 volumes, two on each of eight GPUs."""
    config = parse(
        PretrainConfig, ["--preset", "official"], prog="train_pretrain.py", description=""
    )
    epoch = ceil(9513 / (8 * 2))
    assert (config.steps, config.warmup) == (1000 * epoch, 4 * epoch)
    assert config.batch_size == 2
    assert (config.lr, config.lr_min, config.weight_decay) == (1e-4, 1e-5, 0.05)

    assert config.noise_std**2 == pytest.approx(0.1)
    planes = 48
    assert config.mask_ratio[0] * planes == pytest.approx(int(0.6 * planes))
    assert (config.alpha, config.temperature) == (0.03, 0.5)


def test_official_fine_tuning_is_the_column_of_the_code_in_numbers() -> None:
    """1000 epochs, 50 of warm-up, of 24 volumes with four crops each, 16 crops in a step."""
    config = preset("official-btcv")
    epoch = 24 * 4 // (4 * config.batch_size)
    assert (config.steps, config.warmup) == (1000 * epoch, 50 * epoch)
    assert (config.flip, config.rotate, config.brightness) == (0.2, 0.2, 0.1)
    assert (config.zoom, config.contrast, config.noise) == (0, 0, 0)


def test_feta_keeps_the_spacing_of_its_files() -> None:
    assert preset("feta").spacing == ()
    assert preset("btcv").spacing == (1.5, 1.5, 2.0)


def test_feta_has_flips_noise_and_brightness_alone() -> None:
    config = preset("feta")
    chances = {field.name: getattr(config, field.name) for field in fields(AugmentConfig)}
    assert {name for name, chance in chances.items() if chance} == {"flip", "noise", "brightness"}
