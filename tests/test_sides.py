"""dae/data/sides.py: left and right are flipped only where that is safe, whatever the names."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refusal

from dae.config.segment import SegConfig
from dae.data.batches import LabelledCrops
from dae.data.cache import Cached
from dae.data.datalist import load
from dae.data.sides import Flips, choose_flips, continued, flips_of, likely_pairs

# As people write them: TotalSegmentator, FreeSurfer, TG-263, MONAI's BTCV list, and by hand.
PAIRS = [
    ("kidney_left", "kidney_right"),
    ("Left-Thalamus", "Right-Thalamus"),
    ("Parotid_L", "Parotid_R"),
    ("L_kidney", "R_kidney"),
    ("leftkidney", "rightkidney"),
    ("LeftLung", "RightLung"),
    ("kidney-left", "kidney-right"),
    ("Kidney (L)", "Kidney (R)"),
    ("lh_hippocampus", "rh_hippocampus"),
    ("ctx-lh-insula", "ctx-rh-insula"),
    ("Lt Lung", "Rt Lung"),
    ("lung.left", "lung.right"),
    ("rein gauche", "rein droit"),
    ("rein g", "rein d"),
    ("Niere links", "Niere rechts"),
    ("Niere li", "Niere re"),
    ("rkid", "lkid"),
    ("rad", "lad"),
    ("LKIDNEY", "RKIDNEY"),
    ("lungl", "lungr"),
    ("kidneyleft", "kidneyright"),
    ("UpperLeftLobe", "UpperRightLobe"),
    ("ctxLhInsula", "ctxRhInsula"),
    ("LEFT KIDNEY", "RIGHT KIDNEY"),
    ("kidneyL", "kidneyR"),
    ("left kidney", "kidney, right"),
    ("Hippocampus_L1", "Hippocampus_R1"),
    ("riñón izquierdo", "riñón derecho"),
    ("rene sinistro", "rene destro"),
    ("vänster njure", "höger njure"),
    ("левая почка", "правая почка"),
    ("左肾", "右肾"),
    ("lung_lower_lobe_left", "lung_lower_lobe_right"),
]
BTCV_NAMES = "spleen rkid lkid gall eso liver sto aorta IVC veins pancreas rad lad"
BTCV = dict(enumerate(["background", *BTCV_NAMES.split()]))
WITHOUT_SIDES = [
    ["liver", "spleen"],
    ["tumour"],
    ["1"],
    ["edema", "non-enhancing tumor", "enhancing tumor"],
    ["kidney", "tumor", "cyst"],
    ["bright lesion", "cleft lip"],
    ["vertebrae_L1", "vertebrae_L2", "vertebrae_L3"],
    ["lungs (left and right)", "heart"],
    ["RV myocardium", "aorta"],
    [
        "External Cerebrospinal Fluid",
        "Grey Matter",
        "White Matter",
        "Ventricles",
        "Cerebellum",
        "Deep Grey Matter",
        "Brainstem",
    ],
]


def classes(*names: str) -> dict[int, str]:
    return dict(enumerate(["background", *names]))


@pytest.mark.parametrize("names", PAIRS, ids=" / ".join)
def test_a_pair_is_known_however_it_is_written_and_stops_left_right_flips(
    names: tuple[str, str],
) -> None:
    for one, other in (names, names[::-1]):
        organs = classes("liver", one, other)
        assert likely_pairs(organs) == [(2, 3)]

        flips = choose_flips(organs, None)
        assert flips.axes == (1, 2) and not flips.swap
        assert repr(one) in flips.reason and repr(other) in flips.reason
        assert '"swap": [[2, 3]]' in flips.reason


def test_the_pairs_of_a_well_known_list_are_named_with_the_line_to_add() -> None:
    flips = choose_flips(BTCV, None)
    assert flips.axes == (1, 2)
    assert "'rkid' and 'lkid', 'rad' and 'lad' look like pairs" in flips.reason
    assert '"swap": [[2, 3], [12, 13]]' in flips.reason and '"swap": []' in flips.reason


def test_a_class_is_in_one_pair_at_most() -> None:
    """So that the line to add is one that may be added."""
    organs = classes("left lung", "right lung", "R lung", "l lung", "liver")
    assert likely_pairs(organs) == [(1, 2), (3, 4)]
    assert choose_flips(organs, ((1, 2), (3, 4))).axes == (0, 1, 2)


def test_nothing_is_flipped_where_the_chance_is_0() -> None:
    for swap in (None, (), ((2, 3), (12, 13))):
        assert choose_flips(BTCV, swap, chance=0.0)[:3] == ((), (), ())
    assert "no flips: --flip is 0" in str(choose_flips(BTCV, None, chance=0.0))


@pytest.mark.parametrize("names", WITHOUT_SIDES, ids=str)
def test_all_axes_are_flipped_where_no_two_classes_can_be_a_pair(names: list[str]) -> None:
    for turned in (False, True):
        flips = choose_flips(classes(*names), None, turned=turned)
        assert flips.axes == (0, 1, 2) and "no names of two classes were recognised" in str(flips)


@pytest.mark.parametrize(
    "names",
    [
        ["left atrium", "aorta"],
        ["Atrium_L"],
        ["leftatrium"],
        ["heart_atrium_left"],
        ["1", "2"],
        ["class 1", "class 2", "class 3"],
        ["organ a", "organ b"],
        ["kidney 1", "kidney 2", "liver"],
        ["", ""],
    ],
    ids=str,
)
def test_one_side_alone_and_names_that_do_not_tell_stop_them_too(names: list[str]) -> None:
    flips = choose_flips(classes(*names), None)
    assert flips.axes == (1, 2) and '"swap"' in flips.reason and repr(names[0]) in flips.reason
    assert choose_flips(classes(*names), ()).axes == (0, 1, 2)  # the list decides


def test_the_list_decides_which_labels_change_places() -> None:
    flips = choose_flips(BTCV, ((2, 3), (12, 13)))
    assert flips[:3] == ((0, 1, 2), ((2, 3), (12, 13)), (0,))
    assert "'rkid' and 'lkid', 'rad' and 'lad' change places" in flips.reason
    assert "does not name" not in flips.reason
    assert "does not name 'rad' and 'lad'" in choose_flips(BTCV, ((3, 2),)).reason
    assert choose_flips(BTCV, ())[:3] == ((0, 1, 2), (), ())


def test_where_crops_are_turned_a_front_back_flip_is_one_of_left_and_right() -> None:
    """By 180 degrees in the axial plane: tests/test_augment.py holds both against images."""
    assert choose_flips(BTCV, None, turned=True).axes == (2,)
    assert choose_flips(BTCV, ((2, 3), (12, 13)), turned=True).swap_axes == (0, 1)


def test_a_swap_of_what_is_no_class_or_of_one_class_twice_is_refused() -> None:
    for swap, word in (
        (((2, 99),), "label 99"),
        (((0, 2),), "label 0"),
        (((2, 3), (3, 4)), "label 3 twice"),
        (((2, 2),), "label 2 twice"),
    ):
        assert word in refusal(choose_flips, BTCV, swap)


def test_a_list_that_swaps_nothing_is_told_from_one_that_does_not_say(tmp_path: Path) -> None:
    content: dict[str, Any] = {"training": [{"image": "a.nii", "modality": "ct"}]}
    for given, expected in (({}, None), ({"swap": []}, ()), ({"swap": [[2, 3]]}, ((2, 3),))):
        (tmp_path / "list.json").write_text(json.dumps({**content, **given}))
        assert load(str(tmp_path / "list.json")).swap == expected


# --- checkpoints


def test_a_plan_says_which_flips_were_trained_with_also_one_of_before() -> None:
    now = {
        "flip_axes": [0, 1, 2],
        "swap": [[2, 3]],
        "swap_axes": [0, 1],
        "flips": "as the list says",
    }
    assert flips_of(now, {"flip": 0.2}) == ((0, 1, 2), ((2, 3),), (0, 1), "as the list says")
    before = {"flip_axes": [0, 1, 2], "swap": [[2, 3]]}
    assert flips_of(before, {"flip": 0.2})[:3] == ((0, 1, 2), ((2, 3),), (0,))
    assert flips_of(before, {"flip": 0.0})[:3] == ((), (), ())
    assert flips_of({"flip_axes": [1, 2]}, {})[:3] == ((1, 2), (), ())


def test_a_run_goes_on_as_it_began_unless_that_is_known_to_be_wrong() -> None:
    path = Path("last.pt")
    now = choose_flips(BTCV, None, turned=True)
    assert continued(now, now, path) == now

    began = Flips((1, 2), (), (), "")
    resumed = continued(now, began, path)
    assert resumed[:3] == began[:3] and "as the run began" in resumed.reason

    began = Flips((0, 1, 2), (), (), "")
    line = refusal(continued, now, began, path)
    assert line.startswith("last.pt: the run so far flipped left and right; ")
    assert "'rkid' and 'lkid'" in line

    decided = choose_flips(BTCV, (), turned=True)  # the list says that it does not matter
    assert continued(decided, began, path) == decided


def test_training_crops_are_flipped_as_was_chosen(tmp_path: Path) -> None:
    """A class on either side of a crop that is the whole volume."""
    label = np.zeros((4, 4, 4), np.uint8)
    label[0] = 1
    label[3] = 2
    np.save(tmp_path / "label.npy", label)
    np.save(tmp_path / "image.npy", label[None].astype(np.float16))
    np.save(tmp_path / "foreground.npy", np.zeros((1, 3), np.int32))
    volume = Cached(tmp_path, (1, 4, 4, 4), (0.0,), (1.0, 1.0, 1.0))
    still = dict.fromkeys(("rotate", "zoom", "brightness", "contrast", "noise"), 0.0)
    config = SegConfig(crop=(4, 4, 4), flip=1.0, **still)
    for flips, left in (
        (Flips((), (), (), ""), 1),
        (Flips((0,), (), (), ""), 2),
        (Flips((0,), ((1, 2),), (0,), ""), 1),
        (Flips((0, 1), ((1, 2),), (0, 1), ""), 2),
    ):
        crops = LabelledCrops(
            [volume],
            [0, 1, 2],
            config.crop,
            seed=0,
            global_batch=1,
            positive=0.5,
            chances=config,
            flips=flips,
        )
        assert int(crops[0, 0][1][0, 0, 0]) == left


@pytest.mark.parametrize(
    "left, right",
    [
        ("vänster njure", "höger njure"),
        ("левый", "правый"),
        ("왼쪽 신장", "오른쪽 신장"),
    ],
)
def test_names_are_read_alike_in_every_unicode_form(left: str, right: str) -> None:
    """A Mac splits letters from their marks (NFD); a wide keyboard writes full-width letters."""
    for form in ("NFC", "NFD"):
        names = {1: unicodedata.normalize(form, left), 2: unicodedata.normalize(form, right)}
        assert likely_pairs(names) == [(1, 2)], form
    assert likely_pairs({1: "ＬＥＦＴ kidney", 2: "ＲＩＧＨＴ kidney"}) == [(1, 2)]


# --- regions


def test_labels_of_one_region_are_no_pair_and_two_regions_may_be_one() -> None:
    """Labels have the name of their region, so that several may have the same."""
    both = choose_flips({0: "background", 1: "kidneys", 2: "kidneys"}, None)
    assert both.axes == (0, 1, 2)
    nested = choose_flips({0: "background", 1: "tumour", 2: "core", 3: "core"}, None)
    assert nested.axes == (0, 1, 2)

    apart = choose_flips({0: "background", 1: "kidney 1", 2: "kidney 1", 3: "kidney 2"}, None)
    assert apart.axes == (1, 2) and "[[1, 3]]" in apart.reason
    sides = choose_flips(dict(enumerate(["", "left lung", "left lung", "right lung"])), None)
    assert sides.axes == (1, 2)


def test_a_region_that_names_a_side_counts_where_all_its_labels_have_smaller_regions() -> None:
    """Left lung 1 and 2, right lung 3 and 4, and each label a region of its own within."""
    labels = dict(enumerate(["background", "apex", "base", "hilum", "cyst"]))
    regions = ["left lung", "right lung", "apex", "base", "hilum", "cyst"]
    assert choose_flips(labels, None).axes == (0, 1, 2)
    flips = choose_flips(labels, None, regions=regions)
    assert flips.axes == (1, 2) and "'left lung' names a side" in flips.reason
    assert choose_flips(labels, (), regions=regions).axes == (0, 1, 2)
