"""dae/config: the paper's numbers are the defaults, a flag wins, a mistake is one line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from dae.config import pretrain, shared
from dae.config.command_line import from_command_line, parse, run_or_explain, to_json, with_tuples
from dae.config.evaluate import PredictConfig, ScoreConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.config.shared import FREE_ON_RESUME, NEEDS_LESS, differences
from dae.errors import InputError
from dae.model import BACKBONES
from dae.pretext.baselines import BASELINES
from dae.pretext.methods import METHODS
from dae.training.losses import LOSSES

SCRIPT = Path(__file__).parents[1] / "train_pretrain.py"

# What the paper says, and where.
PAPER: dict[str, tuple[Any, str]] = {
    "lr": (4e-4, "sec. 3.2"),
    "weight_decay": (1e-5, "sec. 3.2"),
    "steps": (20_000, "sec. 3.2"),
    "warmup": (500, "sec. 3.2"),
    "batch_size": (2, "sec. 3.2"),
    "crop": ((96, 96, 96), "sec. 3.2"),
    "mask_ratio": ((0.6,), "sec. 3.2"),
    "noise_std": (0.1, "sec. 3.2"),
    "downsample_factor": (4, "sec. 3.2"),
    "alpha": (0.05, "sec. 2"),
    "temperature": (0.07, "sec. 2"),
}

PROMISED = """
    preset data data-root out method backbone steps crop window depths heads feature-size batch-size
    accumulate lr weight-decay warmup clip alpha mask-ratio noise-std downsample-factor recon amp
    seed workers cache-dir validate-every save-every resume checkpointing compile dry-run
"""

# A command line, and the word of it that the answer names.
MISTAKES = [
    ("--mask 0.4", "--mask"),
    ("--mask-r 0.4", "--mask-r"),
    ("--foo 1", "--foo"),
    ("stray", "stray"),
    ("--crop 96 96", "--crop"),
    ("--crop 9 9 9 7", "7"),
    ("--depths", "--depths"),
    ("--lr", "--lr"),
    ("--steps 1.5", "--steps"),
    ("--lr fast", "--lr"),
    ("--steps 0", "--steps"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr-min 1e-3", "--lr-min"),
    ("--alpha inf", "--alpha"),
    ("--mask-ratio .2 1", "--mask-ratio"),
    ("--crop 96 0 96", "--crop"),
    ("--method mea", "--method"),
    ("--amp fp8", "--amp"),
    ("--preset x", "--preset"),
]


def parsed(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, argv, prog="train_pretrain.py", description="")


def run(*argv: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *python, str(SCRIPT), *argv]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """What --help says of each flag, on one line."""
    paragraphs = re.split(r"\n  (?=-)", run("--help").stdout)
    flags = [(re.match(r"--([a-z0-9-]+)", text), text) for text in paragraphs]
    return {match[1]: " ".join(text.split()) for match, text in flags if match}


@pytest.mark.parametrize("name", PAPER)
def test_the_defaults_are_the_papers_numbers_and_help_names_their_section(
    name: str, help_of: dict[str, str]
) -> None:
    value, section = PAPER[name]
    assert getattr(PretrainConfig(), name) == getattr(parsed("--preset", "paper"), name) == value
    assert section in help_of[name.replace("_", "-")]


def test_every_promised_flag_and_every_field_is_on_the_command_line(
    help_of: dict[str, str],
) -> None:
    assert set(help_of) >= set(PROMISED.split())
    assert {f.name.replace("_", "-") for f in fields(PretrainConfig) if f.metadata} == set(help_of)


def test_a_flag_overrides_the_preset_and_the_preset_the_default() -> None:
    config = parsed("--steps", "7", "--preset", "demo", "--depths", "1", "1")
    assert (config.steps, config.depths) == (7, (1, 1))
    assert (config.feature_size, config.crop) == (16, (48, 48, 48))  # the demo's
    assert (config.batch_size, config.noise_std) == (2, 0.1)  # the defaults


@pytest.mark.parametrize("preset", ["demo", "official-btcv"])
def test_epochs_that_are_asked_for_go_before_the_steps_of_a_preset(preset: str) -> None:
    def steps(*words: str) -> int:
        line = ["--preset", preset, *words]
        return parse(SegConfig, line, prog="", description="").steps

    assert steps("--epochs", "10") == 0  # which is: as --epochs says
    assert steps() == SegConfig.presets[preset]["steps"]
    assert steps("--epochs", "10", "--steps", "7") == 7


@pytest.mark.parametrize("cls", [PretrainConfig, SegConfig])
def test_presets_hold_known_names_and_usable_values(cls: Any) -> None:
    types = get_type_hints(cls)
    for preset, values in cls.presets.items():
        assert set(values) <= {f.name for f in fields(cls)}
        config = parse(cls, ["--preset", preset], prog="", description="")
        assert config == cls(preset=preset, **values)
        for name, value in values.items():
            if get_origin(types[name]) is Literal:
                assert value in get_args(types[name]), (preset, name)


def test_flags_become_values_of_the_declared_type() -> None:
    config = parsed(
        "--crop", "32", "48", "64", "--mask-ratio", ".2", ".6", "--no-normalize-hidden", "--resume"
    )
    assert (config.crop, config.mask_ratio) == ((32, 48, 64), (0.2, 0.6))
    assert (config.normalize_hidden, config.resume) == (False, True)


@pytest.mark.parametrize(
    "argv, ignored", [([], None), (["--ignore", "-1"], -1), (["--ignore", "255"], 255)]
)
def test_a_number_that_may_be_left_out_is_none_until_it_is_given(
    argv: list[str], ignored: int | None
) -> None:
    assert parse(ScoreConfig, argv, prog="eval.py", description="").ignore == ignored


@pytest.mark.parametrize("line, named", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag(line: str, named: str) -> None:
    """`--mask 0.4` must not be read as --mask-ratio: the next flag could change what it means."""
    with pytest.raises(InputError) as caught:
        parsed(*line.split())
    assert re.search(rf"(^|\s){named}(\W|$)", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_configuration_survives_json() -> None:
    for preset in PretrainConfig.presets:
        config = parsed("--preset", preset, "--spacing", "1", "1", "2.5")
        values = json.loads(json.dumps(to_json(config)))
        assert PretrainConfig(**with_tuples(values)) == config


def test_a_resumed_run_may_differ_only_in_what_no_weight_depends_on() -> None:
    assert {f.name for f in fields(PretrainConfig)} >= FREE_ON_RESUME
    saved = to_json(PretrainConfig())
    free = PretrainConfig(out="elsewhere", workers=9, resume=True, stop_after=3)
    assert differences(free, saved) == []
    assert differences(PretrainConfig(lr=1e-3, crop=(64, 64, 64)), saved) == ["crop", "lr"]

    # A flag that an older version did not know was at its default then.
    older = {name: value for name, value in saved.items() if name != "tf32"}
    assert differences(PretrainConfig(), older) == []
    assert differences(PretrainConfig(tf32=True), older) == ["tf32"]


def test_the_literal_names_are_those_of_the_methods_backbones_and_losses() -> None:
    assert (*METHODS, *BASELINES) == get_args(pretrain.Method)
    assert tuple(BACKBONES) == shared.BACKBONE_NAMES
    assert tuple(LOSSES) == get_args(get_type_hints(SegConfig)["loss"])


# --- as a user meets it


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--stpes", "5"], 2)])
def test_help_and_a_wrong_flag_answer_within_half_a_second(argv: list[str], code: int) -> None:
    """Of processor time: a busy machine takes longer."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert run(*argv).returncode == code
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # of child processes
    assert min(seconds) < 0.5


def test_a_wrong_flag_is_one_line_on_stderr_and_nothing_else() -> None:
    done = run("--stpes", "5")
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "--stpes" in done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--dry-run"]])
def test_torch_is_not_imported_to_answer(argv: list[str]) -> None:
    done = run(*argv, python=("-X", "importtime"))
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "timm", "nibabel"}


def test_a_dry_run_prints_the_configuration_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset", "demo", "--steps", "7", "--dry-run"]
    with pytest.raises(SystemExit) as stopped:
        from_command_line(PretrainConfig, prog="train_pretrain.py", description="", arguments=argv)
    assert stopped.value.code == 0
    printed = PretrainConfig(**with_tuples(json.loads(capsys.readouterr().out)))
    assert printed == replace(parsed("--preset", "demo"), steps=7, dry_run=True)


def test_the_arguments_are_those_of_the_process_where_none_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", "--steps", "7"])
    config = from_command_line(PretrainConfig, prog="train_pretrain.py", description="")
    assert config.steps == 7


def refuse() -> None:
    raise InputError("a.nii: cut\nshort")


def test_a_refusal_becomes_one_line_and_exit_code_2_or_under_dae_debug_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_or_explain(lambda: 7, "train_pretrain.py") == 7
    monkeypatch.delenv("DAE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_or_explain(refuse, "train_pretrain.py")
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "train_pretrain.py: a.nii: cut short\n")

    monkeypatch.setenv("DAE_DEBUG", "1")
    with pytest.raises(InputError):
        run_or_explain(refuse, "train_pretrain.py")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_becomes_one_line_and_the_exit_code_of_shells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DAE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_or_explain(interrupt, "train_seg.py")
    assert stopped.value.code == 130
    assert capsys.readouterr() == ("", "train_seg.py: interrupted\n")

    monkeypatch.setenv("DAE_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        run_or_explain(interrupt, "train_seg.py")


def more_than_a_gpu_has() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def more_than_torch_gets() -> None:
    torch.empty(2**50)


def more_than_numpy_gets() -> None:
    np.empty(2**60, dtype=np.uint8)


def more_than_cublas_gets() -> None:
    broken("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "ask",
    [more_than_a_gpu_has, more_than_cublas_gets, more_than_torch_gets, more_than_numpy_gets],
    ids=lambda f: f.__name__,
)
def test_what_does_not_fit_into_memory_is_one_line_that_names_what_helps(
    ask: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_or_explain(ask, "train_seg.py", needs_less=NEEDS_LESS)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_seg.py: out of memory (")
    for flag in ("--checkpointing", "--batch-size", "--accumulate", "--crop"):
        assert flag in line


def test_an_error_of_the_code_stays_a_traceback() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_or_explain(lambda: broken("shape mismatch"), "train_seg.py")


def broken(text: str) -> None:
    raise RuntimeError(text)


def test_the_name_of_a_backbone_is_checked_wherever_it_is_a_flag() -> None:
    for config in (PretrainConfig, SegConfig, PredictConfig):
        with pytest.raises(InputError, match=r"^--backbone resnet: take swin_unetr, "):
            parse(config, ["--backbone", "resnet"], prog="", description="")
        parse(config, ["--backbone", "mine:Net"], prog="", description="")
