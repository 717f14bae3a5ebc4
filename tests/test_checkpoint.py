"""dae/training/checkpoint.py: whole or refused."""

import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dae.config import InputError
from dae.training import checkpoint


def state() -> dict[str, Any]:
    return {"model": {"w": torch.arange(300.0)}, "step": 7, "best": 0.25, "rng": checkpoint.rng_state(), "names": ["a"]}


def test_what_is_saved_comes_back_and_torch_alone_reads_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded["model"]["w"], torch.arange(300.0))
        assert (loaded["step"], loaded["best"], loaded["names"], loaded["format"]) == (7, 0.25, ["a"], 1)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_no_flipped_bit_is_ever_loaded(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"last\.pt"):
            checkpoint.load(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="checksum"):
        checkpoint.load(path)


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    foreign, text = tmp_path / "foreign.pt", tmp_path / "text.pt"
    torch.save({"model": {}}, foreign)
    text.write_text("hello\n" * 100)
    for path in (foreign, text, tmp_path / "none.pt"):
        with pytest.raises(InputError) as error:
            checkpoint.load(path)
        assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_refused_even_with_a_right_checksum(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("never",)

    path = tmp_path / "evil.pt"
    checkpoint.save(path, {"model": Evil()})
    with pytest.raises(InputError, match="not a checkpoint that can be read"):
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
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_every_random_state_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"rng": checkpoint.rng_state()})

    def draws() -> list[float]:
        return [torch.rand(()).item(), float(np.random.rand()), random.random(), float(np.random.standard_normal())]  # noqa: NPY002

    first = draws()
    checkpoint.restore_rng(checkpoint.load(path)["rng"])
    assert draws() == first
