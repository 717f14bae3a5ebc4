"""dae/figures.py: pictures hold what they are said to hold, and right is on the left."""

import io
import math
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dae import figures
from dae.demo.phantom import body_ct
from dae.figures import (
    COLOURS,
    Segmented,
    Triple,
    cka_chart,
    colours_of,
    distribution,
    embedding_chart,
    loss_curve,
    overlay,
    overlay_sheet,
    reconstruction_sheet,
    seg_curve,
)
from tests.test_statistics import row

pytestmark = pytest.mark.filterwarnings("error")

ISO = (1.0, 1.0, 1.0)
Pixels = NDArray[np.float32]  # (height, width, 4) in [0, 1]


def picture(png: bytes | Path) -> Pixels:
    from matplotlib.image import imread

    return np.asarray(imread(io.BytesIO(png) if isinstance(png, bytes) else png))


def colour(n: int) -> NDArray[np.float64]:
    return np.array([int(COLOURS[n][k : k + 2], 16) / 255 for k in (1, 3, 5)])


def where(pixels: Pixels, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the pixels of about this colour are: (n, 2) as shares of the height and the width."""
    near = np.abs(pixels[..., :3] - wanted).max(-1) < 0.12
    return np.argwhere(near) / pixels.shape[:2]


def third(found: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Those in the n-th of three panels."""
    return found[(found[:, 1] * 3).astype(int) == n]


def cube(size: int, low: int, high: int) -> NDArray[np.uint8]:
    labels = np.zeros((size, size, size), np.uint8)
    labels[low:high, low:high, low:high] = 1
    return labels


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are made."""
    made: list[Any] = []
    new_figure = figures.new_figure

    def remembered(*size: float, **options: Any) -> Any:
        made.append(new_figure(*size, **options))
        return made[-1]

    monkeypatch.setattr(figures, "new_figure", remembered)
    return made


# --- training


def test_a_reconstruction_sheet_shows_the_middle_and_the_errors(
    tmp_path: Path, drawn: list[Any]
) -> None:
    x = np.zeros((2, 4, 6, 5), np.float32)
    x[0, 0, 5, 2] = 1.0  # right, in front, in the middle
    x[0, :, :, 3] = 9.0  # on another plane
    x[1] = 7.0  # in another channel
    rows = [Triple("ct", x, x + 0.5, x - 0.25), Triple("t1", x, x, x)]
    reconstruction_sheet(tmp_path / "sheet.png", rows)

    axes = drawn[0].axes
    assert len(axes) == 8
    assert picture(tmp_path / "sheet.png").std() > 0
    titles = [ax.get_title() for ax in axes[:4]]
    assert titles == ["ct   x", "x_hat   L1 0.5000", "x_rec   L1 0.2500", "|x - x_rec|"]

    (image,) = axes[0].images
    assert image.get_array().shape == (6, 4)
    assert image.get_array()[5, 3] == 1.0  # bottom to top is back to front, right is on the left
    assert image.get_array().sum() == 1.0
    assert axes[0].images[0].get_clim() == axes[2].images[0].get_clim() == (0.0, 9.0)
    assert axes[3].images[0].get_clim() == (0.0, 2.25)
    assert (axes[3].images[0].get_array() == 0.25).all()


def test_a_dollar_is_one_but_in_the_numbers_of_a_log_axis(tmp_path: Path, drawn: list[Any]) -> None:
    losses = [{"event": "train", "step": n, "l1_raw": 10.0**-n} for n in range(4)]
    loss_curve(tmp_path / "loss.png", losses)
    distribution([row("s1", 1, 0.9) | {"name": "$liver_$"}])

    (ax,) = drawn[0].axes
    numbers = [text for text in ax.get_yticklabels() if "mathdefault" in text.get_text()]
    assert numbers and all(text.get_parse_math() for text in numbers)
    (name,) = drawn[1].axes[0].get_yticklabels()
    assert name.get_text() == "$liver_$" and not name.get_parse_math()


def test_curves_have_the_points_of_their_events(tmp_path: Path, drawn: list[Any]) -> None:
    events: list[dict[str, Any]] = [
        {"event": "start", "l1": 5.0},
        {"event": "train", "step": 1, "l1_raw": 0.5, "loss": 2.0},
        {"event": "validation", "step": 1, "l1": 0.4, "l1_input": 0.6, "dice": 0.1},
        {"event": "train", "step": 2, "l1_raw": None, "loss": 1.0},
        {"event": "validation", "step": 2, "l1": 0.3, "dice": None},
    ]
    loss_curve(tmp_path / "loss.png", events)
    seg_curve(tmp_path / "seg.png", events)
    loss_curve(tmp_path / "nothing.png", [])

    points = []
    for figure in drawn:
        for ax in figure.axes:
            points += [line.get_xydata().tolist() for line in ax.lines]
    assert points[:3] == [[[1, 0.5]], [[1, 0.4], [2, 0.3]], [[1, 0.6]]]
    assert points[3:5] == [[[1, 2.0], [2, 1.0]], [[1, 0.1]]]
    assert points[5:] == [[], [], []]
    assert (tmp_path / "nothing.png").is_file()


def test_an_overlay_sheet_shows_truth_and_prediction_through_the_centre_of_the_labels(
    tmp_path: Path, drawn: list[Any]
) -> None:
    image = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32)
    label = np.zeros((12, 12, 12), np.uint8)
    label[8:11, 2:5, 4:7] = 3
    prediction = np.zeros_like(label)
    prediction[9, 3, 5] = 1
    nothing = np.zeros_like(label)
    cases = [Segmented("case 7", image, label, prediction), Segmented("b", image, nothing, nothing)]
    overlay_sheet(tmp_path / "sheet.png", cases)

    axes = drawn[0].axes
    assert [ax.get_title() for ax in axes[:3]] == ["case 7  truth", "  prediction", "  truth"]
    for n in range(6):
        filled = axes[n].images[1].get_array()
        assert filled.count() == (9 if n % 2 == 0 else 1)  # a slice of the cube, or one voxel
        assert axes[n].images[1].get_clim() == (1, 3)
    assert axes[6].images[1].get_array().count() == 0


# --- overlays of the worst cases


def test_truth_is_filled_and_the_prediction_a_line() -> None:
    truth = cube(30, 5, 25)
    both = picture(overlay(truth, truth, ISO, [1]))
    missed = picture(overlay(0 * truth, truth, ISO, [1]))
    spurious = picture(overlay(truth, 0 * truth, ISO, [1]))
    line = colour(0)
    assert len(where(both, line)) > 300
    assert len(where(spurious, line)) > 300
    assert not len(where(missed, line))

    height, width, _ = spurious.shape
    assert spurious[height // 2, width // 6, :3].min() > 0.1  # an organ
    assert spurious[2, 2, :3].max() == 0  # on black

    # What is filled takes the colour on.
    blue = [(pixels[..., 2] - pixels[..., 0] > 0.1).mean() for pixels in (both, missed, spurious)]
    assert blue[0] > 0.3
    assert blue[1] > 0.3
    assert blue[2] < 0.05


def test_right_and_front_of_the_patient_are_on_the_left_of_axial_coronal_and_sagittal_planes() -> (
    None
):
    truth = cube(40, 2, 38)
    prediction = truth.copy()
    prediction[30:36, 4:10, 30:36] = 2  # right, posterior, superior
    found = where(picture(overlay(prediction, truth, ISO, [1, 2])), colour(1))
    sides = []
    for n in range(3):
        down, across = third(found, n).mean(0)
        vertical = "top" if down < 0.5 else "bottom"
        horizontal = "left" if across < n / 3 + 1 / 6 else "right"
        sides.append((vertical, horizontal))
    assert sides == [("bottom", "left"), ("top", "left"), ("top", "right")]


def test_each_plane_is_where_most_voxels_are_wrong() -> None:
    """Only there is the second class predicted at all."""
    truth = cube(24, 4, 20)
    prediction = truth.copy()
    prediction[17, 5:19, 6] = 2
    prediction[17, 6, 5:19] = 2
    prediction[5:19, 6, 6] = 2
    found = where(picture(overlay(prediction, truth, ISO, [1, 2])), colour(1))
    assert all(len(third(found, n)) > 20 for n in range(3))


def test_planes_have_the_shape_they_have_in_mm() -> None:
    truth = np.zeros((40, 40, 10), np.uint8)
    truth[10:30, 10:30, 2:8] = 1
    for mm, shape in ((1.0, 6 / 20), (4.0, 24 / 20)):
        pixels = picture(overlay(truth, truth, (1.0, 1.0, mm), [1]))
        coronal = third(where(pixels, colour(0)), 1) * pixels.shape[:2]
        down, across = np.ptp(coronal, axis=0)
        assert down / across == pytest.approx(shape, rel=0.15)


def test_a_perfect_case_and_an_empty_one_are_drawn_too() -> None:
    image, labels = body_ct(np.random.default_rng(0), size=(32, 32, 32))
    mm = (1.5, 1.5, 1.5)
    assert picture(overlay(labels, labels, mm, range(1, 9), image)).std() > 0.05
    assert overlay(0 * labels, 0 * labels, mm, [1], image)


def test_labels_have_the_colours_of_their_classes_whatever_their_numbers() -> None:
    one = overlay(cube(20, 4, 15), cube(20, 5, 15), ISO, [3, 1])
    other = overlay(200 * cube(20, 4, 15), 200 * cube(20, 5, 15), ISO, [7, 200, 9])
    assert len(where(picture(one), colour(1))) > 100
    assert len(where(picture(other), colour(1))) > 100


def test_after_the_last_colour_comes_the_first_again() -> None:
    assert colours_of(range(15)) == [*COLOURS, *COLOURS[:2]]


# --- distributions


def test_the_distribution_shows_a_dot_for_every_case_and_the_numbers(drawn: list[Any]) -> None:
    rows = [
        row("a", 1, 0.9, 2.0),
        row("b", 1, 0.0, inf, "missed"),
        row("c", 1, nan, nan, "absent"),
        row("a", 2, 0.5, 30.0),
        row("b", 2, 0.6, 0.0),
        row("c", 2, 0.7, 500.0),
    ]
    distribution(rows)
    dice, hd, msd = drawn[0].axes

    def dots(ax: Any) -> list[list[float]]:
        lines = [line for line in ax.lines if line.get_marker() == "o"]
        return [sorted(line.get_xdata()) for line in lines if len(line.get_xdata())]

    assert dots(dice) == [[0.0, 0.9], [0.5, 0.6, 0.7]]
    assert dots(hd) == dots(msd) == [[2.0], [0.0, 30.0, 500.0]]
    assert [text.get_text() for text in dice.texts] == ["n 2", "n 3"]
    assert [text.get_text() for text in hd.texts] == ["n 1, 1 ∞", "n 3"]
    assert hd.get_xlim()[1] > 500
    assert [label.get_text() for label in dice.get_yticklabels()] == ["organ 1", "organ 2"]
    assert [ax.get_title(loc="left") for ax in (dice, hd, msd)] == ["Dice", "HD, mm", "MSD, mm"]


def test_a_distribution_of_nothing_is_drawn_without_a_warning() -> None:
    nothing = [row("a", 1, nan, nan, "absent"), row("a", 2, 0.0, inf, "missed")]
    assert picture(distribution(nothing)).std() > 0
    assert distribution([row("a", 1, 0.9)]) == distribution([row("a", 1, 0.9)])


# --- features


def test_the_curve_of_cka_falls_where_the_values_fall() -> None:
    blue = np.array([0x3F, 0x8E, 0xFC]) / 255
    for values in ([0.9, 0.1], [0.1, 0.9], [math.nan, 0.5]):
        found = where(picture(cka_chart(values, "a.pt\nand b.pt")), blue)
        left = found[found[:, 1] < 0.2]
        right = found[found[:, 1] > 0.9]
        assert len(right)
        if values[0] == values[0]:
            # Rows are counted from the top.
            assert (left[:, 0].mean() < right[:, 0].mean()) == (values[0] > values[1])


def test_each_modality_has_a_colour_at_its_own_points() -> None:
    points = np.array([[-1.0, -1.0], [-1.0, -1.1], [1.0, 1.0]])
    chart = embedding_chart(points, np.array([0.7, 0.3]), ["ct", "ct", "t1"], "a.pt")
    ct = where(picture(chart), np.array([0x3F, 0x8E, 0xFC]) / 255)
    t1 = where(picture(chart), np.array([0xE4, 0x57, 0x2E]) / 255)
    assert ct[:, 1].min() < 0.2 and ct[:, 0].max() > 0.7
    assert t1[:, 1].max() > 0.9 and t1[:, 0].min() < 0.2
