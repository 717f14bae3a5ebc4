"""train_pretrain.py with the rows of Table 4: what each leaves, and what a run says of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import events, refusal, same_weights, train
from test_pretrain import Config, weights
from test_train_seg import Config as SegRuns

import train_seg
from dae.config.command_line import parse
from dae.config.pretrain import PretrainConfig
from dae.pretext.baselines import BASELINES
from dae.weights import checkpoint
from dae.weights.foreign import read_weights
from train_pretrain import build, main

every = pytest.mark.parametrize("method", [name for name in BASELINES if name != "scratch"])

# --- scratch


def test_scratch_leaves_the_weights_that_every_method_of_its_seed_starts_from(
    tiny: Config, tmp_path: Path
) -> None:
    scratch = tiny(method="scratch", seed=3)
    main(scratch)
    saved = checkpoint.load(Path(scratch.out) / "last.pt")
    assert (saved["step"], saved["plan"]["method"], saved["pretext"]) == (0, "scratch", {})
    assert "untrained, as the seed drew them" in read_weights(Path(scratch.out) / "last.pt").notes
    assert not events(scratch, "train") and not events(scratch, "warning")
    assert events(scratch, "end")[0]["reason"] == "finished"

    for method in ("dae", "mae"):
        standing = tiny(
            method=method, seed=3, mask_block=4, lr=0.0, steps=1, out=str(tmp_path / method)
        )
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


# --- the rows that train


@every
def test_a_run_leaves_its_folder_and_its_terms_as_promised(
    tiny: Config, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(method=method, steps=6, validate_every=3, mask_block=4)
    result = main(config)
    out = Path(config.out)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    pictures = {"figures/reconstruction.png", "figures/loss.png"}
    assert files == {"config.json", "log.jsonl", "run.lock", "last.pt", "best.pt", *pictures}

    baseline = BASELINES[method]
    for event in (*events(config, "train"), *events(config, "validation")):
        assert event["loss"] == pytest.approx(
            sum(event[name] for name in baseline.losses), abs=1e-5
        )
        assert {name for name in baseline.terms if "accuracy" in name} == set(event["chance"])
        assert set(baseline.terms) <= event.keys() and "cmcl" not in event
    for event in events(config, "train"):
        assert 1 <= event["z_rank"] <= event["z_samples"] == 2
    assert "validation loss" in capsys.readouterr().err

    later = [event["loss"] for event in events(config, "validation")[1:]]
    assert checkpoint.load(out / "best.pt")["best"] == min(later)
    assert later[-1] == result["loss"]


@every
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    tiny: Config, tmp_path: Path, method: str
) -> None:
    straight = tiny(method=method, out=str(tmp_path / "straight"), steps=5, mask_block=4)
    broken = replace(straight, out=str(tmp_path / "broken"), stop_after=3)
    main(straight)
    main(broken)
    main(replace(broken, stop_after=0, resume=True))
    a, b = (checkpoint.load(Path(c.out) / "last.pt") for c in (straight, broken))
    assert same_weights(a["model"], b["model"]) and same_weights(a["pretext"], b["pretext"])
    assert a["pretext"]  # the heads
    assert [e["loss"] for e in events(straight, "train")] == [
        e["loss"] for e in events(broken, "train")
    ]


@pytest.mark.parametrize("method", ["contrastive", "rotation", "swin_unetr"])
def test_the_views_of_validation_are_the_same_in_every_run(
    tiny: Config, tmp_path: Path, method: str
) -> None:
    """A learning rate of 0 moves nothing; another seed of training sees the same fixed views."""
    config = tiny(method=method, steps=2, lr=0.0, validate_every=1, mask_block=4)
    main(config)
    losses = [event["loss"] for event in events(config, "validation")]
    assert len(set(losses)) == 1


def test_the_contrast_of_validation_compares_all_fixed_crops_together(tiny: Config) -> None:
    """Each crop is a batch of its own; alone it would have nothing to be told from."""
    config = tiny(method="contrastive", steps=1, validate_crops=3)
    main(config)
    last = events(config, "validation")[-1]
    assert last["chance"] == {"contrast_accuracy": 1 / 5} and last["contrast"] > 0.1
    assert events(config, "train")[0]["chance"] == {"contrast_accuracy": 1 / 3}


@pytest.mark.parametrize("method", ["contrastive", "rotation"])
def test_a_decoder_that_no_loss_reaches_stays_as_it_was_drawn_and_its_weights_say_so(
    tiny: Config, tiny_seg: SegRuns, pretrained: Path, tmp_path: Path, method: str
) -> None:
    data = {
        "data": str(pretrained / "phantoms/pretrain.json"),
        "cache_dir": str(pretrained / "cache"),
        "validate_crops": 2,
        "steps": 3,
    }
    config = tiny(method=method, **data)
    untrained = tiny(method="scratch", **data, out=str(tmp_path / "untrained"))
    main(config)
    main(untrained)
    before, after = weights(untrained.out), weights(config.out)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("encoder.") for name in changed)

    path = Path(config.out) / "last.pt"
    assert checkpoint.load(path)["plan"]["decoder"] == "untrained"
    assert "its decoder is untrained" in " ".join(read_weights(path).notes)
    train_seg.main(tiny_seg(pretrained=str(path), steps=1, out=str(tmp_path / "tuned")))


def test_the_weights_of_swin_unetr_have_a_trained_decoder(tiny: Config) -> None:
    config = tiny(method="swin_unetr", steps=2, mask_block=4, recon="residual")
    main(config)
    plan = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    assert "decoder" not in plan and plan["recon"] == "residual"


@pytest.mark.parametrize("method", ["rotation", "swin_unetr"])
def test_a_crop_that_cannot_be_turned_is_refused_before_any_volume_is_read(
    tiny: Config, method: str
) -> None:
    config = tiny(method=method, crop=(16, 24, 16))
    assert refusal(main, config).startswith("--crop 16 24 16: turned by 90 degrees")
    assert not Path(config.out).exists()
    main(tiny(method=method, crop=(16, 16, 24), steps=1, mask_block=4))  # the turn is axial


@pytest.mark.parametrize("method", ["mae", "smit", "swin_unetr"])
def test_blocks_as_large_as_the_crop_are_refused_before_any_volume_is_read(
    tiny: Config, method: str
) -> None:
    """Nothing would be masked: the method would be another one."""
    config = tiny(method=method, crop=(16, 16, 16), mask_block=16)
    assert refusal(main, config).startswith("--mask-block 16: a crop of 16 16 16 has 1 block, ")
    assert not Path(config.out).exists()


def test_flags_that_do_nothing_for_a_method_are_named_once(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tiny(method="rotation", recon="residual", alpha=0.1, rotations="all", steps=1))
    told = capsys.readouterr().err
    assert "--method rotation does not use --recon, --alpha\n" in told
    main(tiny(method="dae", steps=1, out=tiny().out + "2"))
    assert "does not use" not in capsys.readouterr().err
    main(tiny(method="noise", noise_std=0.2, mask_ratio=(0.4,), steps=1, out=tiny().out + "3"))
    assert "--method noise does not use --mask-ratio\n" in capsys.readouterr().err


@pytest.mark.parametrize("method, told", [("contrastive", True), ("rotation", False)])
def test_a_contrast_of_one_sample_is_said_at_the_start(
    tiny: Config, method: str, told: bool
) -> None:
    config = tiny(method=method, batch_size=1, steps=2)
    main(config)
    warnings = [event["text"] for event in events(config, "warning")]
    assert [text.startswith("warning: NT-Xent") for text in warnings] == [True] * told


def test_that_nt_xent_compares_other_samples_than_before_is_said(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(method="contrastive", batch_size=4, steps=4, stop_after=2)
    main(config)
    main(replace(config, batch_size=2, accumulate=2, stop_after=0, resume=True))
    assert "NT-Xent compared 4 samples with each other before, 2 now" in capsys.readouterr().err


@every
def test_the_demo_preset_has_a_baseline_too(method: str) -> None:
    """With its crop of 48^3 and its --recon residual."""
    config = parse(
        PretrainConfig,
        ["--preset", "demo", "--method", method],
        prog="train_pretrain.py",
        description="",
    )
    pretext, _ = build(config, 1, None)
    assert type(pretext) is BASELINES[method]


# --- the effective rank


def test_the_rank_is_that_of_the_samples_since_the_last_event(tiny: Config, tmp_path: Path) -> None:
    config = tiny(steps=7, log_every=3, batch_size=2)
    main(config)
    assert [event["z_samples"] for event in events(config, "train")] == [6, 6, 2]
    assert all(1 < event["z_rank"] <= event["z_samples"] for event in events(config, "train"))

    standing = tiny(steps=1, lr=0.0, batch_size=5, out=str(tmp_path / "all"))
    main(standing)
    assert events(standing, "train")[0]["z_samples"] == 5
