"""dae/data/regions.py: regions are read, refused, and label maps come back from them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refusal

from dae.data.datalist import DataList, check_all_labelled, load
from dae.data.regions import (
    Region,
    check_same,
    from_plan,
    membership,
    mirrored,
    names_of_labels,
    to_plan,
    write_regions,
)

LABELS: dict[str, Any] = {
    "background": 0,
    "whole tumour": [1, 2, 3],
    "tumour core": [3, 1],
    "enhancing": 3,
}
ORDER = [2, 1, 3]
BRATS = (
    Region("whole tumour", (1, 2, 3), 2),
    Region("tumour core", (1, 3), 1),
    Region("enhancing", (3,), 3),
)

Load = Callable[..., DataList]


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """The list of two labelled items with these labels, as it is loaded."""

    def write_and_load(labels: Any = LABELS, order: Any = ORDER, **more: Any) -> DataList:
        items = [{"image": f"{n}.nii", "modality": "t1", "label": f"{n}_s.nii"} for n in "ab"]
        content = {"training": items, "labels": labels, "regions_class_order": order, **more}
        if order is None:
            del content["regions_class_order"]
        path = tmp_path / "list.json"
        path.write_text(json.dumps(content))
        return load(str(path))

    return write_and_load


def there_and_back(regions: tuple[Region, ...], labels: np.ndarray) -> np.ndarray:
    """Label map -> regions, by hand -> label map."""
    inside = np.stack([np.isin(labels, region.labels) for region in regions])
    written = [region.written for region in regions]
    return write_regions(torch.from_numpy(inside), written).numpy()


# --- read


def test_a_list_with_several_labels_of_a_name_is_one_of_regions(loaded: Load) -> None:
    items = loaded()
    assert items.regions == BRATS
    check_all_labelled(items, "list.json")


def test_each_label_has_the_name_of_the_last_of_its_regions(loaded: Load) -> None:
    items = loaded()
    assert items.labels == {
        0: "background",
        1: "tumour core",
        2: "whole tumour",
        3: "enhancing",
    }
    assert list(items.labels) == [0, 1, 2, 3]


def test_an_nnunet_folder_says_the_same(tmp_path: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    (tmp_path / "imagesTr/a_0000.nii.gz").touch()
    (tmp_path / "labelsTr/a.nii.gz").touch()
    dataset = {"channel_names": {"0": "T1"}, "labels": LABELS, "regions_class_order": ORDER}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    assert load(str(tmp_path)).regions == BRATS


def test_what_was_not_annotated_is_no_region(loaded: Load) -> None:
    items = loaded({**LABELS, "ignore": 9})
    assert items.regions == BRATS and items.ignore == 9 and 9 not in items.labels


def test_one_list_of_one_label_makes_a_task_of_regions(loaded: Load) -> None:
    items = loaded({"background": 0, "liver": [1], "tumour": 2}, [1, 2])
    assert [region.labels for region in items.regions] == [(1,), (2,)]


def test_a_region_may_have_a_number_for_a_name(loaded: Load) -> None:
    numbered = {"0": "background", "1": [1, 2, 3], "2": [3]}
    assert loaded(numbered, [1, 3]).regions == (Region("1", (1, 2, 3), 1), Region("2", (3,), 3))
    (one,) = loaded({"background": 0, "4": [1, 2]}, [2], tolerance_mm={"4": 3}).regions
    assert one == Region("4", (1, 2), 2)
    assert "gives '1' 'liver'" in refusal(loaded, {"0": "background", "1": ["liver"]}, [1])


def test_a_list_of_classes_has_no_regions_whatever_its_order_says(loaded: Load) -> None:
    for labels in ({"0": "background", "1": "liver"}, {"background": 0, "liver": 1}):
        items = loaded(labels, [1])
        assert not items.regions and items.labels == {0: "background", 1: "liver"}


def test_regions_make_another_fingerprint_and_classes_the_one_they_had(loaded: Load) -> None:
    whole = loaded({"background": 0, "a": [1, 2], "b": [2]}, [1, 2])
    apart = loaded({"background": 0, "a": [1], "b": [2]}, [1, 2])
    assert whole.labels == apart.labels
    assert whole.fingerprint([], labels=True) != apart.fingerprint([], labels=True)

    classes = loaded({"background": 0, "a": 1, "b": 2})
    assert classes.fingerprint([], labels=True) == "voxels 5abc7caa0622495ded18"


def test_a_region_has_its_own_tolerance_by_its_name_alone(loaded: Load) -> None:
    assert loaded(tolerance_mm={"enhancing": 2}).tolerance == {3: 2.0}
    assert loaded(tolerance_mm={"whole tumour": 3}).tolerance == {1: 3.0}
    assert "'2'" in refusal(loaded, tolerance_mm={"2": 3})  # label 2, or the second region?


# --- refused


@pytest.mark.parametrize(
    "labels, order, said",
    [
        ({**LABELS, "none": []}, [*ORDER, 1], ["'none'", "no label"]),
        ({**LABELS, "all": [2, 1, 3]}, [*ORDER, 1], ["'whole tumour' and 'all'", "1, 2, 3"]),
        ({**LABELS, "air": [0, 1]}, [*ORDER, 1], ["'air'", "0", "1 to 255"]),
        ({**LABELS, "far": [256]}, [*ORDER, 256], ["'far'", "256"]),
        ({**LABELS, "half": [1.5]}, [*ORDER, 1], ["'half'", "1.5"]),
        ({**LABELS, "true": [True]}, [*ORDER, 1], ["'true'", "True"]),
        ({**LABELS, "none": False}, [*ORDER, 1], ["none", "False"]),
        ({**LABELS, "2": "tumour core"}, [*ORDER, 2], ["'tumour core' to two regions"]),
        ({**LABELS, "rest": "other"}, [*ORDER, 1], ["'rest'", "'other'"]),
        ({**LABELS, "ignore": [8, 9]}, ORDER, ['"ignore"', "one label"]),
        ({**LABELS, "ignore": 2}, ORDER, ['calls 2 "ignore"', "'whole tumour'"]),
        ({**LABELS, "Ignored": [9]}, [*ORDER, 9], ['"ignore" was probably meant']),
        (LABELS, [2, 1], ["3 labels", "whole tumour, tumour core, enhancing", "it has 2"]),
        (LABELS, [2, 1, 3, 3], ["it has 4"]),
        (LABELS, {"a": 1}, ["regions_class_order", "3 labels"]),
        (LABELS, [2, 1, 7], ["'enhancing' as 7", "none of its labels (3)"]),
        (LABELS, [2, 2, 3], ["'tumour core' as 2", "none of its labels (1, 3)"]),
        (LABELS, [2, 1, True], ["'enhancing' as True"]),
        (LABELS, [1, 1, 3], ["label 2 would become 1", "'whole tumour'"]),
        (LABELS, [2, 3, 3], ["label 1 would become 3", "'tumour core'"]),
    ],
)
def test_what_is_no_task_of_regions_is_refused_in_one_line(
    labels: Any, order: Any, said: list[str], loaded: Load, tmp_path: Path
) -> None:
    line = refusal(loaded, labels, order)
    assert line.startswith(str(tmp_path / "list.json"))
    assert all(words in line for words in said), line


def test_a_smaller_region_that_comes_before_a_larger_one_is_lost_and_named(loaded: Load) -> None:
    backwards = dict(reversed(LABELS.items()))
    line = refusal(loaded, backwards, [3, 1, 2])
    assert "label 1 would become 2" in line and "'whole tumour'" in line


def test_two_regions_that_cross_cannot_be_told_apart_by_two_labels(loaded: Load) -> None:
    """Label 2 is in both, so that 3, in the second alone, is written as 2 is."""
    labels = {"background": 0, "a": [1, 2], "b": [2, 3]}
    assert "label 3 would become 2" in refusal(loaded, labels, [1, 2])
    assert "label 2 would become 3" in refusal(loaded, labels, [1, 3])


def test_without_an_order_a_list_is_scored_and_pretrained_on_but_not_fine_tuned(
    loaded: Load,
) -> None:
    items = loaded(order=None)
    assert [region.labels for region in items.regions] == [(1, 2, 3), (1, 3), (3,)]
    line = refusal(check_all_labelled, items, "list.json")
    assert "regions_class_order" in line and "tumour core" in line


def test_a_list_of_other_regions_than_the_networks_is_refused() -> None:
    check_same(BRATS, BRATS, "x.json")
    capitals = [region._replace(name=region.name.upper()) for region in BRATS]
    check_same(capitals[::-1], BRATS, "x.json")  # the order of a list is no matter here

    other = [BRATS[0], BRATS[1]._replace(labels=(1,)), BRATS[2]]
    line = refusal(check_same, other, BRATS, "x.json")
    assert "x.json" in line and "tumour core (1)," in line and "tumour core (1, 3)" in line
    two = (Region("Core", (1, 3), 1), Region("core", (3,), 3))
    check_same(two[::-1], two, "x.json")
    assert "Core (1)" in refusal(check_same, (Region("Core", (1,), 1), two[1]), two, "x.json")
    assert "no regions" in refusal(check_same, (), BRATS, "x.json")
    assert "no regions" in refusal(check_same, BRATS, (), "x.json")


def test_a_swap_that_leaves_no_regions_is_known_before_a_run(loaded: Load) -> None:
    line = refusal(check_all_labelled, loaded(swap=[[1, 2]]), "list.json")
    assert line.startswith("list.json") and "'tumour core' into labels 2, 3" in line
    apart = loaded({"background": 0, "l": [1], "r": 2, "m": 3}, [1, 2, 3], swap=[[1, 2]])
    check_all_labelled(apart, "list.json")


# --- there and back


def test_every_label_comes_back_from_its_regions() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7), np.uint8)
    assert (there_and_back(BRATS, labels) == labels).all()


def test_an_order_is_taken_if_and_only_if_every_region_comes_back(loaded: Load) -> None:
    """All orders of all regions of three labels, in every sequence of three of them."""
    unions: list[list[int]] = []
    for n in (1, 2, 3):
        unions += [list(labels) for labels in itertools.combinations((1, 2, 3), n)]

    taken = 0
    for a, b, c in itertools.permutations(unions, 3):
        for order in itertools.product(a, b, c):
            labels = {"background": 0, "a": a, "b": b, "c": c}
            values = np.unique([*a, *b, *c]).astype(np.uint8)
            regions = tuple(Region(n, tuple(r), o) for n, r, o in zip("abc", (a, b, c), order))
            again = there_and_back(regions, values)
            if (membership(regions, again) == membership(regions, values)).all():
                assert loaded(labels, list(order)).regions == regions
                taken += 1
            else:
                assert "would become" in refusal(loaded, labels, list(order))
    assert taken > 50


def test_labels_of_the_same_regions_may_be_written_as_one_of_them(loaded: Load) -> None:
    """As nnU-Net allows it: both kidneys as one thing, and a tumour of two labels within."""
    one = loaded({"background": 0, "kidneys": [1, 2]}, [2])
    assert one.regions == (Region("kidneys", (1, 2), 2),)
    two = {"background": 0, "kidneys": [1, 2, 3, 4], "tumour": [3, 4]}
    assert [region.written for region in loaded(two, [1, 3]).regions] == [1, 3]
    assert "label 1 would become 3" in refusal(loaded, two, [3, 3])


def test_later_regions_are_written_over_earlier_ones_even_outside_of_them() -> None:
    """What is enhancing and outside of the whole tumour becomes both, as nnU-Net writes it."""
    inside = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert write_regions(inside, [2, 1, 3]).tolist() == [2, 1, 3, 1]


def test_membership_is_a_line_of_labels_for_each_region() -> None:
    table = membership(BRATS, [0, 1, 2, 3])
    assert table.astype(int).tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


def test_a_plan_keeps_regions_and_their_order_and_has_none_of_classes() -> None:
    plan = json.loads(json.dumps(to_plan(BRATS)))
    assert plan["regions_class_order"] == ORDER
    assert from_plan(plan) == BRATS
    assert to_plan(()) == {} and from_plan({"classes": {"0": "background"}}) == ()


# --- left and right


def test_regions_change_places_where_their_labels_do() -> None:
    kidneys = (
        Region("left kidney", (1, 2), 1),
        Region("left tumour", (2,), 2),
        Region("right kidney", (3, 4), 3),
        Region("right tumour", (4,), 4),
        Region("both tumours", (2, 4), 2),
    )
    assert mirrored(kidneys, [(1, 3), (2, 4)], "x") == [(0, 2), (1, 3)]
    assert mirrored(kidneys, [], "x") == []
    assert "'left kidney'" in refusal(mirrored, kidneys, [(1, 3)], "list.json")


def test_names_of_labels_of_a_region_that_is_nowhere_last() -> None:
    regions = (Region("both", (1, 2), 1), Region("a", (1,), 1), Region("b", (2,), 2))
    assert names_of_labels(regions) == {1: "a", 2: "b"}
    assert (there_and_back(regions, np.array([0, 1, 2], np.uint8)) == [0, 1, 2]).all()
