"""dae/training/checkpoint.py: whole or refused."""

import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dae.config.command_line import to_json
from dae.config.shared import OptimConfig
from dae.errors import InputError
from dae.weights import checkpoint


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
        assert (loaded["step"], loaded["best"], loaded["names"], loaded["format"]) == (
            7,
            0.25,
            ["a"],
            1,
        )
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


def test_another_format_is_refused_by_both_numbers(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, {"format": checkpoint.FORMAT + 1, **state()}, sealed=True)
    with pytest.raises(InputError, match=r"last\.pt: written in format 2, this version reads 1$"):
        checkpoint.load(path)


def test_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_anything_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves a new name for an empty file, with the checkpoint before gone."""
    done: list[str] = []

    def fsync(handle: int) -> None:
        done.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().name}")

    def replace(source: Path, target: Path, rename: Any = Path.rename) -> None:
        done.append(f"rename to {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    checkpoint.save(tmp_path / "last.pt", state())
    assert done == ["fsync last.pt.part", "rename to last.pt", f"fsync {tmp_path.name}"]


def test_the_factors_of_a_global_batch_may_change_and_their_product_may_not() -> None:
    then = OptimConfig(batch_size=4, accumulate=2)
    saved = {
        "global_batch": 16,
        "config": to_json(then),
        "threads": torch.get_num_threads(),
    }  # on two ranks
    for batch_size, accumulate, world in ((4, 2, 2), (2, 8, 1), (16, 1, 1), (1, 1, 16)):
        now = OptimConfig(batch_size=batch_size, accumulate=accumulate)
        checkpoint.check_same_batch(Path("last.pt"), saved, now, world=world)
        told = checkpoint.what_differs(saved, now, world=world)
        assert (
            told == []
            if (batch_size, world) == (4, 2)
            else told[0].startswith("2 ranks x batch 4 x 2 before")
        )
    with pytest.raises(
        InputError,
        match=r"^--batch-size 4 x --accumulate 2 x 1 ranks = 8 samples .* started with 16",
    ):
        checkpoint.check_same_batch(Path("last.pt"), saved, then, world=1)


def test_every_random_state_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"rng": checkpoint.rng_state()})

    def draws() -> list[float]:
        return [
            torch.rand(()).item(),
            float(np.random.rand()),  # noqa: NPY002
            random.random(),
            float(np.random.standard_normal()),  # noqa: NPY002
        ]

    first = draws()
    checkpoint.restore_rng(checkpoint.load(path)["rng"])
    assert draws() == first


@pytest.mark.parametrize("name", ["best.pt", "config.json", "figures/loss.png"])
def test_a_file_that_is_not_a_runs_is_not_replaced_by_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which a run would replace"):
        checkpoint.check_out_folder(tmp_path, resume=False)


def test_a_file_that_a_run_reads_is_not_replaced_by_it_even_when_it_goes_on(tmp_path: Path) -> None:
    """Weights or a data list in the run folder, under a name of the run's own, or a link to one."""
    (tmp_path / "config.json").write_text("a data list")
    (tmp_path / "link.json").symlink_to(tmp_path / "config.json")
    for given in ("config.json", "link.json"):
        with pytest.raises(InputError, match=f"{given} is read and would be replaced"):
            checkpoint.check_out_folder(tmp_path, resume=True, inputs=("", str(tmp_path / given)))


@pytest.mark.parametrize(
    "classes, made_by", [({}, "train_pretrain.py"), ({"0": "background"}, "train_seg.py")]
)
def test_a_run_of_the_other_script_is_named_when_it_is_resumed(
    classes: dict[str, str], made_by: str, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "last.pt", {"plan": {"classes": classes}})
    other = {"train_pretrain.py": "train_seg.py", "train_seg.py": "train_pretrain.py"}[made_by]
    with pytest.raises(InputError, match=f"is of a run of {made_by}; name another --out"):
        checkpoint.left_in(tmp_path, resume=True, script=other)
    assert checkpoint.left_in(tmp_path, resume=True, script=made_by) is not None
