"""--method smit: distributions, masks, teacher, losses; and its runs on one rank and on two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from conftest import NETWORK, events, refusal, same_weights, train
from torch import Tensor, nn

import train_pretrain
import train_seg
from dae import check
from dae.config.pretrain import PretextConfig
from dae.model import BACKBONES, UNet
from dae.pretext import distil
from dae.pretext.baselines import pretext_of
from dae.pretext.methods import METHODS
from dae.training.distributed import Ranks, StopSignal
from dae.training.run import read_ahead
from dae.weights import checkpoint
from train_pretrain import main, setup, train_step

SEEDS = [11, 12, 13]
SMALL = {**check.SMALL, "swin_unetr": NETWORK}
every = pytest.mark.parametrize("backbone", BACKBONES)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smit(backbone: str = "swin_unetr", *, checkpointing: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    network: Any = BACKBONES[backbone](1, 1, **SMALL[backbone], checkpointing=checkpointing)
    return pretext_of(network, PretextConfig(method="smit", **{"mask_block": 4, **options}))


def step(net: Any, x: Tensor, seeds: list[int] = SEEDS) -> Any:
    return net(x, torch.zeros(len(x)), net.draw(x, seeds[: len(x)]))


def said_by(network: Any, x: Tensor, level: int) -> tuple[np.ndarray, np.ndarray]:
    """The logits of cells (b, d, h, w, k) and images (b, k), layer by layer."""
    states = network.backbone.encode(network.backbone.tokenize(x))
    cells = states[level].movedim(1, -1)
    image = states[-1].mean(dim=(2, 3, 4))
    logits = []
    for head, y in ((network.heads.of_cells, cells), (network.heads.of_image, image)):
        y = head[2](nn.functional.gelu(head[0](y))).detach().numpy()
        directions = head[3].directions.detach().numpy()
        y = y / np.linalg.norm(y, axis=-1, keepdims=True)
        logits.append(y @ (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).T)
    return logits[0], logits[1]


# --- distributions


def test_sharpening_and_centring_by_hand() -> None:
    """Of logits 0.04 log 3 and 0 the first class is three times as likely at temperature 0.04."""
    logits = torch.tensor([0.04 * np.log(3), 0.0])
    none = torch.zeros(2)
    assert distil.sharpened(logits, none, 0.04).tolist() == pytest.approx([0.75, 0.25])
    assert distil.sharpened(logits, none, 0.02).tolist() == pytest.approx([0.9, 0.1])
    assert distil.sharpened(logits, logits, 0.04).tolist() == pytest.approx([0.5, 0.5])
    assert distil.sharpened(logits, 2 * logits, 0.04).tolist() == pytest.approx([0.25, 0.75])


def test_the_cross_entropy_of_two_classes_by_hand() -> None:
    """The student says 9 : 1 and the teacher 3 : 1."""
    student = torch.tensor([0.1 * np.log(9), 0.0])
    by_hand = -0.75 * np.log(0.9) - 0.25 * np.log(0.1)
    found = distil.cross_entropy_with(torch.tensor([0.75, 0.25]), student)
    assert found.item() == pytest.approx(by_hand, rel=1e-5)


def test_where_student_and_teacher_agree_the_cross_entropy_is_the_entropy() -> None:
    p = torch.softmax(normal(1, 5, 7), dim=-1)
    agreeing = distil.cross_entropy_with(p, 0.1 * p.log())
    assert torch.allclose(agreeing, distil.entropy(p), atol=1e-6)
    assert np.allclose(distil.entropy(p), scipy.stats.entropy(p.numpy(), axis=-1), atol=1e-6)

    others = distil.cross_entropy_with(p, normal(2, 5, 7))
    assert (others > distil.entropy(p)).all()


# --- what is masked


def test_voxels_of_a_masked_token_are_masked() -> None:
    mask = normal(1, 2, 1, 3, 2, 4) > 0
    found = distil.mask_of_voxels(mask, 2).numpy()
    expected = mask.numpy()
    for axis in (2, 3, 4):
        expected = expected.repeat(2, axis)
    assert np.array_equal(found, expected)


def test_a_cell_is_masked_where_all_its_tokens_are() -> None:
    mask = normal(1, 2, 1, 4, 2, 6) > -1.5
    cells = distil.mask_of_cells(mask, (2, 1, 3))
    assert cells.shape == (2, 2, 1, 3) and cells.any() and not cells.all()
    for n, i, j, k in np.ndindex(2, 2, 1, 3):
        tokens = mask[n, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
        assert cells[n, i, j, k] == tokens.all()


def test_a_mean_over_what_is_masked_is_of_each_sample_and_0_where_nothing_is() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape(2, 3, 1, 1)
    mask = torch.tensor([True, False, True, False, False, False]).reshape(2, 3, 1, 1)
    assert distil.mean_where(values, mask).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    "backbone, block, cell",
    [
        ("swin_unetr", 4, 4),
        ("swin_unetr", 8, 8),
        ("swin_unetr", 7, 2),  # three tokens: cells of 4 voxels would lie across the border
        ("swin_unetr", 1, 2),  # at least a token
        ("unet", 2, 2),
        ("unet", 16, 4),  # the bottleneck
        ("vit_unetr", 4, 8),  # a patch
    ],
)
def test_the_deepest_state_whose_cells_make_up_a_block_is_distilled(
    backbone: str, block: int, cell: int
) -> None:
    net = smit(backbone, mask_block=block)
    x = normal(1, 1, 1, 48, 48, 48)
    cells = net.backbone.encode(net.backbone.tokenize(x))[net.level]
    assert 48 // cells.shape[-1] == cell

    mask = net.draw(x, [0])
    share = distil.mask_of_cells(mask, cells.shape[2:]).float().mean()
    assert share == mask.float().mean()  # what is masked is whole cells


def test_blocks_that_no_cells_make_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^--mask-block: .* blocks of 4 .* a multiple of 8$"):
        distil.deepest_within([8, 16], 4)


# --- the losses


def test_the_losses_by_hand() -> None:
    """L1 of masked voxels; cross-entropies of masked cells, and of the image, cell by cell."""
    net = smit(distil_weight=0.3)
    with torch.no_grad():  # a teacher and centres of their own
        for parameter in net.teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        net.teacher.centres += 0.02 * torch.randn_like(net.teacher.centres)
    x = normal(1, 3, 1, 16, 24, 16)
    mask = net.draw(x, SEEDS)
    output = net(x, torch.zeros(3), mask)

    hidden = mask.numpy().repeat(2, 2).repeat(2, 3).repeat(2, 4)
    assert np.array_equal(output.views.numpy(), np.where(hidden, 0, x.numpy()))
    error = np.abs(output.x_rec.numpy() - x.numpy())
    mip = np.mean([error[n][hidden[n]].mean() for n in range(3)])

    def masked_tokens(x: Tensor) -> Tensor:
        replacement = net.mask_token.detach().reshape(1, -1, 1, 1, 1).expand_as(tokens(x))
        return torch.where(mask, replacement, tokens(x))

    tokens = net.backbone.tokenize
    assert net.level == 1
    told = said_by(net.teacher, x, 1)
    net.backbone.tokenize = masked_tokens
    said = said_by(net, x, 1)

    cross, floor = [], []
    for head, (t, s) in enumerate(zip(told, said)):
        p = scipy.special.softmax((t - net.teacher.centres[head].numpy()) / 0.04, axis=-1)
        cross.append(-(p * scipy.special.log_softmax(s / 0.1, axis=-1)).sum(-1))
        floor.append(scipy.stats.entropy(p, axis=-1))
    cells = mask.numpy()[:, 0, ::2, ::2, ::2]  # blocks are of two tokens, as a cell is
    mpd = np.mean([cross[0][n][cells[n]].mean() for n in range(3)])
    mpd_floor = np.mean([floor[0][n][cells[n]].mean() for n in range(3)])

    expected = {
        "mip": mip,
        "mpd": 0.3 * mpd,
        "mpd_floor": 0.3 * mpd_floor,
        "itd": 0.3 * cross[1].mean(),
        "itd_floor": 0.3 * floor[1].mean(),
    }
    found = {name: value.item() for name, value in output.terms.items()}
    assert found == pytest.approx(expected, rel=1e-4)
    total = mip + 0.3 * mpd + 0.3 * cross[1].mean()
    assert output.loss.item() == pytest.approx(total, rel=1e-4)


def test_what_is_masked_reaches_the_teacher_and_not_the_student() -> None:
    net = smit()
    x = normal(1, 1, 1, 16, 16, 16)
    mask = net.draw(x, SEEDS[:1])
    hidden = distil.mask_of_voxels(mask, 2)
    other = torch.where(hidden, normal(2, *x.shape), x)
    first, second = net(x, torch.zeros(1), mask), net(other, torch.zeros(1), mask)
    assert torch.equal(first.x_rec, second.x_rec) and torch.equal(first.z, second.z)
    assert first.terms["itd_floor"] != second.terms["itd_floor"]


def test_a_seed_masks_what_it_masks_for_mae() -> None:
    net = smit()
    x = normal(1, 2, 1, 16, 16, 16)
    mae = pretext_of(net.backbone, PretextConfig(method="mae", mask_block=4))
    assert torch.equal(net.draw(x, SEEDS[:2]), mae.draw(x, SEEDS[:2]).mask)


# --- the teacher


def test_the_momentum_goes_along_a_cosine_to_1() -> None:
    assert distil.teacher_momentum(0.0, 0.9) == pytest.approx(0.9)
    assert distil.teacher_momentum(0.5, 0.9) == pytest.approx(0.95)
    assert distil.teacher_momentum(1.0, 0.9) == 1.0
    assert distil.teacher_momentum(1 / 3, 0.9) == pytest.approx(0.925)


@every
def test_the_teacher_after_k_steps_is_the_weighted_mean_of_the_students(backbone: str) -> None:
    """theta_k = m^k theta_0 + (1 - m) sum of m^(k - 1 - j) of the student after step j."""
    net = smit(backbone, distil_momentum=0.8)
    start = {name: p.clone() for name, p in net.teacher.named_parameters()}
    student = dict(net.to_optimise())
    assert all(torch.equal(start[name], student[name]) for name in start)
    assert any(name.startswith("heads.") for name in start)
    assert any(name.startswith("backbone.encoder.") for name in start)

    values = [1.0, -2.0, 0.5]
    for value in values:
        step(net, normal(1, 1, 1, 48, 48, 48))
        for parameter in student.values():
            nn.init.constant_(parameter, value)
        net.after_step(progress=0.0)
    moved = sum(0.2 * 0.8 ** (2 - j) * value for j, value in enumerate(values))
    for name, parameter in net.teacher.named_parameters():
        assert torch.allclose(parameter, 0.8**3 * start[name] + moved, atol=1e-6), name


@pytest.mark.parametrize("parts", [[3], [1, 1, 1]])
def test_centres_are_moving_means_of_what_the_teacher_said_in_a_step(parts: list[int]) -> None:
    """Of all micro-batches of a step, and of every cell, masked or not; validation counts nothing.

    Within a step they stand still.
    """
    net = smit()
    x = normal(1, 3, 1, 16, 16, 16)
    of_cells, of_image = said_by(net.teacher, x, net.level)
    mean = np.stack([of_cells.mean((0, 1, 2, 3)), of_image.mean(0)])

    for count in (1, 2):
        before = net.teacher.centres.clone()
        for part in x.split(parts):
            step(net, part)
        step(net.eval(), 5 + x)
        net.train()
        assert torch.equal(net.teacher.centres, before)

        net.teacher.recentre()
        expected = (1 - 0.9**count) * mean
        assert np.allclose(net.teacher.centres, expected, atol=1e-6)


@every
def test_gradients_reach_all_but_the_teacher_and_the_blind_skip(backbone: str) -> None:
    """The optimiser gets what mae would give it, and the heads."""
    net = smit(backbone)
    step(net, normal(1, 3, 1, 24, 24, 24)).loss.backward()
    optimised = dict(net.to_optimise())
    for name, parameter in net.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        of_teacher = name.startswith("teacher.")
        assert reached == (not of_teacher and "image_block" not in name), name
        assert (parameter.grad is None) == of_teacher == (not parameter.requires_grad), name
        assert (name in optimised) == (not of_teacher)


@pytest.mark.parametrize("method", [*METHODS, "rotation", "swin_unetr"])
def test_the_optimiser_gets_all_parameters_of_every_other_method(method: str) -> None:
    net = pretext_of(BACKBONES["swin_unetr"](1, 1, **NETWORK), PretextConfig(method=method))
    assert [name for name, _ in net.to_optimise()] == [name for name, _ in net.named_parameters()]


def test_the_teacher_has_no_decoder_and_is_saved_with_its_centres() -> None:
    net = smit()
    saved = {name for name in net.own_state() if name.startswith("teacher.")}
    encoder = {f"teacher.backbone.encoder.{name}" for name in net.backbone.encoder.state_dict()}
    heads = {f"teacher.heads.{name}" for name in net.heads.state_dict()}
    centres = {"teacher.centres", "teacher.sums", "teacher.batches"}
    assert saved == encoder | heads | centres


class Pooled(UNet):
    """A backbone of a user's, which tokenizes with a part that has no weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, 1, **options)
        self.smooth = nn.AvgPool3d(3, stride=1, padding=1)

    def tokenize(self, x: Tensor) -> Any:
        return super().tokenize(self.smooth(x))


@torch.no_grad()
def test_a_teacher_keeps_the_parts_without_weights() -> None:
    network: Any = Pooled(**SMALL["unet"])
    net: Any = pretext_of(network, PretextConfig(method="smit", mask_block=4))
    x = normal(1, 1, 1, 16, 16, 16)
    tokens = network.tokenize(x)
    assert torch.equal(net.teacher.backbone.tokenize(x), tokens)
    assert not any("decoder" in name for name, _ in net.teacher.named_parameters())


def test_blocks_that_are_computed_twice_count_once() -> None:
    """--checkpointing."""
    plain, twice = smit(), smit(checkpointing=True)
    x = normal(1, 3, 1, 16, 16, 16)
    for net in (plain, twice):
        step(net, x).loss.backward()
    assert twice.teacher.batches.item() == 1
    assert torch.equal(plain.teacher.sums, twice.teacher.sums)
    for (name, a), b in zip(plain.named_parameters(), twice.parameters()):
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_a_compiled_step_remembers_what_an_eager_one_does() -> None:
    eager, compiled = smit(), smit()
    x = normal(1, 3, 1, 16, 16, 16)
    torch._dynamo.reset()
    run: Any = torch.compile(compiled, backend="eager", fullgraph=True)
    for _ in range(2):
        step(eager, x)
        run(x, torch.zeros(3), compiled.draw(x, SEEDS))
    assert compiled.teacher.batches.item() == 2
    assert torch.allclose(eager.teacher.sums, compiled.teacher.sums, atol=1e-6)


# --- runs


def saved(config: Any) -> dict[str, Any]:
    return checkpoint.load(Path(config.out) / "last.pt")


def test_a_run_ends_with_a_teacher_that_is_the_closed_form_of_its_students(tiny: Any) -> None:
    """With --keep-every 1 the students after each of two steps are there to be averaged."""
    config = tiny(method="smit", mask_block=4, steps=2, keep_every=1, distil_momentum=0.5)
    run = setup(config, Ranks(0, 1, torch.device("cpu")))
    run.log.close()
    theta = {name: p.clone() for name, p in run.pretext.teacher.backbone.named_parameters()}
    for path in Path(config.out).glob("*.*"):
        path.unlink()

    main(config)
    students = [checkpoint.load(Path(config.out) / f"step-{n}.pt")["model"] for n in (1, 2)]
    own = saved(config)["pretext"]
    for name, start in theta.items():
        # The momentum is 0.5 in the first step, and 0.75 in the second of two.
        after_one = 0.5 * start + 0.5 * students[0][name]
        expected = 0.75 * after_one + 0.25 * students[1][name]
        assert torch.allclose(own[f"teacher.backbone.{name}"], expected, atol=1e-6), name


def test_a_teacher_begins_from_the_weights_of_init(tiny: Any, tmp_path: Path) -> None:
    first = tiny(method="dae", seed=3, steps=1, out=str(tmp_path / "first"))
    main(first)
    init = f"{first.out}/last.pt"
    config = tiny(method="smit", mask_block=4, init=init, steps=1, lr=0.0)
    main(config)
    own, before = saved(config)["pretext"], saved(first)["model"]
    for name in before:
        if name.startswith("encoder."):
            assert torch.equal(own[f"teacher.backbone.{name}"], before[name]), name


def test_the_teacher_stands_still_where_the_scaler_skips_the_step(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in fp16, where an infinite gradient is no error.

    What it said in the skipped step counts in the next one.
    """
    config = tiny(method="smit", mask_block=4)
    ranks = Ranks(0, 1, torch.device("cpu"))
    run = setup(config, ranks)
    teacher = run.pretext.teacher
    batches = read_ahead(run.crops, config, ranks, step=0)

    def weights_and_centres() -> dict[str, Tensor]:
        parameters = {name: value.clone() for name, value in teacher.named_parameters()}
        return {**parameters, "centres": teacher.centres.clone()}

    train_step(run, batches, StopSignal())
    before = weights_and_centres()

    monkeypatch.setattr(train_pretrain, "check_finite", lambda *unused: None)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *unused: torch.tensor(torch.inf))
    train_step(run, batches, StopSignal())
    assert same_weights(before, weights_and_centres())
    assert teacher.batches.item() == 1

    monkeypatch.undo()
    train_step(run, batches, StopSignal())
    after = weights_and_centres()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert teacher.batches.item() == 0


def test_the_optimiser_does_not_hold_the_teacher(tiny: Any) -> None:
    run = setup(tiny(method="smit", mask_block=4), Ranks(0, 1, torch.device("cpu")))
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in run.pretext.teacher.parameters()}
    assert held == {id(p) for _, p in run.pretext.to_optimise()}


def test_what_is_hidden_in_validation_is_the_same_in_every_run(tiny: Any) -> None:
    """A rate of 0 moves no weight. The distillations move, with the centres."""
    config = tiny(method="smit", mask_block=4, steps=2, lr=0.0, validate_every=1)
    main(config)
    assert len({event["mip"] for event in events(config, "validation")}) == 1
    assert len({event["mpd"] for event in events(config, "validation")}) == 3


def test_its_loss_falls_on_phantoms_and_fine_tuning_takes_the_student(
    tiny: Any, tiny_seg: Any, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny(
        data=str(pretrained / "phantoms/pretrain.json"),
        cache_dir=str(pretrained / "cache"),
        method="smit",
        mask_block=4,
        steps=40,
        lr=3e-3,
        validate_every=40,
        validate_crops=4,
    )
    main(config)
    first, last = events(config, "validation")
    assert last["mip"] < 0.8 * first["mip"]
    for name in ("mpd", "itd"):
        assert last[name] - last[f"{name}_floor"] < first[name] - first[f"{name}_floor"], name

    tuned = tiny_seg(pretrained=f"{config.out}/last.pt", lr=0.0, steps=1, out=str(tmp_path / "seg"))
    train_seg.main(tuned)
    student, after = saved(config)["model"], saved(tuned)["model"]
    assert all(torch.equal(student[name], after[name]) for name in after if "head." not in name)
    assert "decoder" not in saved(config)["plan"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_train_as_one_process_with_the_same_samples(
    tiny: Any, tmp_path: Path, accumulate: int
) -> None:
    """Weights, teacher and centres after 8 steps, within rounding."""
    one = tiny(
        method="smit",
        mask_block=4,
        steps=8,
        lr=1e-4,
        batch_size=2 * accumulate,
        distil_momentum=0.5,
        out=str(tmp_path / "one"),
    )
    two = replace(one, batch_size=1, accumulate=accumulate, out=str(tmp_path / "two"))
    main(one)
    done = train(two, ranks=2)
    assert done.returncode == 0, done.stderr
    for part in ("model", "pretext"):
        alone, together = saved(one)[part], saved(two)[part]
        assert alone.keys() == together.keys()
        for name in alone:
            assert torch.allclose(alone[name], together[name], atol=2e-5), name


def test_more_than_two_ratios_end_in_one_line(tiny: Any) -> None:
    config = tiny(method="smit", mask_ratio=(0.1, 0.2, 0.3))
    assert refusal(main, config).startswith("--mask-ratio: give one number")
