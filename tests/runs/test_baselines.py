"""train_pretrain.py with the rows of Table 4: what each leaves, and what a run says of it."""

from dataclasses import replace
from pathlib import Path

import torch
from conftest import events, refusal, same_weights, train
from test_pretrain import Config, weights
from test_train_seg import Config as SegRuns

import train_seg
from dae.config.pretrain import PretrainConfig
from dae.weights import checkpoint
from train_pretrain import main

# --- scratch


def test_scratch_leaves_the_weights_that_every_method_of_its_seed_starts_from(
    tiny: Config, tmp_path: Path
) -> None:
    scratch = tiny(method="scratch", seed=3)
    main(scratch)
    saved = checkpoint.load(Path(scratch.out) / "last.pt")
    assert (saved["step"], saved["plan"]["method"], saved["pretext"]) == (0, "scratch", {})
    assert not events(scratch, "train") and not events(scratch, "warning")
    assert events(scratch, "end")[0]["reason"] == "finished"

    for method in ("dae", "mae"):
        standing = tiny(method=method, seed=3, lr=0.0, steps=1, out=str(tmp_path / method))
        main(standing)
        assert same_weights(weights(scratch.out), weights(standing.out))


def test_fine_tuning_from_scratchs_weights_is_fine_tuning_from_scratch_bit_for_bit(
    tiny: Config, tiny_seg: SegRuns, pretrained: Path, tmp_path: Path
) -> None:
    """With one seed for both. With another one the weights are those of the seed of `scratch`."""
    untrained = tiny(
        data=str(pretrained / "phantoms/pretrain.json"),
        cache_dir=str(pretrained / "cache"),
        method="scratch",
        seed=5,
        validate_crops=1,
        out=str(tmp_path / "untrained"),
    )
    main(untrained)
    path = f"{untrained.out}/last.pt"

    transferred = tiny_seg(pretrained=path, seed=5, steps=2, out=str(tmp_path / "transferred"))
    drawn = replace(transferred, from_scratch=True, out=str(tmp_path / "drawn"))
    train_seg.main(transferred)
    train_seg.main(drawn)
    assert same_weights(weights(transferred.out), weights(drawn.out))

    other = replace(transferred, seed=6, lr=0.0, out=str(tmp_path / "other"))
    train_seg.main(other)
    before, after = weights(untrained.out), weights(other.out)
    assert all(torch.equal(before[name], after[name]) for name in after if "head" not in name)
    assert after["head.weight"].any()


def test_a_scratch_that_is_run_again_changes_nothing_and_is_not_written_over(tiny: Config) -> None:
    config = tiny(method="scratch")
    main(config)
    before = weights(config.out)
    main(replace(config, resume=True))
    assert same_weights(before, weights(config.out))
    assert "holds a run already" in refusal(main, config)


def test_scratch_of_two_ranks_is_that_of_one(tiny: Config, tmp_path: Path) -> None:
    one = tiny(method="scratch", seed=1)
    two = replace(one, out=str(tmp_path / "two"))
    main(one)
    assert train(two, ranks=2).returncode == 0
    assert same_weights(weights(one.out), weights(two.out))


def test_scratch_with_weights_to_start_from_is_refused(tiny: Config, tmp_path: Path) -> None:
    first: PretrainConfig = tiny(method="scratch", out=str(tmp_path / "first"))
    main(first)
    init = f"{first.out}/last.pt"
    assert refusal(main, tiny(method="scratch", init=init)).startswith("--init: ")
    main(tiny(init=init, steps=1, lr=0.0))  # but another method may start from them
    assert same_weights(weights(first.out), weights(tiny().out))
