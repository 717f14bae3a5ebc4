"""Windows, flips, ensembles, the way back to the file: against brute force, closed forms, torch, scipy and MONAI."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dae.data.datalist import Item
from dae.data.nifti import Volume, read, read_labels_of
from dae.data.preprocess import Recipe, prepare, resample, resample_labels
from dae.errors import InputError
from dae.evaluation import windows as inference
from dae.evaluation.native_grid import in_place, label_map, save_like
from dae.evaluation.windows import blend, gaussian, sliding_window, window_starts

ROOT = Path(__file__).parents[1]
BACKGROUND = (-3.0, -2.0, -1.0)  # of the three channels


def image_of(*size: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed))


def whole(image: Any, predict: Any, **given: Any) -> Tensor:
    """All slabs of a prediction, side by side: (k, d, h, w)."""
    defaults = {"window": (4, 5, 6), "classes": 3, "device": "cpu", "background": BACKGROUND}
    return torch.cat(list(sliding_window(image, predict, **{**defaults, **given})), dim=1)


def identity(x: Tensor) -> Tensor:
    """Returns the very tensor that it got."""
    return x


def seeing(seed: int = 0, classes: int = 3) -> nn.Module:
    """A network whose word on a voxel depends on where in the window it lies: zero padding, two layers."""
    torch.manual_seed(seed)
    layers = nn.Conv3d(3, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(4, classes, 3, padding=1)
    network = nn.Sequential(*layers)
    with torch.no_grad():
        layers[2].weight *= 10  # probabilities far from even, or an error in them would be small
    return network.requires_grad_(False)


# --- windows along an axis, weights of a window -----------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 120), st.floats(0, 0.95))
def test_windows_begin_at_0_end_flush_step_evenly_and_are_as_few_as_the_overlap_allows(
    spare: int, window: int, overlap: float
) -> None:
    starts = window_starts(window + spare, window, overlap)
    steps, longest = np.diff(starts), max(1, window * (1 - overlap)) + 1e-6
    assert starts[0] == 0 and starts[-1] == spare
    assert steps.min() >= 1 and np.ptp(steps) <= 1 and steps.max() <= longest
    assert (len(starts) - 2) * int(
        longest
    ) < spare  # one window fewer, and a step would be too long


@pytest.mark.parametrize(
    "size, window, overlap, starts",
    [
        (200, 96, 0.5, [0, 35, 69, 104]),
        (96, 96, 0.5, [0]),
        (97, 96, 0.0, [0, 1]),
        (192, 96, 0.0, [0, 96]),
        (10, 4, 0.75, [0, 1, 2, 3, 4, 5, 6]),
        (5, 2, 0.9, [0, 1, 2, 3]),
        (24, 20, 0.9, [0, 2, 4]),
        (14, 10, 0.8, [0, 2, 4]),
    ],
)
def test_windows_of_some_axes_begin_where_one_works_out_by_hand(
    size: int, window: int, overlap: float, starts: list[int]
) -> None:
    assert window_starts(size, window, overlap) == starts


def test_an_axis_shorter_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        window_starts(5, 6, 0.5)


def bell_of(window: Sequence[int]) -> Tensor:
    """The weights as the formula has them, in float64."""
    place = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), axis=-1)
    off = (place - (np.array(window) - 1) / 2) / (np.array(window) / 8)
    bell = np.exp(-0.5 * (off**2).sum(-1))
    return torch.from_numpy(np.maximum(bell / bell.max(), 1e-3))


@pytest.mark.parametrize("window", [(9, 9, 9), (8, 5, 6), (1, 2, 16)], ids=str)
def test_weights_are_a_centred_bell_of_an_eighth_with_a_floor(window: tuple[int, int, int]) -> None:
    weights = gaussian(window)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double(), bell_of(window), rtol=1e-6)
    assert torch.equal(weights, weights.flip(0, 1, 2)) and weights.max() == 1
    assert weights.min() >= np.float32(1e-3)


def test_a_weight_falls_to_the_root_of_e_an_eighth_off_the_centre() -> None:
    weights = gaussian((1, 1, 33))[0, 0]
    assert weights[16 + 4].item() == pytest.approx(np.exp(-0.5 * (4 / (33 / 8)) ** 2))


# --- what comes in comes out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["softmax", "logits"])
@pytest.mark.parametrize(
    "size, batch, overlap",
    [
        ((4, 5, 6), 1, 0.5),
        ((11, 9, 10), 4, 0.75),
        ((11, 9, 10), 1, 0.25),
        ((3, 2, 5), 2, 0),
        ((13, 3, 7), 3, 0.5),
        ((2, 12, 13), 5, 0.25),
    ],
    ids=str,
)
def test_an_identity_network_returns_its_input_and_never_writes_it(
    size: tuple[int, int, int], batch: int, overlap: float, combine: str
) -> None:
    """Sizes that do not divide, windows larger than some axes or all; MONAI 1.6.1 fails for batches of one."""
    image = image_of(*size)
    before = image.clone()
    found = whole(image, identity, batch=batch, overlap=overlap, combine=combine)
    assert torch.equal(image, before)
    assert found.shape == image.shape and found.dtype == torch.float32
    assert (found - before.softmax(0)).abs().max() < 1e-6
    logits = found.log() + before.logsumexp(0)  # softmax undone
    assert (logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("batch, overlap", [(1, 0), (1, 0.75), (3, 0.5), (5, 0.25)])
def test_blended_windows_of_raw_values_are_those_values(batch: int, overlap: float) -> None:
    image, window = 1000 * image_of(11, 9, 10), (4, 5, 6)

    def predict_at(corners: Sequence[tuple[int, int, int]]) -> Tensor:
        return torch.stack([image[:, d : d + 4, h : h + 5, w : w + 6] for d, h, w in corners])

    slabs = blend(
        predict_at, (11, 9, 10), gaussian(window), classes=3, overlap=overlap, batch=batch
    )
    assert torch.allclose(torch.cat(list(slabs), dim=1), image, rtol=1e-6, atol=1e-3)


def test_a_constant_prediction_comes_out_constant() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0])[:, None, None, None]
    found = whole(image_of(11, 9, 10), lambda x: logits.expand(len(x), 3, 4, 5, 6), flips=(0, 2))
    assert torch.allclose(found, logits.softmax(0).expand_as(found), atol=1e-6)


def test_a_predictor_may_write_its_input_and_reuse_its_output() -> None:
    """Neither the image nor a flipped or a later prediction, nor another member of the ensemble, notices."""
    image, buffer = image_of(11, 9, 10), torch.empty(8, 3, 4, 5, 6)
    before = image.clone()

    def rude(x: Tensor) -> Tensor:
        buffer[: len(x)] = x
        x.zero_()
        return buffer[: len(x)]

    for combine in ("softmax", "logits"):
        found = whole(image, [rude, rude, identity], batch=8, flips=(0, 1, 2), combine=combine)
        assert torch.equal(image, before) and torch.allclose(found, image.softmax(0), atol=1e-6)


def test_what_a_predictor_returns_is_never_written() -> None:
    made: list[tuple[Tensor, Tensor]] = []

    def keeps(x: Tensor) -> Tensor:
        made.append((x, x.clone()))
        return x

    for combine in ("softmax", "logits"):
        whole(image_of(11, 9, 10), keeps, batch=1, combine=combine)
    assert len(made) > 50 and all(torch.equal(now, then) for now, then in made)


def test_arrays_and_tensors_of_any_float_type_are_images() -> None:
    image = image_of(5, 6, 7).half()
    array = image.numpy()
    array.flags.writeable = False
    found = whole(array, identity)
    assert found.dtype == torch.float32
    assert torch.equal(found, whole(image, identity)) and torch.equal(
        found, whole(image.float(), identity)
    )


# --- blending: against everything at once, in float64 -----------------------------------------------------------------

STARTS = [
    (0, 2, 4, 5, 7),
    (0, 2, 4),
    (0, 2, 4),
]  # of windows 4 5 6 on 11 9 10 voxels that overlap by half


def brute_force(
    image: Tensor,
    networks: Sequence[nn.Module],
    starts: Sequence[Sequence[int]],
    window: tuple[int, int, int],
    flips: Sequence[Sequence[int]],
    combine: str,
) -> Tensor:
    """All windows, flips and networks summed up on the whole volume, in float64: (k, d, h, w)."""
    total, weight, bell = (
        torch.zeros(3, *image.shape[1:]).double(),
        torch.zeros(image.shape[1:]).double(),
        bell_of(window),
    )
    for corner, network, axes in product(product(*starts), networks, flips):
        box, dims = (
            [slice(at, at + n) for at, n in zip(corner, window)],
            [axis + 1 for axis in axes],
        )
        logits = deepcopy(network).double()(image[:, *box].double().flip(dims)[None])[0].flip(dims)
        total[:, *box] += (logits.softmax(0) if combine == "softmax" else logits) * bell
        weight[*box] += bell
    return total / weight if combine == "softmax" else (total / weight).softmax(0)


@pytest.mark.parametrize("combine", ["softmax", "logits"])
@pytest.mark.parametrize("flips", [(), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("members", [1, 2])
def test_slabs_are_the_whole_weighted_mean(
    members: int, flips: tuple[int, ...], combine: str
) -> None:
    image, networks = image_of(11, 9, 10), [seeing(n) for n in range(members)]
    found = whole(image, networks, flips=flips, combine=combine, batch=3)
    turns = {(): [()], (1,): [(), (1,)], (0, 2): [(), (0,), (2,), (0, 2)]}[flips]
    expected = brute_force(image, networks, STARTS, (4, 5, 6), turns, combine)
    assert (found - expected).abs().max() < 1e-5
    if members > 1 or flips:
        assert (found - whole(image, networks[0], combine=combine)).abs().max() > 1e-2


def test_a_volume_smaller_than_the_window_lies_in_its_middle_with_background_around() -> None:
    image, network = image_of(3, 9, 3), seeing()
    padded = torch.tensor(BACKGROUND)[:, None, None, None].repeat(1, 6, 9, 8)
    padded[:, 1:4, :, 2:5] = (
        image  # of 3 voxels too few one goes before, of 5 two: as in a training crop
    )
    expected = brute_force(padded, [network], [(0,), (0, 2, 4), (0,)], (6, 5, 8), [()], "softmax")[
        :, 1:4, :, 2:5
    ]
    found = whole(image, network, window=(6, 5, 8))
    assert found.shape == (3, 3, 9, 3) and (found - expected).abs().max() < 1e-5


def test_sums_are_float32_whatever_the_network_answers_in() -> None:
    image = image_of(24, 9, 10)
    answer = seeing()(image[None])[0]  # one answer for each voxel, whichever the window
    exact = answer.bfloat16().double().softmax(0)
    found = whole(
        torch.cat([image, answer]),
        lambda x: x[:, 3:].bfloat16(),
        overlap=0.75,
        background=(0.0,) * 6,
    )
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-6


# --- flips and ensembles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_flips_change_nothing_for_a_network_that_does_not_see_them(combine: str) -> None:
    image = image_of(11, 9, 10)
    torch.manual_seed(0)
    mirrored = nn.Conv3d(3, 3, 3, padding=1).requires_grad_(False)
    for axis in (2, 3, 4):
        mirrored.weight.copy_((mirrored.weight + mirrored.weight.flip(axis)) / 2)
    plain = whole(image, mirrored, combine=combine)
    assert torch.allclose(
        whole(image, mirrored, flips=(0, 1, 2), combine=combine), plain, atol=1e-6
    )
    assert not torch.allclose(
        whole(image, seeing(), flips=(0, 1, 2)), whole(image, seeing()), atol=1e-2
    )


@pytest.mark.parametrize(
    "flips, turns", [((), 1), ((1,), 2), ((2, 0), 4), ((0, 1, 2), 8), ((1, 1), 2)], ids=str
)
def test_every_combination_of_flips_is_asked_once(flips: tuple[int, ...], turns: int) -> None:
    seen: list[Tensor] = []
    whole(image_of(4, 5, 6), lambda x: seen.append(x.clone()) or x, flips=flips)
    assert len(seen) == turns and len({x.numpy().tobytes() for x in seen}) == turns


def sided(x: Tensor) -> Tensor:
    """Calls what is bright in channel 0 left (class 1) before the middle of axis 0, and right (class 2) behind it."""
    here = (x[:, 0] > 0).float()
    before = (torch.arange(x.shape[2]) < x.shape[2] / 2).float()[:, None, None]
    return 9 * torch.stack([1 - here, here * before, here * (1 - before)], dim=1)


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_left_and_right_change_places_where_a_window_was_flipped(combine: str) -> None:
    """An organ on each side, and a network that tells them by their side alone, as one trained with `swap` does."""
    image = -torch.ones(1, 10, 5, 6)
    image[0, 1:3, 1:4, 2:5] = image[0, 7:9, 1:4, 2:5] = 1
    truth = torch.zeros(10, 5, 6, dtype=torch.int64)
    truth[1:3, 1:4, 2:5], truth[7:9, 1:4, 2:5] = 1, 2
    common: dict[str, Any] = {"window": (10, 5, 6), "background": (-1.0,), "combine": combine}
    once = whole(image, sided, **common)
    assert torch.equal(once.argmax(0), truth)
    for flips in ((0,), (0, 1, 2)):
        assert torch.allclose(
            whole(image, sided, flips=flips, swap=[(1, 2)], **common), once, atol=1e-6
        )
    wrong = whole(image, sided, flips=(0,), **common)
    assert torch.allclose(
        wrong[1], wrong[2], atol=1e-6
    )  # without the exchange no side is known any more
    assert torch.allclose(
        whole(image, sided, flips=(1, 2), swap=[(1, 2)], **common), once, atol=1e-6
    )


def test_a_network_of_turned_crops_exchanges_sides_in_front_back_flips_as_well() -> None:
    """It tells sides by where the front is: flipped along both axes a left organ is a left organ again."""

    def by_the_front(x: Tensor) -> Tensor:
        ahead = x[:, 1].diff(dim=2).mean((1, 2, 3)) > 0  # channel 1 grows to the front
        answer = sided(x)
        return torch.where(ahead[:, None, None, None, None], answer, answer[:, [0, 2, 1]])

    image = -torch.ones(2, 10, 5, 6)
    image[0, 1:3, 1:4, 2:5] = image[0, 7:9, 1:4, 2:5] = 1
    image[1] = torch.linspace(-1, 1, 5)[:, None]
    common: dict[str, Any] = {"window": (10, 5, 6), "background": (-1.0, 0.0), "swap": [(1, 2)]}
    once = whole(image, by_the_front, **common)
    assert set(once.argmax(0).unique().tolist()) == {0, 1, 2}
    for flips in ((0,), (1,), (0, 1), (0, 1, 2)):
        assert torch.allclose(
            whole(image, by_the_front, flips=flips, swap_axes=(0, 1), **common), once, atol=1e-6
        )


def test_softmax_means_let_the_unsure_speak_and_logit_means_the_sure() -> None:
    def says(logit: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tensor([logit, 0.0])[:, None, None, None].expand(len(x), 2, 4, 5, 6)

    image, ensemble = image_of(4, 5, 6), [says(6), says(-1), says(-2)]
    softmax, logits = (
        whole(image, ensemble, classes=2, combine=how) for how in ("softmax", "logits")
    )
    probability = [1 / (1 + np.exp(-x)) for x in (6, -1, -2)]
    assert torch.allclose(
        softmax[0], torch.tensor(np.mean(probability), dtype=torch.float32)
    )  # .46: the second class
    assert torch.allclose(
        logits[0], torch.tensor(1 / (1 + np.exp(-1)), dtype=torch.float32)
    )  # (6 - 1 - 2) / 3 = 1


# --- how it goes through a volume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_windows_go_row_by_row_and_slabs_leave_as_soon_as_they_can(batch: int) -> None:
    sizes: list[int] = []
    slabs = sliding_window(
        image_of(40, 9, 10),
        lambda x: sizes.append(len(x)) or x,
        window=(4, 5, 6),
        classes=3,
        overlap=0.5,
        batch=batch,
        device="cpu",
        background=BACKGROUND,
    )
    assert not sizes  # nothing happens before someone asks
    for row in range(1, 19):
        planes = next(slabs).shape[1]
        assert (
            sum(sizes) == 9 * row and planes == 2
        )  # 3 x 3 windows of a row, and a step of two planes
    assert max(sizes) == min(batch, 9)
    assert next(slabs).shape[1] == 4 and next(slabs, None) is None


def test_slabs_are_thin_and_their_own() -> None:
    """A caller may keep one, or write into it, and run its own code with gradients between two of them."""
    image = image_of(24, 9, 10)
    kept = []
    for slab in sliding_window(
        image, identity, window=(24, 5, 6), classes=3, device="cpu", background=BACKGROUND
    ):
        assert (
            slab.shape[1] == 8 and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        )
        kept.append(slab.clone())
        slab.zero_()
    assert torch.allclose(torch.cat(kept, dim=1), image.softmax(0), atol=1e-6)


def test_a_network_with_gradients_leaves_no_graph() -> None:
    found = whole(image_of(5, 6, 7), seeing().requires_grad_())
    assert not found.requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, Tensor):
                self.elements = max(
                    self.elements, each.untyped_storage().nbytes() // each.element_size()
                )
        return made


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_no_tensor_is_thicker_than_a_window(combine: str) -> None:
    image, classes = np.zeros((1, 200, 16, 16), np.float32), 7

    def predict(x: Tensor) -> Tensor:
        return x.expand(-1, classes, -1, -1, -1)

    with Largest() as largest:
        slabs = sliding_window(
            image,
            predict,
            window=(8, 8, 8),
            classes=classes,
            device="cpu",
            background=[0.0],
            flips=(0, 1),
            batch=1,
            combine=combine,
        )
        labels = label_map(slabs, (200, 16, 16), (300, 20, 20))
    assert labels.shape == (300, 20, 20)
    assert 0 < largest.elements <= classes * 8 * 16 * 16  # all of it would be 25 times as many


def test_a_label_map_holds_no_more_than_a_few_slabs() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def slabs() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(50):
            slab = torch.rand(3, 2, 6, 6)
            alive.add(slab)
            yield slab
            del slab
            most = max(most, len(alive))

    label_map(slabs(), (100, 6, 6), (160, 8, 8))
    assert most <= 2


def test_wrong_arguments_are_refused_before_the_first_slab() -> None:
    given = {
        "image": image_of(5, 6, 7),
        "predict": identity,
        "window": (4, 5, 6),
        "classes": 3,
        "device": "cpu",
        "background": BACKGROUND,
    }
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"overlap": 1.0}, "overlap"),
        ({"overlap": -0.1}, "overlap"),
        ({"combine": "vote"}, "combine"),
        ({"flips": (3,)}, "flips"),
        ({"background": (0.0,)}, "background"),
        ({"batch": 0}, "batch"),
        ({"predict": []}, "predictor"),
        ({"image": torch.zeros(5, 6, 7)}, "c, d, h, w"),
        *(
            ({"swap": swap}, "swap must name")
            for swap in ([(1, 3)], [(1, 1)], [(0, 1), (1, 2)], [(-1, 1)])
        ),
    ]
    for argument, message in wrong:
        with pytest.raises(ValueError, match=message):
            sliding_window(**{**given, **argument})


def test_a_network_of_other_classes_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 4, 5, 6\).*\(4, 5, 4, 5, 6\)"):
        whole(image_of(11, 9, 10), identity, classes=5)


def test_an_output_that_is_no_number_is_refused_not_made_a_class() -> None:
    image = image_of(11, 9, 10)
    image[1, 3, 4, 5] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        whole(image, identity)


# --- back to the patient's grid ---------------------------------------------------------------------------------------


def smooth_probabilities(classes: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5)) * 30
    return torch.from_numpy(smooth).float().softmax(0)


def in_slabs(probabilities: Tensor, planes: int) -> Iterator[Tensor]:
    return iter(probabilities.split(planes, dim=1))


def torch_resampled(probabilities: Tensor, target: Sequence[int]) -> np.ndarray:
    return F.interpolate(
        probabilities[None].double(), tuple(target), mode="trilinear", align_corners=False
    )[0].numpy()


def scipy_resampled(probabilities: Tensor, target: Sequence[int]) -> np.ndarray:
    factors = [new / old for new, old in zip(target, probabilities.shape[1:])]
    return np.stack(
        [
            ndimage.zoom(p, factors, order=1, mode="nearest", grid_mode=True)
            for p in probabilities.double()
        ]
    )


SHAPES = [
    ((10, 12, 14), (23, 19, 30)),
    ((10, 12, 14), (4, 5, 6)),
    ((10, 12, 14), (25, 7, 14)),
    ((9, 8, 7), (3, 16, 11)),
    ((1, 4, 4), (5, 8, 3)),
    ((6, 5, 7), (1, 1, 1)),
    ((17, 6, 6), (18, 6, 6)),
]


@pytest.mark.parametrize("resampled", [torch_resampled, scipy_resampled], ids=["torch", "scipy"])
@pytest.mark.parametrize("source, target", SHAPES, ids=str)
def test_labels_are_those_of_the_whole_volume_resampled_linearly(
    source: tuple[int, ...],
    target: tuple[int, ...],
    resampled: Callable[[Tensor, Sequence[int]], np.ndarray],
) -> None:
    probabilities = smooth_probabilities(5, source)
    found = label_map(in_slabs(probabilities, 3), source, target)
    expected = resampled(probabilities, target)
    second, first = np.sort(expected, axis=0)[-2:]
    clear = first - second > 1e-4  # elsewhere rounding may decide
    assert found.shape == target and clear.mean() > 0.99
    assert np.array_equal(found[clear], expected.argmax(0)[clear])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_between_two_planes_a_voxel_takes_from_both_by_its_distance(
    source: int, target: int, seed: int
) -> None:
    """The first axis alone, which is the streamed one, on any pair of sizes: two classes, one of them level at 1/2."""
    line = np.random.default_rng(seed).random(source)
    centres = np.interp((np.arange(target) + 0.5) * source / target, np.arange(source) + 0.5, line)
    ramp = torch.from_numpy(np.stack([np.full(source, 0.5), line]))[..., None, None]
    found = label_map(in_slabs(ramp, 1 + seed % 5), (source, 1, 1), (target, 1, 1))[:, 0, 0]
    clear = abs(centres - 0.5) > 1e-9
    assert np.array_equal(found[clear], (centres > 0.5)[clear])


@pytest.mark.parametrize("planes", [1, 2, 7, 100])
def test_on_equal_grids_labels_are_exactly_the_argmax_and_the_first_of_equals(planes: int) -> None:
    shape = (31, 8, 9)
    noise = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    coarse = (noise * 5).round() / 5  # many voxels have several best classes
    assert np.array_equal(label_map(in_slabs(noise, planes), shape, shape), noise.numpy().argmax(0))
    assert np.array_equal(
        label_map(in_slabs(coarse, planes), shape, shape), coarse.numpy().argmax(0)
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)),
        ((0.75, 0.75, 1.0), (1.5, 1.5, 2.0)),
        ((1.3, 0.9, 3.1), (2.0, 2.0, 2.0)),
        ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
    ],
    ids=str,
)
def test_there_and_back_organs_stay_where_they_were(
    old: tuple[float, ...], new: tuple[float, ...]
) -> None:
    """Balls in many places, of a network that makes no error: their centres move by less than .04 of a voxel on
    average, along every axis, as probabilities and as the labels that a network is trained on.
    """
    rng, moved = np.random.default_rng(0), {"probabilities": [], "labels": []}
    shape = [int(43 / mm) for mm in old]  # odd and even sizes
    mm = np.stack(
        np.meshgrid(*[(np.arange(n) + 0.5) * size for n, size in zip(shape, old)], indexing="ij"),
        axis=-1,
    )
    for _ in range(24):
        ball = ((mm - rng.uniform(17, 26, 3)) ** 2).sum(-1) < rng.uniform(8, 14) ** 2
        one_hot = np.stack([~ball, ball]).astype(np.float32)
        coarse = resample(Volume(one_hot, np.diag([*old, 1.0])), new)
        trained_on = resample_labels(ball.astype(np.uint8), coarse.shape[1:])
        for name, shown in (
            ("probabilities", coarse),
            ("labels", np.eye(2, dtype=np.float32)[:, trained_on]),
        ):
            found = label_map(in_slabs(torch.from_numpy(shown), 5), shown.shape[1:], shape)
            moved[name].append(np.argwhere(found).mean(axis=0) - np.argwhere(ball).mean(axis=0))
    for offsets in moved.values():
        assert np.abs(np.mean(offsets, axis=0)).max() < 0.04


def test_resampling_there_and_back_leaves_a_plane_where_it_was() -> None:
    """A half-space, its face in mm: preprocessing and the way back agree on where the outer faces lie."""
    for spacing in ((2.0, 3.0, 1.25), (0.5, 0.7, 0.9)):
        for axis in range(3):
            inside = np.zeros((20, 20, 20), np.float32)
            inside[(slice(None),) * axis + (slice(12, None),)] = 1
            volume = Volume(np.stack([1 - inside, inside]), np.eye(4))
            coarse = resample(volume, spacing)
            found = label_map(in_slabs(torch.from_numpy(coarse), 4), coarse.shape[1:], (20, 20, 20))
            assert abs(int(found.sum()) / 400 - 8) <= 1 and set(np.unique(found.sum(axis))) <= {
                7,
                8,
                9,
            }
            if min(spacing) < 1:
                assert np.array_equal(found, inside)


@pytest.mark.parametrize(
    "classes, kind", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (1000, "uint16")]
)
def test_labels_take_the_smallest_type_that_holds_them(classes: int, kind: str) -> None:
    best = torch.zeros(classes, 2, 3, 3)
    best[-1] = 1
    labels = label_map(in_slabs(best, 1), (2, 3, 3), (3, 4, 5))
    assert labels.dtype == kind and (labels == classes - 1).all()


@pytest.mark.parametrize("shape", [(9, 6, 6), (11, 6, 6), (10, 5, 6), (10, 6, 7)], ids=str)
@pytest.mark.parametrize("target", [(20, 6, 6), (3, 6, 6)], ids=str)
def test_slabs_of_another_grid_are_refused(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not make up"):
        label_map(in_slabs(torch.rand(2, 10, 6, 6), 3), shape, target)


# --- into the patient's file ------------------------------------------------------------------------------------------

SIGNS = list(product((1, -1), repeat=3))
# Each order of the axes twice, each combination of their directions at least once; test_nifti.py has all 48.
SOME_ORDERS = [
    (axes, SIGNS[(n + 4 * k) % 8], (n + k) % 2 == 1)
    for n, axes in enumerate(permutations(range(3)))
    for k in (0, 1)
]
SPACING = (0.9, 0.8, 2.2)  # mm
ORGANS = [
    ((22, 24, 32), (40, 36, 30)),
    ((48, 20, 20), (16, 24, 20)),
    ((50, 45, 46), (12, 15, 22)),
    ((50, 48, 16), (15, 10, 20)),
    ((12, 50, 14), (10, 10, 12)),
    ((34, 46, 14), (5, 12, 18)),
]
CLASSES = range(len(ORGANS) + 1)


def rotation(about_z: float, about_x: float) -> np.ndarray:
    a, b = np.radians(about_z), np.radians(about_x)
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    return z @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])


def stored_as(
    truth: np.ndarray, turn: np.ndarray, axes: Sequence[int], flips: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A RAS label map as a scanner might store it, and the affine that says so."""
    steps, origin = turn @ np.diag(SPACING), np.array([-10.0, 20.0, 30.0])
    stored, affine = truth.transpose(axes), np.eye(4)
    for n, (axis, flip) in enumerate(zip(axes, flips)):
        affine[:3, n] = flip * steps[:, axis]
        if flip < 0:  # the first voxel is now the one that was last
            stored, origin = np.flip(stored, n), origin + steps[:, axis] * (truth.shape[axis] - 1)
    affine[:3, 3] = origin
    return stored, affine


def organs(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Ellipsoids with axes of 5 to 40 mm, in no symmetric places: (d, h, w)."""
    mm = np.stack(
        np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing)], indexing="ij"),
        axis=-1,
    )
    labels = np.zeros(shape, np.uint8)
    for label, (centre, axes) in enumerate(ORGANS, start=1):
        labels[(((mm - centre) / (np.array(axes) / 2)) ** 2).sum(-1) < 1] = label
    return labels


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(
        np.mean(
            [
                2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum())
                for k in CLASSES[1:]
            ]
        )
    )


def oracle(x: Tensor) -> Tensor:
    """Its input holds the truth, a channel for each class; it says just that."""
    return x.clamp(min=1e-6).log()


TRUTH = organs((66, 74, 28), SPACING)


@pytest.mark.parametrize("axes, flips, oblique", SOME_ORDERS, ids=str)
def test_predictions_land_on_the_voxel_for_every_axis_order_and_flip(
    axes: tuple[int, ...], flips: tuple[int, ...], oblique: bool, tmp_path: Path
) -> None:
    """The truth goes the image's way: stored as channels, read, resampled, cut into windows, and back into a file."""
    turn = rotation(20, -10) if oblique else np.eye(3)
    truth, affine = stored_as(TRUTH, turn, axes, flips)
    source, target = tmp_path / "image.nii", tmp_path / "labels.nii"
    channels = np.stack([truth == k for k in CLASSES], axis=-1).astype(np.uint8)
    nib.save(nib.Nifti1Image(channels, affine), source)
    item = Item((source,), ("ct",), ("window",), "s1")
    for spacing, grid in (((), TRUTH.shape), ((1.5, 1.5, 2.0), (40, 39, 31))):
        prepared = prepare(item, Recipe(spacing, ct_window=(0.0, 1.0)))
        assert prepared.data.shape == (len(CLASSES), *grid)
        slabs = sliding_window(
            prepared.data,
            oracle,
            window=(48, 48, 32),
            classes=len(CLASSES),
            overlap=0.25,
            device="cpu",
            background=prepared.background,
        )
        save_like(source, label_map(slabs, grid, TRUTH.shape), target)
        found = nib.load(target)
        assert np.array_equal(found.affine, nib.load(source).affine) and found.shape == truth.shape
        assert nib.aff2axcodes(found.affine) == nib.aff2axcodes(affine)
        if spacing:
            assert mean_dice(np.asarray(found.dataobj), truth) >= 0.975
        else:
            assert np.array_equal(found.dataobj, truth)  # a Dice of 1 in every class


@pytest.mark.parametrize("unit, mm", [("mm", 1.0), ("micron", 0.001), ("meter", 1000.0)])
@pytest.mark.parametrize("degrees", [44.99999, 45, 45.00001, -45, 135])
def test_labels_of_a_scan_at_45_degrees_lie_on_it_in_every_unit(
    degrees: float, unit: str, mm: float, tmp_path: Path
) -> None:
    affine = np.diag([1 / mm, 1 / mm, 1 / mm, 1.0])
    affine[:3, :3] = rotation(degrees, 0) / mm
    stored = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    image = nib.Nifti1Image(stored, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    volume = read(tmp_path / "scan.nii")
    save_like(tmp_path / "scan.nii", volume.data[0].astype(np.uint8), tmp_path / "labels.nii")
    found = nib.load(tmp_path / "labels.nii")
    assert np.array_equal(found.dataobj, stored) and found.header.get_xyzt_units()[0] == unit
    assert np.array_equal(read_labels_of(tmp_path / "labels.nii", volume), volume.data[0])


@pytest.mark.parametrize(
    "spacing, shape",
    [
        ((0.9, 0.8, 2.5), (66, 74, 26)),
        ((0.8, 0.9, 1.5), (76, 66, 40)),
        ((0.75, 0.75, 3.0), (80, 80, 22)),
        ((1.2, 0.8, 2.5), (50, 76, 26)),
    ],
    ids=str,
)
def test_resampling_to_the_recipe_and_back_costs_an_oracle_no_more_than_a_few_hundredths(
    spacing: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    """From other grids; and two wrong ways back, one of them SwinUNETR's nearest neighbour, cost more."""
    truth = organs(shape, spacing)
    one_hot = np.stack([truth == k for k in CLASSES]).astype(np.float32)
    coarse = torch.from_numpy(resample(Volume(one_hot, np.diag([*spacing, 1.0])), (1.5, 1.5, 2.0)))
    right = mean_dice(label_map(in_slabs(coarse, 5), coarse.shape[1:], shape), truth)
    corners = (
        F.interpolate(coarse[None], shape, mode="trilinear", align_corners=True)[0]
        .argmax(0)
        .numpy()
    )
    nearest = F.interpolate(coarse.argmax(0)[None, None].float(), shape, mode="nearest-exact")[
        0, 0
    ].numpy()
    assert right >= 0.975
    assert mean_dice(corners, truth) < right - 0.01 and mean_dice(nearest, truth) < right - 0.02


UNITS = {
    "xyzt_units": 10,
    "dim_info": 57,
    "descrip": b"a scan",
}  # mm and s; of which axis which gradient was


def scan(path: Path, *, kind: type = nib.Nifti1Image, shape: Sequence[int] = (7, 5, 6)) -> Path:
    """A scaled 16-bit image in LPS-like order whose two affines differ, with a display range, intent and extension."""
    sform = np.array([[0, -0.8, 0.1, 30], [0.1, 0.1, 2.5, -20], [-0.9, 0, 0.2, 55], [0, 0, 0, 1.0]])
    image = kind(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), sform)
    image.set_sform(sform, 4)
    image.set_qform(np.diag([-0.9, -0.8, 2.5, 1]), 1)
    header = image.header
    for field, value in UNITS.items():
        header[field] = value
    header.set_intent("z score", name="z")
    header["cal_max"], header["cal_min"] = 400, -100
    header.set_slope_inter(2, -1024)
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"of the image"))
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    "ending, kind, shape, dtype",
    [
        (".nii", nib.Nifti1Image, (7, 5, 6), "uint16"),
        (".nii.gz", nib.Nifti1Image, (7, 5, 6, 2), "uint8"),
        (".nii.gz", nib.Nifti2Image, (7, 5, 6, 1), "uint16"),
        (".nii", nib.Nifti2Image, (7, 5, 6), "uint8"),
    ],
)
def test_the_file_has_the_images_own_grid_and_header(
    ending: str, kind: type, shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    source = scan(tmp_path / f"scan{ending}", kind=kind, shape=shape)
    grid = read(source).data.shape[1:]
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, grid, dtype=dtype)
    save_like(source, labels, tmp_path / f"labels{ending}")
    image, found = nib.load(source), nib.load(tmp_path / f"labels{ending}")
    assert (
        type(found) is kind and found.shape == image.shape[:3] and found.get_data_dtype() == dtype
    )
    assert np.array_equal(found.affine, image.affine) and nib.aff2axcodes(found.affine) == (
        "I",
        "L",
        "A",
    )
    for form in ("get_sform", "get_qform"):
        (a, a_code), (b, b_code) = (
            getattr(each.header, form)(coded=True) for each in (image, found)
        )
        assert np.array_equal(a, b) and a_code == b_code
    assert found.header.get_zooms() == image.header.get_zooms()[:3]
    assert found.header.get_xyzt_units() == ("mm", "sec")
    assert all(found.header[field] == image.header[field] for field in UNITS)
    assert found.header.get_intent()[0] == "none" and not len(found.header.extensions)
    assert found.header["cal_max"] == found.header["cal_min"] == 0
    assert (found.dataobj.slope, found.dataobj.inter) == (1, 0)
    turned = nib.as_closest_canonical(found)
    assert np.array_equal(turned.dataobj, labels)
    assert np.array_equal(
        np.asarray(found.dataobj), labels[::-1, :, ::-1].transpose(2, 0, 1)
    )  # by hand: I, L, A


def test_labels_that_were_written_are_read_on_the_grid_of_their_image(tmp_path: Path) -> None:
    source = scan(tmp_path / "scan.nii.gz")
    volume = read(source)
    labels = np.random.default_rng(0).integers(0, 9, volume.data.shape[1:], dtype=np.uint8)
    save_like(source, labels, tmp_path / "labels.nii.gz")
    assert np.array_equal(read_labels_of(tmp_path / "labels.nii.gz", volume), labels)


def test_labels_of_another_grid_are_refused(tmp_path: Path) -> None:
    source = scan(tmp_path / "scan.nii")
    with pytest.raises(InputError, match=r"scan\.nii"):
        save_like(
            source, np.zeros((7, 5, 6), np.uint8), tmp_path / "labels.nii"
        )  # stored order, not RAS
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = scan(tmp_path / "scan.nii"), tmp_path / "labels.nii.gz"
    labels = np.ones(read(source).data.shape[1:], np.uint8)
    save_like(source, labels, target)
    before = target.read_bytes()

    def breaks_off(image: object, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(inference.nib, "save", breaks_off)
        save_like(source, 2 * labels, target)
    assert target.read_bytes() == before and set(tmp_path.iterdir()) == {source, target}
    save_like(source, 2 * labels, target)
    assert (np.asarray(nib.load(target).dataobj) == 2).all() and set(tmp_path.iterdir()) == {
        source,
        target,
    }


# --- other people's, and the size of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_it_equals_monai_where_the_windows_are_the_same(combine: str) -> None:
    """On sizes where clamped and even windows coincide; odd windows, whose peak is 1, have the same floor."""
    sliding_window_inference = pytest.importorskip("monai.inferers").sliding_window_inference
    image, window, network = image_of(29, 19, 33), (15, 13, 17), seeing()
    said = (lambda x: network(x).softmax(1)) if combine == "softmax" else network
    theirs = sliding_window_inference(
        image[None], window, 4, said, overlap=0.5, mode="gaussian", sigma_scale=0.125
    )[0]
    expected = theirs if combine == "softmax" else theirs.softmax(0)
    found = whole(image, network, window=window, combine=combine)
    assert (found - expected).abs().max() < 1e-5


LARGE = """
import resource
import torch
from dae.evaluation.inference import label_map, sliding_window

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, levels = peak(), torch.linspace(0, 1, 14)[:, None, None, None]
slabs = sliding_window(torch.rand(1, 340, 340, 200), lambda x: levels.expand(len(x), 14, 96, 96, 96),
                       window=(96, 96, 96), classes=14, overlap=0, device="cpu", background=[0.0], flips=(0, 1, 2))
labels = label_map(slabs, (340, 340, 200), (512, 512, 300))
assert labels.shape == (512, 512, 300) and (labels == 13).all()
print((peak() - before) / 1e9)
"""


@pytest.mark.slow
def test_14_classes_of_512_512_300_voxels_take_less_than_3_gb() -> None:
    """With flips and resampling, image and output included; the probabilities alone would be 4.4 GB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, env=environment, check=True
    )
    assert 0.3 < float(ran.stdout) < 3.0


@pytest.mark.parametrize(
    "box", [(slice(2, 15), slice(1, 6), slice(0, 7)), (slice(0, 20), slice(0, 8), slice(2, 9))]
)
def test_what_was_predicted_in_a_box_lies_there_and_all_around_is_background(
    box: tuple[slice, slice, slice],
) -> None:
    inside = torch.rand(3, *(each.stop - each.start for each in box))
    whole = torch.cat(list(in_place(inside.split(4, dim=1), box, (20, 8, 9))), dim=1)
    assert whole.shape == (3, 20, 8, 9) and torch.equal(whole[:, box[0], box[1], box[2]], inside)
    around = torch.ones(20, 8, 9, dtype=torch.bool)
    around[box] = False
    assert (whole[0][around] == 1).all() and not whole[1:, around].any()
