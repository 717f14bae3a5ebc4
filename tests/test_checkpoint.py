"""dae/weights/checkpoint.py: a checkpoint is loaded whole or refused, and replaced whole or not."""

import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refusal
from test_goldens import SMALL, monai_weights

from dae.errors import InputError
from dae.model import SwinUNETR
from dae.training import resume
from dae.weights import checkpoint
from dae.weights.foreign import read_weights


def state() -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(300.0)},
        "step": 7,
        "best": 0.25,
        "rng": checkpoint.rng_state(),
        "names": ["a"],
    }


def test_what_is_saved_comes_back_and_torch_alone_reads_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())

    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["model"]["w"], torch.arange(300.0))
        assert loaded["step"] == 7
        assert loaded["best"] == 0.25
        assert loaded["names"] == ["a"]
        assert loaded["format"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_two_checkpoints_of_the_same_state_have_the_same_bytes_and_seal(tmp_path: Path) -> None:
    saved = {"model": {"w": torch.arange(300.0)}, "step": 7}
    for name in ("a.pt", "b.pt"):
        checkpoint.save(tmp_path / name, saved)
    checkpoint.save(tmp_path / "c.pt", {**saved, "step": 8})

    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert checkpoint.seal_of(tmp_path / "a.pt") == checkpoint.seal_of(tmp_path / "b.pt")
    assert checkpoint.seal_of(tmp_path / "a.pt") != checkpoint.seal_of(tmp_path / "c.pt")


@pytest.mark.parametrize("cases", [pytest.param(200), pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_ever_loaded(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()

    rng = random.Random(0)
    for _ in range(cases):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert "last.pt" in refusal(checkpoint.load, path)
    print(f"\nbits flipped in a checkpoint of {len(whole)} bytes: {cases}, none taken")


@pytest.mark.parametrize("every", [pytest.param(101), pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_cut_at_any_byte_is_refused_and_neither_resumed_nor_taken_for_weights(
    tmp_path: Path, every: int
) -> None:
    """And at each of the last 200 bytes, where the archive's end and the seal are."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {**state(), "plan": {"classes": {}}})
    whole = path.read_bytes()
    assert len(whole) < 40_000

    lengths = sorted({*range(0, len(whole), every), *range(len(whole) - 200, len(whole))})
    for length in lengths:
        path.write_bytes(whole[:length])
        for line in (
            refusal(resume.saved_run, tmp_path, resume=True, script="train_pretrain.py"),
            refusal(read_weights, path),
        ):
            assert line.startswith(f"{path}: "), (length, line)
    print(f"\ncut at {len(lengths)} of {len(whole)} lengths, none taken")


def test_a_checkpoint_that_lacks_its_last_bytes_is_not_taken_for_weights_of_others(
    tmp_path: Path,
) -> None:
    """The archive may be whole where only the seal is cut, and torch alone would load it."""
    path = tmp_path / "last.pt"
    weights = monai_weights(SwinUNETR(1, 2, **SMALL))
    checkpoint.save(path, {"model": weights, "plan": {"classes": {}}, "step": 3})
    whole = path.read_bytes()
    for missing in range(1, 100):
        path.write_bytes(whole[:-missing])
        assert refusal(read_weights, path).startswith(f"{path}: ")


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    torch.save({"model": {}}, foreign)
    text = tmp_path / "text.pt"
    text.write_text("hello\n" * 100)

    for path in (foreign, text, tmp_path / "none.pt"):
        with pytest.raises(InputError) as error:
            checkpoint.load(path)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


class RunsCode:
    """Unpickled without care, it calls print."""

    def __reduce__(self) -> Any:
        return print, ("never",)


def test_a_file_that_would_run_code_is_refused_even_with_a_right_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "code.pt"
    checkpoint.save(path, {"model": RunsCode()})
    with pytest.raises(InputError, match="which is code and not a tensor"):
        checkpoint.load(path)
    assert capsys.readouterr().out == ""


def test_another_format_is_refused_by_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, {"format": checkpoint.FORMAT + 1, **state()}, sealed=True)
    with pytest.raises(InputError, match=r"last\.pt: written in format 2, this version reads 1$"):
        checkpoint.load(path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    before = path.read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(InputError, match="untouched"):
            checkpoint.save(path, {"model": {"w": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_anything_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut leaves a new name for an empty file, and no checkpoint."""
    done: list[tuple[str, Path]] = []
    rename = Path.replace

    def fsync(handle: int) -> None:
        done.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink()))

    def replace(source: Path, target: Path) -> None:
        done.append(("rename to", target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())

    (first, beside), *others = done
    assert first == "fsync"
    assert beside.parent == tmp_path
    assert beside != path
    assert others == [("rename to", path), ("fsync", tmp_path)]


def test_every_random_state_is_restored(tmp_path: Path) -> None:
    # A normal number leaves a second one in numpy's state, which must be restored as well.
    np.random.standard_normal()  # noqa: NPY002
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"rng": checkpoint.rng_state()})

    first = random_numbers()
    checkpoint.restore_rng(checkpoint.load(path)["rng"])
    assert random_numbers() == first


def random_numbers() -> list[float]:
    return [
        torch.rand(()).item(),
        float(np.random.rand()),  # noqa: NPY002
        random.random(),
        float(np.random.standard_normal()),  # noqa: NPY002
    ]
