"""dae/evaluation/windows.py: against brute force, closed forms and MONAI."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dae.data.regions import Region
from dae.errors import InputError
from dae.evaluation.native_grid import label_map
from dae.evaluation.windows import blend, decide_by, gaussian, sliding_window, window_starts

ROOT = Path(__file__).parents[1]
BACKGROUND = (-3.0, -2.0, -1.0)  # of the three channels
WINDOW = (4, 5, 6)


def image_of(*size: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed))


def probabilities(image: Any, predict: Any, **arguments: Any) -> Tensor:
    """All slabs of a prediction, side by side: (k, d, h, w)."""
    defaults = {"window": WINDOW, "classes": 3, "device": "cpu", "background": BACKGROUND}
    slabs = sliding_window(image, predict, **{**defaults, **arguments})
    return torch.cat(list(slabs), dim=1)


def identity(x: Tensor) -> Tensor:
    """Returns the very tensor that it got."""
    return x


def small_network(seed: int = 0, classes: int = 3) -> nn.Module:
    """What it says of a voxel depends on where in the window that is: zero padding, two layers."""
    torch.manual_seed(seed)
    first = nn.Conv3d(3, 4, 3, padding=1)
    last = nn.Conv3d(4, classes, 3, padding=1)
    network = nn.Sequential(first, nn.LeakyReLU(), last)
    with torch.no_grad():
        last.weight *= 10  # probabilities far from even, or an error in them would be small
    return network.requires_grad_(False)


# --- windows along an axis, weights of a window


@given(st.integers(1, 300), st.integers(1, 120), st.floats(0, 0.95))
def test_windows_begin_at_0_end_flush_step_evenly_and_are_as_few_as_the_overlap_allows(
    spare: int, window: int, overlap: float
) -> None:
    starts = window_starts(window + spare, window, overlap)
    steps = np.diff(starts)
    longest = max(1, window * (1 - overlap)) + 1e-6
    assert starts[0] == 0
    assert starts[-1] == spare
    assert steps.min() >= 1
    assert steps.max() <= longest
    assert np.ptp(steps) <= 1
    # With one window fewer a step would be too long.
    assert (len(starts) - 2) * int(longest) < spare


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


def weights_by_formula(window: Sequence[int]) -> Tensor:
    """The Gaussian with its floor, in float64."""
    voxels = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), axis=-1)
    sigmas_off = (voxels - (np.array(window) - 1) / 2) / (np.array(window) / 8)
    weights = np.exp(-0.5 * (sigmas_off**2).sum(-1))
    return torch.from_numpy(np.maximum(weights / weights.max(), 1e-3))


@pytest.mark.parametrize("window", [(9, 9, 9), (8, 5, 6), (1, 2, 16)], ids=str)
def test_weights_are_a_centred_bell_of_an_eighth_with_a_floor(window: tuple[int, int, int]) -> None:
    weights = gaussian(window)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double(), weights_by_formula(window), rtol=1e-6)
    assert torch.equal(weights, weights.flip(0, 1, 2))
    assert weights.max() == 1
    assert weights.min() >= np.float32(1e-3)


def test_a_weight_falls_to_the_root_of_e_an_eighth_off_the_centre() -> None:
    weights = gaussian((1, 1, 33))[0, 0]
    assert weights[16 + 4].item() == pytest.approx(np.exp(-0.5 * (4 / (33 / 8)) ** 2))


# --- what comes in comes out


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
    """Sizes that do not divide, windows larger than some axes or all. MONAI 1.6.1 fails for batches
    of one.
    """
    image = image_of(*size)
    before = image.clone()
    found = probabilities(image, identity, batch=batch, overlap=overlap, combine=combine)
    assert torch.equal(image, before)
    assert found.shape == image.shape
    assert found.dtype == torch.float32
    assert (found - before.softmax(0)).abs().max() < 1e-6

    logits = found.log() + before.logsumexp(0)  # softmax undone
    assert (logits - before).abs().max() < 1e-5


@pytest.mark.parametrize("batch, overlap", [(1, 0), (1, 0.75), (3, 0.5), (5, 0.25)])
def test_blended_windows_of_raw_values_are_those_values(batch: int, overlap: float) -> None:
    image = 1000 * image_of(11, 9, 10)

    def predict_at(corners: Sequence[tuple[int, int, int]]) -> Tensor:
        return torch.stack([image[:, d : d + 4, h : h + 5, w : w + 6] for d, h, w in corners])

    slabs = blend(
        predict_at, (11, 9, 10), gaussian(WINDOW), classes=3, overlap=overlap, batch=batch
    )
    assert torch.allclose(torch.cat(list(slabs), dim=1), image, rtol=1e-6, atol=1e-3)


def test_a_constant_prediction_comes_out_constant() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0])[:, None, None, None]

    def constant(x: Tensor) -> Tensor:
        return logits.expand(len(x), 3, 4, 5, 6)

    found = probabilities(image_of(11, 9, 10), constant, flips=(0, 2))
    assert torch.allclose(found, logits.softmax(0).expand_as(found), atol=1e-6)


def test_a_predictor_may_write_its_input_and_reuse_its_output() -> None:
    """Neither the image, nor a later prediction, nor another member of the ensemble notices."""
    image = image_of(11, 9, 10)
    buffer = torch.empty(8, 3, 4, 5, 6)
    before = image.clone()

    def careless(x: Tensor) -> Tensor:
        buffer[: len(x)] = x
        x.zero_()
        return buffer[: len(x)]

    members = [careless, careless, identity]
    for combine in ("softmax", "logits"):
        found = probabilities(image, members, batch=8, flips=(0, 1, 2), combine=combine)
        assert torch.equal(image, before)
        assert torch.allclose(found, image.softmax(0), atol=1e-6)


def test_what_a_predictor_returns_is_never_written() -> None:
    returned: list[tuple[Tensor, Tensor]] = []

    def remember(x: Tensor) -> Tensor:
        returned.append((x, x.clone()))
        return x

    for combine in ("softmax", "logits"):
        probabilities(image_of(11, 9, 10), remember, batch=1, combine=combine)
    assert len(returned) > 50
    assert all(torch.equal(now, then) for now, then in returned)


def test_arrays_and_tensors_of_any_float_type_are_images() -> None:
    image = image_of(5, 6, 7).half()
    array = image.numpy()
    array.flags.writeable = False
    found = probabilities(array, identity)
    assert found.dtype == torch.float32
    assert torch.equal(found, probabilities(image, identity))
    assert torch.equal(found, probabilities(image.float(), identity))


# --- blending: against everything at once, in float64

# Of windows 4 5 6 on 11 9 10 voxels that overlap by half.
STARTS = [(0, 2, 4, 5, 7), (0, 2, 4), (0, 2, 4)]


def brute_force(
    image: Tensor,
    networks: Sequence[nn.Module],
    starts: Sequence[Sequence[int]],
    *,
    window: tuple[int, int, int] = WINDOW,
    flips: Sequence[Sequence[int]] = ((),),
    combine: str = "softmax",
) -> Tensor:
    """All windows, flips and networks summed up on the whole volume, in float64: (k, d, h, w)."""
    weights = weights_by_formula(window)
    total = torch.zeros(3, *image.shape[1:], dtype=torch.float64)
    weight = torch.zeros(image.shape[1:], dtype=torch.float64)
    for corner, network, axes in product(product(*starts), networks, flips):
        box = [slice(first, first + n) for first, n in zip(corner, window)]
        dims = [axis + 1 for axis in axes]
        flipped = image[:, *box].double().flip(dims)
        scores = deepcopy(network).double()(flipped[None])[0].flip(dims)
        if combine == "softmax":
            scores = scores.softmax(0)
        total[:, *box] += scores * weights
        weight[*box] += weights

    mean = total / weight
    return mean if combine == "softmax" else mean.softmax(0)


@pytest.mark.parametrize("combine", ["softmax", "logits"])
@pytest.mark.parametrize(
    "flips, combinations",
    [((), [()]), ((1,), [(), (1,)]), ((0, 2), [(), (0,), (2,), (0, 2)])],
    ids=str,
)
@pytest.mark.parametrize("members", [1, 2])
def test_slabs_are_the_whole_weighted_mean(
    members: int, flips: tuple[int, ...], combinations: list[tuple[int, ...]], combine: str
) -> None:
    image = image_of(11, 9, 10)
    networks = [small_network(n) for n in range(members)]
    found = probabilities(image, networks, flips=flips, combine=combine, batch=3)
    expected = brute_force(image, networks, STARTS, flips=combinations, combine=combine)
    assert (found - expected).abs().max() < 1e-5

    if members > 1 or flips:
        plain = probabilities(image, networks[0], combine=combine)
        assert (found - plain).abs().max() > 1e-2


def test_a_volume_smaller_than_the_window_lies_in_its_middle_with_background_around() -> None:
    image = image_of(3, 9, 3)
    network = small_network()
    padded = torch.tensor(BACKGROUND)[:, None, None, None].repeat(1, 6, 9, 8)
    # Of 3 voxels too few one goes before, of 5 two: as in a training crop.
    padded[:, 1:4, :, 2:5] = image

    expected = brute_force(padded, [network], [(0,), (0, 2, 4), (0,)], window=(6, 5, 8))
    found = probabilities(image, network, window=(6, 5, 8))
    assert found.shape == (3, 3, 9, 3)
    assert (found - expected[:, 1:4, :, 2:5]).abs().max() < 1e-5


def test_sums_are_float32_whatever_the_network_answers_in() -> None:
    image = image_of(24, 9, 10)
    answer = small_network()(image[None])[0]  # one for each voxel, whichever the window
    exact = answer.bfloat16().double().softmax(0)

    def answer_in_bfloat16(x: Tensor) -> Tensor:
        return x[:, 3:].bfloat16()

    both = torch.cat([image, answer])
    found = probabilities(both, answer_in_bfloat16, overlap=0.75, background=(0.0,) * 6)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-6


# --- flips and ensembles


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_flips_change_nothing_for_a_network_that_does_not_see_them(combine: str) -> None:
    image = image_of(11, 9, 10)
    torch.manual_seed(0)
    symmetric = nn.Conv3d(3, 3, 3, padding=1).requires_grad_(False)
    for axis in (2, 3, 4):
        symmetric.weight.copy_((symmetric.weight + symmetric.weight.flip(axis)) / 2)

    plain = probabilities(image, symmetric, combine=combine)
    flipped = probabilities(image, symmetric, flips=(0, 1, 2), combine=combine)
    assert torch.allclose(flipped, plain, atol=1e-6)

    # Of another network they do change the answer.
    plain = probabilities(image, small_network())
    flipped = probabilities(image, small_network(), flips=(0, 1, 2))
    assert not torch.allclose(flipped, plain, atol=1e-2)


@pytest.mark.parametrize(
    "flips, combinations", [((), 1), ((1,), 2), ((2, 0), 4), ((0, 1, 2), 8), ((1, 1), 2)], ids=str
)
def test_every_combination_of_flips_is_asked_once(
    flips: tuple[int, ...], combinations: int
) -> None:
    seen: list[bytes] = []

    def remember(x: Tensor) -> Tensor:
        seen.append(x.numpy().tobytes())
        return x

    probabilities(image_of(4, 5, 6), remember, flips=flips)
    assert len(seen) == combinations
    assert len(set(seen)) == combinations


def told_by_side(x: Tensor) -> Tensor:
    """What is bright in channel 0 is class 1, left, in the first half of axis 0, else 2, right."""
    organ = (x[:, 0] > 0).float()
    first_half = (torch.arange(x.shape[2]) < x.shape[2] / 2).float()[:, None, None]
    return 9 * torch.stack([1 - organ, organ * first_half, organ * (1 - first_half)], dim=1)


def told_by_the_front(x: Tensor) -> Tensor:
    """The same in a window that is turned by 180 degrees as well: channel 1 grows to the front."""
    is_ahead = x[:, 1].diff(dim=2).mean((1, 2, 3)) > 0
    answer = told_by_side(x)
    return torch.where(is_ahead[:, None, None, None, None], answer, answer[:, [0, 2, 1]])


def an_organ_on_each_side() -> Tensor:
    """(10, 5, 6): labels 1 and 2."""
    truth = torch.zeros(10, 5, 6, dtype=torch.int64)
    truth[1:3, 1:4, 2:5] = 1
    truth[7:9, 1:4, 2:5] = 2
    return truth


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_left_and_right_change_places_where_a_window_was_flipped(combine: str) -> None:
    """A network that tells two organs by their side alone, as one trained with `swap` does."""
    truth = an_organ_on_each_side()
    image = torch.where(truth > 0, 1.0, -1.0)[None]
    common: dict[str, Any] = {"window": (10, 5, 6), "background": (-1.0,), "combine": combine}
    once = probabilities(image, told_by_side, **common)
    assert torch.equal(once.argmax(0), truth)

    for flips in ((0,), (1, 2), (0, 1, 2)):
        found = probabilities(image, told_by_side, flips=flips, swap=[(1, 2)], **common)
        assert torch.allclose(found, once, atol=1e-6)

    # Without the exchange no side is known any more.
    wrong = probabilities(image, told_by_side, flips=(0,), **common)
    assert torch.allclose(wrong[1], wrong[2], atol=1e-6)


def test_a_network_of_turned_crops_exchanges_sides_in_front_back_flips_as_well() -> None:
    """It tells sides by where the front is: flipped along both axes a left organ is left again."""
    organs = torch.where(an_organ_on_each_side() > 0, 1.0, -1.0)
    ramp = torch.linspace(-1, 1, 5)[:, None].expand(10, 5, 6)
    image = torch.stack([organs, ramp])
    common: dict[str, Any] = {"window": (10, 5, 6), "background": (-1.0, 0.0), "swap": [(1, 2)]}
    once = probabilities(image, told_by_the_front, **common)
    assert set(once.argmax(0).unique().tolist()) == {0, 1, 2}

    for flips in ((0,), (1,), (0, 1), (0, 1, 2)):
        found = probabilities(image, told_by_the_front, flips=flips, swap_axes=(0, 1), **common)
        assert torch.allclose(found, once, atol=1e-6)


def test_softmax_means_let_the_unsure_speak_and_logit_means_the_sure() -> None:
    def says(logit: float) -> Callable[[Tensor], Tensor]:
        answer = torch.tensor([logit, 0.0])[:, None, None, None]
        return lambda x: answer.expand(len(x), 2, 4, 5, 6)

    image = image_of(4, 5, 6)
    members = [says(6), says(-1), says(-2)]

    # .46: the second class.
    softmax = probabilities(image, members, classes=2, combine="softmax")
    mean = np.mean([1 / (1 + np.exp(-logit)) for logit in (6, -1, -2)])
    assert torch.allclose(softmax[0], torch.tensor(mean, dtype=torch.float32))

    # (6 - 1 - 2) / 3 = 1: the first class.
    logits = probabilities(image, members, classes=2, combine="logits")
    assert torch.allclose(logits[0], torch.tensor(1 / (1 + np.exp(-1)), dtype=torch.float32))


# --- how it goes through a volume


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_windows_go_row_by_row_and_slabs_leave_as_soon_as_they_can(batch: int) -> None:
    sizes: list[int] = []

    def count(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    slabs = sliding_window(
        image_of(40, 9, 10),
        count,
        window=WINDOW,
        classes=3,
        overlap=0.5,
        batch=batch,
        device="cpu",
        background=BACKGROUND,
    )
    assert not sizes  # nothing happens before the first slab is asked for

    # A row has 3 x 3 windows, and the next row begins two planes on.
    for row in range(1, 19):
        planes = next(slabs).shape[1]
        assert sum(sizes) == 9 * row
        assert planes == 2
    assert max(sizes) == min(batch, 9)
    assert next(slabs).shape[1] == 4
    assert next(slabs, None) is None


def test_slabs_are_thin_and_their_own() -> None:
    """A caller may keep one, or write into it, and run its own code with gradients between two."""
    image = image_of(24, 9, 10)
    kept = []
    for slab in sliding_window(
        image, identity, window=(24, 5, 6), classes=3, device="cpu", background=BACKGROUND
    ):
        assert slab.shape[1] == 8
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        kept.append(slab.clone())
        slab.zero_()
    assert torch.allclose(torch.cat(kept, dim=1), image.softmax(0), atol=1e-6)


def test_a_network_with_gradients_leaves_no_graph() -> None:
    found = probabilities(image_of(5, 6, 7), small_network().requires_grad_())
    assert not found.requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, elements)
        return result


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_no_tensor_is_thicker_than_a_window(combine: Any) -> None:
    image = np.zeros((1, 200, 16, 16), np.float32)

    def predict(x: Tensor) -> Tensor:
        return x.expand(-1, 7, -1, -1, -1)

    with Largest() as largest:
        slabs = sliding_window(
            image,
            predict,
            window=(8, 8, 8),
            classes=7,
            device="cpu",
            background=[0.0],
            flips=(0, 1),
            batch=1,
            combine=combine,
        )
        labels = label_map(slabs, (200, 16, 16), (300, 20, 20))
    assert labels.shape == (300, 20, 20)
    assert 0 < largest.elements <= 7 * 8 * 16 * 16  # all of it would be 25 times as many


LARGE = """
import resource
import torch
from dae.evaluation.native_grid import label_map
from dae.evaluation.windows import sliding_window

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
levels = torch.linspace(0, 1, 14)[:, None, None, None]
slabs = sliding_window(
    torch.rand(1, 340, 340, 200),
    lambda x: levels.expand(len(x), 14, 96, 96, 96),
    window=(96, 96, 96),
    classes=14,
    overlap=0,
    device="cpu",
    background=[0.0],
    flips=(0, 1, 2),
)
labels = label_map(slabs, (340, 340, 200), (512, 512, 300))
assert labels.shape == (512, 512, 300)
assert (labels == 13).all()
print((peak() - before) / 1e9)
"""


@pytest.mark.slow
def test_14_classes_of_512_512_300_voxels_take_less_than_3_gb() -> None:
    """With flips and resampling, image and output included. Probabilities alone would be 4.4 GB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, env=environment, check=True
    )
    assert 0.3 < float(ran.stdout) < 3.0


# --- what is refused


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"overlap": 1.0}, "overlap"),
        ({"overlap": -0.1}, "overlap"),
        ({"combine": "vote"}, "combine"),
        ({"flips": (3,)}, "flips"),
        ({"background": (0.0,)}, "background"),
        ({"batch": 0}, "batch"),
        ({"predict": []}, "predictor"),
        ({"image": torch.zeros(5, 6, 7)}, "c, d, h, w"),
        ({"swap": [(1, 3)]}, "swap must name"),
        ({"swap": [(1, 1)]}, "swap must name"),
        ({"swap": [(0, 1), (1, 2)]}, "swap must name"),
        ({"swap": [(-1, 1)]}, "swap must name"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_the_first_slab(
    wrong: dict[str, Any], message: str
) -> None:
    right = {
        "image": image_of(5, 6, 7),
        "predict": identity,
        "window": WINDOW,
        "classes": 3,
        "device": "cpu",
        "background": BACKGROUND,
    }
    with pytest.raises(ValueError, match=message):
        sliding_window(**{**right, **wrong})


def test_a_network_of_other_classes_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 4, 5, 6\).*\(4, 5, 4, 5, 6\)"):
        probabilities(image_of(11, 9, 10), identity, classes=5)


def test_an_output_that_is_no_number_is_refused_not_made_a_class() -> None:
    image = image_of(11, 9, 10)
    image[1, 3, 4, 5] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        probabilities(image, identity)


# --- regions


def test_each_region_has_a_sigmoid_of_its_own() -> None:
    image = image_of(*WINDOW)
    network = small_network()
    expected = 1 / (1 + np.exp(-network(image[None])[0].double().numpy()))
    for combine in ("softmax", "logits"):
        found = probabilities(image, network, combine=combine, are_regions=True)
        assert np.allclose(found.numpy(), expected, atol=1e-6)
    assert (expected.sum(0) > 1.2).any()  # which no classes have


def constant(*values: float) -> Callable[[Tensor], Tensor]:
    """A network whose logits are the same in all voxels of a channel."""

    def predict(x: Tensor) -> Tensor:
        return torch.tensor(values).reshape(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[2:])

    return predict


def test_an_ensemble_of_regions_averages_sigmoids_or_logits() -> None:
    members = [constant(9.0, 1.0, -1.0), constant(-3.0, 2.0, -2.0)]
    options: dict[str, Any] = {"are_regions": True, "overlap": 0.5}
    of_sigmoids = probabilities(image_of(7, 8, 9), members, **options)[:, 3, 3, 3]
    of_logits = probabilities(image_of(7, 8, 9), members, combine="logits", **options)[:, 3, 3, 3]

    logits = np.array([[9.0, 1.0, -1.0], [-3.0, 2.0, -2.0]])
    expected = (1 / (1 + np.exp(-logits))).mean(0)
    assert of_sigmoids.numpy() == pytest.approx(expected, abs=1e-6)
    assert of_logits.numpy() == pytest.approx(1 / (1 + np.exp(-logits.mean(0))), abs=1e-6)


def test_regions_of_two_sides_change_places_where_a_window_was_flipped() -> None:
    truth = an_organ_on_each_side()
    image = torch.where(truth > 0, 1.0, -1.0)[None]
    common: dict[str, Any] = {
        "window": (10, 5, 6),
        "background": (-1.0,),
        "classes": 2,
        "are_regions": True,
    }

    def left_and_right(x: Tensor) -> Tensor:
        return told_by_side(x)[:, 1:] - 4.5

    once = probabilities(image, left_and_right, **common)
    flipped = probabilities(image, left_and_right, flips=(0, 1, 2), swap=[(0, 1)], **common)
    assert torch.allclose(flipped, once, atol=1e-6)
    assert torch.equal(once > 0.5, torch.stack([truth == 1, truth == 2]))


@pytest.mark.parametrize("combine", ["softmax", "logits"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_region_that_is_no_number_or_infinite_is_refused(combine: str, value: float) -> None:
    image = image_of(11, 9, 10)
    image[1, 3, 4, 5] = value
    with pytest.raises(InputError, match="NaN"):
        probabilities(image, identity, combine=combine, are_regions=True)


def test_probabilities_become_the_likeliest_class_or_all_regions_above_a_half() -> None:
    p = torch.tensor(
        [[0.9, 0.9, 0.4, 0.5, 0.6], [0.8, 0.5, 0.6, 0.4, 0.7], [0.1, 0.0, 0.2, 0.9, 1]]
    )
    assert decide_by([0, 1, 2], ())(p).tolist() == [0, 0, 1, 2, 2]

    labels = [0, 1, 4, 9]
    regions = (Region("whole", (1, 4, 9), 4), Region("core", (1, 9), 1), Region("in", (9,), 9))
    index = decide_by(labels, regions)(p)
    assert [labels[n] for n in index.tolist()] == [1, 4, 1, 9, 9]


# --- other people's


@pytest.mark.parametrize("combine", ["softmax", "logits"])
def test_it_equals_monai_where_the_windows_are_the_same(combine: str) -> None:
    """On sizes where clamped and even windows coincide. Odd windows, whose peak is 1, have the same
    floor.
    """
    sliding_window_inference = pytest.importorskip("monai.inferers").sliding_window_inference
    image = image_of(29, 19, 33)
    window = (15, 13, 17)
    network = small_network()

    def scores(x: Tensor) -> Tensor:
        return network(x).softmax(1) if combine == "softmax" else network(x)

    expected = sliding_window_inference(
        image[None], window, 4, scores, overlap=0.5, mode="gaussian", sigma_scale=0.125
    )[0]
    if combine == "logits":
        expected = expected.softmax(0)
    found = probabilities(image, network, window=window, combine=combine)
    assert (found - expected).abs().max() < 1e-5
