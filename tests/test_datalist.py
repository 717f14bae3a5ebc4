"""dae/data/datalist.py and holdout.py: people's lists load, and subjects are held out."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from dae.data.datalist import (
    Content,
    DataList,
    Item,
    check_all_labelled,
    load,
    split_channels,
)
from dae.data.holdout import (
    five_folds,
    for_evaluation,
    for_pretraining,
    for_segmentation,
    fraction,
    hold_out_fold,
    hold_out_share,
)
from dae.data.leaks import name_of
from dae.errors import InputError

Load = Callable[..., DataList]


@pytest.fixture
def loaded(tmp_path: Path) -> Load:
    """Write a list and load it."""

    def write_and_load(content: object, **keys: str) -> DataList:
        (tmp_path / "list.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
        return load(str(tmp_path / "list.json"), **keys)

    return write_and_load


def entries(count: int, *, images: int = 1, first: int = 0, **keys: Any) -> list[dict[str, Any]]:
    """Some subjects with one or several images each, numbered from `first`."""
    written = []
    for n in range(first, first + count):
        for k in range(images):
            entry = {"image": f"s{n}_{k}.nii.gz", "modality": "ct", "subject": f"s{n}"}
            written.append({**entry, **keys})
    return written


def subjects(items: Iterable[Item]) -> set[str]:
    return {item.subject for item in items}


# --- what loads


def test_a_decathlon_style_list_loads_with_paths_from_its_own_folder(
    loaded: Load, tmp_path: Path
) -> None:
    items = loaded(
        {
            "name": "Spleen",
            "numTraining": 1,
            "labels": {"0": "background", "1": "spleen"},
            "training": [
                {
                    "image": "./imagesTr/a.nii.gz",
                    "label": "./labelsTr/a.nii.gz",
                    "modality": "CT",
                    "subject": 7,
                }
            ],
            "validation": [{"image": "/elsewhere/b.nii.gz", "modality": "ct", "fold": 1}],
            "test": [{"image": "c.nii.gz", "modality": "t2"}],
        },
        root="/",
    )
    (a,) = items.training
    assert a.image == (tmp_path / "imagesTr/a.nii.gz",)
    assert a.label == tmp_path / "labelsTr/a.nii.gz"
    assert (a.modality, a.intensity, a.modality_name) == (("ct",), ("window",), "ct")
    assert (a.subject, a.fold) == ("7", None)

    (b,) = items.validation
    assert (b.image, b.fold, b.label) == ((Path("/elsewhere/b.nii.gz"),), 1, None)

    (c,) = items.test
    assert (c.modality_name, c.intensity) == ("t2", ("mr",))
    assert items.labels == {0: "background", 1: "spleen"}


def test_a_label_by_the_name_ignore_is_no_class(loaded: Load) -> None:
    for labels, ignored in (
        ({"background": 0, "liver": 1, "ignore": 2}, 2),
        ({"0": "background", "1": "liver", "255": "ignore"}, 255),
        ({"background": 0, "liver": 1, "ignore": -1}, -1),
        ({"0": "background", "1": "liver"}, None),
    ):
        items = loaded({"training": entries(5), "labels": labels})
        assert items.labels == {0: "background", 1: "liver"} and items.ignore == ignored
        assert hold_out_share(items).ignore == five_folds(items, fold=0).ignore == ignored


def test_a_tolerance_of_no_class_or_that_is_none_is_refused(loaded: Load) -> None:
    labels = {"background": 0, "liver": 1}
    for tolerance, word in (
        ({"kidney": 1.0}, "'kidney', which is no class"),
        ({"0": 1.0}, "'0', which is no class"),
        ({"liver": -1}, "'liver' is -1"),
        ({"liver": "two"}, "'two'; it must be 0 mm or more"),
        ([1.0], "must be an object"),
    ):
        content = {"training": entries(1), "labels": labels, "tolerance_mm": tolerance}
        line = refusal(loaded, content)
        assert word in line and "tolerance_mm" in line and "list.json" in line


def test_paths_start_from_data_root_where_it_is_given(loaded: Load) -> None:
    items = loaded({"training": entries(1)}, root="/data")
    assert items.training[0].image == (Path("/data/s0_0.nii.gz"),)


def test_bare_file_names_are_items_once_the_modality_is_named(loaded: Load, tmp_path: Path) -> None:
    items = loaded({"training": ["a.nii.gz", "b.nii.gz"]}, modality="ct")
    assert [(item.image, item.modality_name) for item in items.training] == [
        ((tmp_path / "a.nii.gz",), "ct"),
        ((tmp_path / "b.nii.gz",), "ct"),
    ]


def test_an_item_keeps_its_own_modality_when_others_are_named_for(loaded: Load) -> None:
    items = loaded({"training": [{"image": "a", "modality": "t2"}, "b"]}, modality="ct")
    assert [item.modality_name for item in items.training] == ["t2", "ct"]


def test_a_decathlon_list_may_say_the_modality_once_for_all(loaded: Load) -> None:
    """The Decathlon's own dataset.json names each channel at the top, and not in its items."""
    training = [{"image": "a.nii.gz"}]
    one = loaded({"training": training, "modality": {"0": "MRI"}})
    assert one.training[0].modality == ("mr",)
    four = loaded(
        {"training": training, "modality": {"1": "T1w", "0": "FLAIR", "2": "t1gd", "3": "T2w"}}
    )
    assert four.training[0].modality == ("flair", "t1", "t1ce", "t2")


def test_usual_spellings_are_known(loaded: Load) -> None:
    usual = {
        "CT": "ct",
        "T1w": "t1",
        "T1Gd": "t1ce",
        "t1c": "t1ce",
        "T2W": "t2",
        "FLAIR": "flair",
        "T2F": "flair",
        "T2*": "t2s",
        "PD": "pd",
        "MRI": "mr",
    }
    items = loaded(
        {"training": [{"image": f"{n}.nii", "modality": name} for n, name in enumerate(usual)]}
    )
    assert [item.modality_name for item in items.training] == list(usual.values())


def test_a_list_may_declare_a_modality_and_an_item_its_intensity(loaded: Load) -> None:
    content = {
        "modalities": {"PET": "percentile"},
        "training": [
            {"image": "a", "modality": "pet"},
            {"image": "b", "modality": "ct", "intensity": "zscore"},
        ],
    }
    assert [item.intensity for item in loaded(content).training] == [("percentile",), ("zscore",)]


def test_a_list_of_files_is_one_image_of_as_many_channels(loaded: Load, tmp_path: Path) -> None:
    names = ["t1", "t1gd", "t2", "flair"]
    item = loaded(
        {"training": [{"image": [f"{name}.nii" for name in names], "modality": names}]}
    ).training[0]
    assert item.image == tuple(tmp_path / f"{name}.nii" for name in names)
    assert (item.modality_name, item.intensity) == ("t1+t1ce+t2+flair", ("mr",) * 4)


def test_modalities_stand_in_the_authors_order_then_by_name(loaded: Load) -> None:
    """--cmcl ranks counts classes as the authors' code does: CT, T1, T1ce, T2, FLAIR."""
    written = ["xa", "flair", "pet", "t2", "t1ce", "t1", "ct"]
    training = [{"image": name, "modality": name} for name in written]
    items = loaded({"training": training, "modalities": {"pet": "zscore", "xa": "window"}})
    assert items.modalities() == ["ct", "t1", "t1ce", "t2", "flair", "pet", "xa"]


# --- what is refused


@pytest.mark.parametrize(
    "content, said",
    [
        ({"training": ["a.nii.gz"]}, ["training[0]", "a.nii.gz", "--modality"]),
        (
            {"training": [{"image": "a", "modality": "xray"}]},
            ["'xray'", '"modalities": {"xray": "zscore"}'],
        ),
        ({"training": []}, ["no training items"]),
        ({"validation": entries(1)}, ["no training items"]),
        ({"training": [{"modality": "ct"}]}, ["training[0]", '"image"']),
        ({"training": entries(1), "validation": [7]}, ["validation[0]"]),
        ({"training": {"image": "a"}}, ["training"]),
        ({"training": entries(1, intensity="log")}, ["'log'", "percentile"]),
        ({"training": entries(1), "modalities": {"pet": "log"}}, ["'log'"]),
        ({"training": entries(1), "modalities": ["pet"]}, ["modalities"]),
        ({"training": entries(1), "labels": ["background", "spleen"]}, ["labels"]),
        ({"training": entries(1, fold="first")}, ["training[0]", "fold"]),
        (entries(1), ["object"]),
        ('{"training": [', ["not a JSON"]),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_in_one_line(
    content: object, said: list[str], loaded: Load, tmp_path: Path
) -> None:
    line = refusal(loaded, content)
    assert line.startswith(str(tmp_path / "list.json"))
    assert all(words in line for words in said)


def test_regions_without_an_order_are_refused_and_not_dropped(loaded: Load) -> None:
    labels = {"background": 0, "whole tumor": [1, 2, 3]}
    items = loaded({"training": entries(2, label="l.nii.gz"), "labels": labels})
    assert [region.name for region in items.regions] == ["whole tumor"]  # pre-training needs none
    assert "whole tumor" in refusal(check_all_labelled, items, "list.json")


def test_a_name_without_a_label_is_no_class_to_fine_tune_on(loaded: Load) -> None:
    labels = {"background": 0, "liver": 1, "spleen": "organ"}
    items = loaded({"training": entries(2, label="l.nii.gz"), "labels": labels})
    assert not items.regions
    assert "'spleen'" in refusal(check_all_labelled, items, "list.json")


def test_a_path_that_leads_to_no_list_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "--data" in refusal(load, "")
    assert "nowhere.json" in refusal(load, str(tmp_path / "nowhere.json"))
    assert "dataset.json" in refusal(load, str(tmp_path))
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b\x08\x00")
    assert "not a JSON" in refusal(load, str(tmp_path / "a.nii.gz"))


def test_labels_that_say_two_things_are_refused(loaded: Load) -> None:
    for labels, words in (
        ({"liver": 1, "spleen": 1}, ["two names for 1", "spleen", "liver"]),
        ({"1": "kidney", "2": "kidney"}, ['the name "kidney" to 1 and 2']),
        ({"0": "background", "9": "Ignore"}, ['9 "Ignore"', '"ignore" was probably meant']),
    ):
        line = refusal(loaded, {"training": entries(1), "labels": labels})
        assert all(word in line for word in words)


def test_a_swap_of_no_two_classes_is_refused(loaded: Load) -> None:
    labels = {"0": "background", "1": "left lung", "2": "right lung"}
    for swap, words in (
        ([[1, 3]], "names 3, which is no class"),
        ([[0, 1]], "names 0"),
        ([[1, 2], [2, 1]], "has 1 in two places"),
        ([[1, 1]], "has 1 in two places"),
        ([1, 2], "list of pairs"),
    ):
        content = {"training": entries(1), "labels": labels, "swap": swap}
        assert words in refusal(loaded, content)


def test_a_file_that_is_there_twice_is_refused_by_name(loaded: Load) -> None:
    once = entries(2)
    for other in ("s0_0.nii.gz", "./x/../s0_0.nii.gz", ["t2.nii.gz", "s0_0.nii.gz"]):
        again = {"image": other, "modality": "ct", "subject": "s9"}
        line = refusal(loaded, {"training": [*once, again]})
        assert "training[0] and [2] are the same file" in line and "s0_0.nii.gz" in line
    twice = {"image": ["t1.nii.gz", "t1.nii.gz"], "modality": ["t1", "t2"]}
    assert "t1.nii.gz" in refusal(loaded, {"training": [twice]})


def test_a_subject_in_two_folds_is_refused_by_name(loaded: Load) -> None:
    for other, words in ((1, "s0_1.nii.gz in fold 1"), (None, "s0_1.nii.gz in none")):
        items = entries(1, images=2, fold=0)
        items[1]["fold"] = other
        line = refusal(loaded, {"training": items})
        assert "subject s0 is in two folds: s0_0.nii.gz in fold 0" in line and words in line


# --- who is held out


def test_a_validation_split_of_the_list_wins_and_a_flag_that_cannot_act_is_refused(
    loaded: Load,
) -> None:
    items = loaded({"training": entries(4, fold=0), "validation": entries(1, first=4)})
    for choose in (hold_out_share, hold_out_fold):
        assert choose(items) == items
        line = refusal(choose, items, fold=0)
        assert '--fold 0: cannot choose what is held out: the list has a "validation"' in line
        assert "--split-seed 3" in refusal(choose, items, split_seed=3)

    folded = loaded({"training": [*entries(2, fold=0), *entries(2, first=2, fold=1)]})
    assert "--split-seed 3" in refusal(hold_out_fold, folded, split_seed=3)
    assert "--fold 1" in refusal(hold_out_share, loaded({"training": entries(40)}), fold=1)


def test_the_items_of_the_fold_are_held_out(loaded: Load) -> None:
    folds = [*entries(2, fold=0), *entries(3, first=2, fold=1), *entries(1, first=5)]
    items = loaded({"training": folds, "test": entries(1, first=6)})
    for choose in (hold_out_share, hold_out_fold):
        chosen = choose(items, fold=1)
        assert chosen.validation == items.training[2:5]
        assert chosen.training == items.training[:2] + items.training[5:]
        assert (chosen.test, chosen.labels) == (items.test, items.labels)
        assert choose(items) == choose(items, fold=0)
        assert "s5_0.nii.gz" in chosen.notes[0]  # without a fold: always trained on, with a note
        assert "--fold 2: the list has the folds 0, 1" in refusal(choose, items, fold=2)


@pytest.mark.parametrize("count, held", [(2, 1), (20, 1), (40, 2), (100, 5)])
def test_else_five_percent_of_the_subjects_with_all_their_images(
    count: int, held: int, loaded: Load
) -> None:
    """Table 1: a 95-5 split."""
    items = loaded({"training": entries(count, images=3)})
    chosen = hold_out_share(items)
    trained = subjects(chosen.training)
    validated = subjects(chosen.validation)
    assert len(validated) == held and not trained & validated
    assert set(chosen.training) | set(chosen.validation) == set(items.training)
    assert len(chosen.validation) == 3 * held


def folds_of(items: DataList, split_seed: int = 0) -> dict[str, int]:
    """The fold that each subject validates in, which must be one."""
    fold_of: dict[str, int] = {}
    for k in range(5):
        for subject in subjects(five_folds(items, fold=k, split_seed=split_seed).validation):
            assert subject not in fold_of
            fold_of[subject] = k
    return fold_of


def test_a_split_repeats_follows_its_seed_and_not_the_order_of_the_list(loaded: Load) -> None:
    items = loaded({"training": entries(100)})
    turned = loaded({"training": entries(100)[::-1]})
    assert hold_out_share(items) == hold_out_share(items, split_seed=0)
    assert subjects(hold_out_share(items).validation) == subjects(hold_out_share(turned).validation)
    assert len({hold_out_share(items, split_seed=seed).validation for seed in range(5)}) == 5
    assert folds_of(items) == folds_of(turned) != folds_of(items, split_seed=1)
    assert subjects(fraction(items, 0.2).training) == subjects(fraction(turned, 0.2).training)


def test_folds_stay_what_they_are_from_version_to_version(loaded: Load) -> None:
    """The SHA-256 of "folds 0 s7" and so on, in order, cut into five: worked out by itself."""
    names = [f"s{n}" for n in range(12)]
    order = sorted(names, key=lambda name: hashlib.sha256(f"folds 0 {name}".encode()).digest())
    expected: dict[str, int] = {}
    for k, part in enumerate((order[:3], order[3:5], order[5:8], order[8:10], order[10:])):
        expected |= dict.fromkeys(part, k)
    assert folds_of(loaded({"training": entries(12)})) == expected


def test_a_subject_that_joins_leaves_the_others_where_they_are_but_at_the_borders(
    loaded: Load,
) -> None:
    """Sizes differ by one at most, so that a border may move by one; others keep their fold."""
    moved = []
    for count in range(5, 60):
        before = folds_of(loaded({"training": entries(count)}))
        after = folds_of(loaded({"training": entries(count + 1)}))
        sizes = Counter(before.values())
        assert len(sizes) == 5 and max(sizes.values()) - min(sizes.values()) <= 1
        moved.append(sum(before[subject] != after[subject] for subject in before))
        assert all(abs(before[subject] - after[subject]) <= 1 for subject in before)
    assert max(moved) <= 4 and sum(moved) / len(moved) < 2


def test_a_subject_that_joins_puts_at_most_one_other_out_of_a_share(loaded: Load) -> None:
    for count in range(20, 60):
        before = loaded({"training": entries(count)})
        after = loaded({"training": entries(count + 1)})

        held_before = subjects(hold_out_share(before).validation)
        held_after = subjects(hold_out_share(after).validation)
        assert len(held_before - held_after) <= 1 and len(held_after - held_before) <= 1

        smaller: set[str] = set()
        for share in (0.1, 0.2, 0.6, 1.0):
            kept = subjects(fraction(before, share).training)
            assert smaller < kept
            assert len(kept - subjects(fraction(after, share).training)) <= 1
            smaller = kept


def test_a_fold_that_too_few_subjects_leave_empty_is_refused(loaded: Load) -> None:
    items = loaded({"training": entries(3)})
    assert [len(subjects(five_folds(items, fold=k).validation)) for k in range(3)] == [1, 1, 1]
    assert "--fold 3: 3 subjects make 3 folds" in refusal(hold_out_fold, items, fold=3)
    nine = loaded({"training": entries(9)})
    assert "--fold 5: 9 subjects make 5 folds" in refusal(hold_out_fold, nine, fold=5)


def test_a_single_subject_leaves_nothing_to_validate_on(loaded: Load) -> None:
    items = loaded({"training": entries(1, images=3)})
    assert "validation" in refusal(hold_out_share, items)


def test_files_of_one_name_in_different_folders_are_different_subjects(loaded: Load) -> None:
    items = loaded(
        {"training": [{"image": f"s{n}/t1.nii.gz", "modality": "t1"} for n in range(10)]}
    )
    assert len(hold_out_share(items).validation) == 1


# --- one function for each script


def seen(*, held_out: Iterable[str] = (), fold: int = 0) -> dict[str, Any]:
    """What a checkpoint knows, as `leaks.seen_of` gives it."""
    return {"fold": fold, "split_seed": 0, "held_out": [name_of(name) for name in held_out]}


def test_nobody_is_on_both_sides_unless_that_is_meant(loaded: Load) -> None:
    flags: dict[str, Any] = {"fold": None, "split_seed": None}
    other_image = entries(1, images=2)[1:]
    both = loaded({"training": entries(3), "validation": other_image})
    line = refusal(for_pretraining, both, allow_trained=False, **flags)
    assert "subject s0 is on both sides" in line and "validated on" in line
    assert for_pretraining(both, allow_trained=True, **flags).validation == both.validation

    tested = loaded(
        {"training": entries(2), "validation": entries(1, first=2), "test": other_image}
    )
    for_pretraining(tested, allow_trained=False, **flags)  # it tests nothing
    flags["label_fraction"] = 1.0
    line = refusal(for_segmentation, tested, "list.json", allow_trained=False, **flags)
    assert "subject s0 is on both sides" in line and "tested on" in line
    line = refusal(for_segmentation, tested, "list.json", allow_trained=True, **flags)
    assert 'has no "label" in list.json' in line


@pytest.mark.parametrize(
    "one, other", [("P1", "P1 "), ("Müller", unicodedata.normalize("NFD", "Müller")), (7, "7")]
)
def test_subjects_that_differ_by_what_nobody_sees_are_one(
    loaded: Load, one: Any, other: Any
) -> None:
    items = loaded(
        {
            "training": [*entries(2), {"image": "a.nii", "modality": "ct", "subject": one}],
            "validation": [{"image": "b.nii", "modality": "ct", "subject": other}],
        }
    )
    flags: dict[str, Any] = {"fold": None, "split_seed": None, "allow_trained": False}
    assert "is on both sides" in refusal(for_pretraining, items, **flags)


@pytest.mark.parametrize("subject", ["", "  ", float("nan"), 1.5, True, ["a"], {}])
def test_what_is_no_name_of_a_subject_is_refused(loaded: Load, subject: Any) -> None:
    """All images without a name in a table would be one patient."""
    entry = {"image": "a.nii", "modality": "ct", "subject": subject}
    with pytest.raises(InputError, match=r"training\[0\].* subject"):
        loaded({"training": [entry]})


def test_channels_in_two_orders_are_refused(loaded: Load) -> None:
    """A network takes the first channel of each image for the same contrast."""

    def item(name: str, *modality: str) -> dict[str, Any]:
        images = [f"{name}_{contrast}.nii" for contrast in modality]
        return {"image": images, "modality": list(modality), "subject": name}

    mixed = loaded({"training": [item("a", "t1", "t2"), item("b", "t2", "t1"), item("c", "t1")]})
    flags: dict[str, Any] = {"fold": None, "split_seed": None, "allow_trained": False}
    line = refusal(for_pretraining, mixed, **flags)
    assert "b_t2.nii: its channels are t2, t1, and those of" in line and "a_t1.nii t1, t2" in line
    assert refusal(for_segmentation, mixed, "l", label_fraction=1.0, **flags) == line
    for_pretraining(split_channels(mixed), **flags)


def test_a_note_says_where_a_drawn_split_may_divide_a_patient(loaded: Load) -> None:
    flags: dict[str, Any] = {"fold": None, "split_seed": None, "allow_trained": False}
    unnamed = [{"image": f"{n}.nii.gz", "modality": "ct"} for n in range(6)]
    drawn = for_pretraining(loaded({"training": unnamed}), **flags)
    assert 'no "subject" in the list' in drawn.notes[-1] and len(drawn.notes) == 2

    folded = [{**entry, "fold": n % 2} for n, entry in enumerate(unnamed)]
    assert len(for_pretraining(loaded({"training": folded}), **flags).notes) == 1
    assert len(for_pretraining(loaded({"training": entries(6)}), **flags).notes) == 1


def test_a_seed_is_refused_only_where_it_draws_neither_folds_nor_a_fraction(loaded: Load) -> None:
    labels = {"0": "background", "1": "liver"}
    written = [{**entry, "label": f"l{n}.nii.gz"} for n, entry in enumerate(entries(20))]
    drawn = loaded({"training": written, "labels": labels})
    for n, entry in enumerate(written):
        entry["fold"] = n % 5
    folded = loaded({"training": written, "labels": labels})

    flags: dict[str, Any] = {"fold": 1, "allow_trained": False}
    half = for_segmentation(folded, "l", split_seed=3, label_fraction=0.5, **flags)
    assert len(half.training) == 8 and len(half.validation) == 4
    other = for_segmentation(folded, "l", split_seed=4, label_fraction=0.5, **flags)
    assert other.validation == half.validation and other.training != half.training

    line = refusal(for_segmentation, folded, "l", split_seed=3, label_fraction=1.0, **flags)
    assert "--split-seed 3: cannot choose" in line
    whole = for_segmentation(drawn, "l", split_seed=3, label_fraction=1.0, **flags)
    assert whole == five_folds(drawn, fold=1, split_seed=3)


def test_numbers_of_labels_nest_with_each_other_and_with_shares(loaded: Load) -> None:
    labels = {"0": "background", "1": "liver"}
    written = [{**entry, "label": f"l{n}.nii.gz"} for n, entry in enumerate(entries(20))]
    items = loaded({"training": written, "labels": labels})
    flags: dict[str, Any] = {"fold": 1, "split_seed": 3, "allow_trained": False}

    kept = {}
    for count in (1, 5, 8, 16):
        split = for_segmentation(items, "l", label_fraction=1.0, label_count=count, **flags)
        assert split.validation == five_folds(items, fold=1, split_seed=3).validation
        kept[count] = subjects(split.training)
    assert [len(names) for names in kept.values()] == [1, 5, 8, 16]
    assert kept[1] < kept[5] < kept[8] < kept[16]
    half = for_segmentation(items, "l", label_fraction=0.5, **flags)
    assert kept[8] == subjects(half.training)

    line = refusal(for_segmentation, items, "l", label_fraction=1.0, label_count=17, **flags)
    assert line == "--label-count 17: there are 16 subjects to train on"


def test_evaluation_follows_flags_then_whom_the_checkpoint_held_out_then_its_fold(
    loaded: Load,
) -> None:
    items = loaded({"training": entries(20)})
    flags: dict[str, Any] = {"split_seed": None, "older": (), "allow_trained": False}
    held = for_evaluation(items, "l", seen(held_out=["s3", "s9", "gone"]), fold=None, **flags)
    assert subjects(held.validation) == {"s3", "s9"} and len(held.training) == 18

    by_flag = for_evaluation(items, "l", seen(held_out=["s3"]), fold=2, **flags)
    assert by_flag == five_folds(items, fold=2)
    by_fold = for_evaluation(items, "l", seen(held_out=["gone"], fold=1), fold=None, **flags)
    assert by_fold == five_folds(items, fold=1)

    flags["older"] = ("old.pt",)
    line = refusal(for_evaluation, items, "list.json", seen(), fold=None, **flags)
    assert "--checkpoint old.pt: an older version wrote it" in line and "list.json" in line
    assert for_evaluation(items, "l", seen(), fold=1, **flags) == by_fold

    # The folds of a list are what they were for older versions.
    folded = loaded({"training": [*entries(2, fold=0), *entries(2, first=2, fold=1)]})
    held = for_evaluation(folded, "l", seen(fold=1), fold=None, **flags)
    assert subjects(held.validation) == {"s2", "s3"}


# --- which data it is


def test_the_fingerprint_is_that_of_the_contents_in_their_order(loaded: Load) -> None:
    """Not of names, places, sizes or times of files."""
    images = [f"s{n}/t1.nii" for n in range(3)]
    content = [{"image": image, "modality": "t1"} for image in images]
    a, b, c = (Content((voxels,), label, (1.0, 1.0, 1.0)) for voxels, label in ("ax", "by", "cz"))
    items = loaded({"training": content})
    first = items.fingerprint([a, b, c])

    moved = loaded({"training": content}, root="/elsewhere")
    renamed = loaded(
        {"training": [{**entry, "image": f"new{n}.nii"} for n, entry in enumerate(content)]}
    )
    assert first == moved.fingerprint([a, b, c]) == renamed.fingerprint([a, b, c])

    other_modality = loaded({"training": [*content[:2], {**content[2], "modality": "t2"}]})
    other = [
        items.fingerprint([c, b, a]),
        items.fingerprint([a, b]),
        items.fingerprint([a, b], [c]),
        items.fingerprint([a, b, c._replace(label="corrected")]),
        items.fingerprint([a, b, c._replace(image=("d",))]),
        items.fingerprint([a, b, c._replace(spacing=(1.0, 1.0, 2.0))]),
        items.fingerprint([a, b, c], labels=True),
        other_modality.fingerprint([a, b, c]),
    ]
    assert len({first, *other}) == 1 + len(other)
