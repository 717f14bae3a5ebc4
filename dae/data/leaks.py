"""Who was trained on: nobody may be on both sides of a split, and checkpoints know whom they saw.

A patient is known by the `subject` of the list, an image by its path and by its voxels, whatever
the name of its file. A checkpoint keeps hashes of both, so that it names nobody.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from dae.data.datalist import Content, DataList, Item
from dae.data.listfile import read_json
from dae.data.nifti import read_channels
from dae.errors import InputError

PREDICTED = "predicted.json"  # beside predictions
Seen = Mapping[str, Any]  # what a checkpoint says of its training; see `seen_by`
Plan = Mapping[str, Any]  # of a checkpoint, which has `seen`, `pretrained_on`, both, or none
Identity = Literal["image", "subject", "label"]  # what an item can have in common with another

# The last words of the names of files that are images of one patient, in small letters.
CONTRASTS = (
    "t1 t1w t1n t1c t1ce t1gd t1km t2 t2w t2f t2s t2star flair pd pdw mr mri ct ncct cta pet suv "
    "dwi adc swi mra dce image img scan volume"
)


# The end of such a name that counts the visits of one patient.
VISIT = re.compile(r"_(ses|session|visit|timepoint|tp|day|week|month|year)_?\d+$")


# --- hashes


def hash_of(array: NDArray[Any]) -> str:
    """Of size and values, plane by plane, so that no copy of the whole array is made."""
    digest = hashlib.sha256(str((array.shape, array.dtype.str)).encode())
    for plane in array:
        # The bits of -0 are not those of 0; their sum is 0.
        digest.update((plane + array.dtype.type(0)).tobytes())
    return digest.hexdigest()[:20]


def hashes_of(image: NDArray[np.float32]) -> tuple[str, ...]:
    """Of each channel of (c, d, h, w), values as they were read."""
    return tuple(hash_of(channel) for channel in image)


def name_of(subject: str) -> str:
    """The hash that a checkpoint keeps for a subject of the list."""
    return hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:20]


# --- both sides of a split


def check_sides(items: DataList, *, test: bool = False) -> None:
    """Nobody is trained on and validated on too, nor, with `test`, tested on.

    Looks at subjects, paths of images and paths of labels; `check_voxels` at what the files hold.
    Raises InputError that names the files.
    """
    for identity in get_args(Identity):
        check_side(items.training, items.validation, identity, "validated on")
        if test:
            check_side(items.training, items.test, identity, "tested on")


def check_side(
    training: Sequence[Item], others: Sequence[Item], identity: Identity, done: str
) -> None:
    trained: dict[str, Item] = {}
    for item in training:
        for name in names_of(item, identity):
            trained[name] = item

    for item in others:
        for name in names_of(item, identity):
            if name in trained:
                refuse_both_sides(
                    f"{identity} {name} is on both sides: {trained[name].image[0]} is trained on, "
                    f"{item.image[0]} {done}"
                )


def names_of(item: Item, identity: Identity) -> list[str]:
    """The paths of its images, its subject, or the path of its label."""
    if identity == "image":
        return [os.path.normpath(file) for file in item.image]
    if identity == "subject":
        return [item.subject]
    return [os.path.normpath(item.label)] if item.label else []


def check_voxels(items: Sequence[Item], contents: Sequence[Content], *, trained: int) -> None:
    """No image has the voxels of one on the other side. Raises InputError that names both files.

    The first `trained` items are trained on, the others validated on; `contents` is what the files
    of each item hold.
    """
    trained_on: dict[str, Item] = {}
    for item, content in zip(items[:trained], contents):
        for voxels in content.image:
            trained_on[voxels] = item

    for item, content in zip(items[trained:], contents[trained:]):
        for voxels in content.image:
            if voxels in trained_on:
                refuse_both_sides(
                    f"{trained_on[voxels].image[0]}, trained on, and {item.image[0]}, "
                    "validated on, hold the same image"
                )


def refuse_both_sides(what: str) -> NoReturn:
    raise InputError(
        f'{what}; keep all images of a patient on one side, under one "subject", '
        "or pass --allow-trained if this is meant"
    )


def with_doubts(items: DataList, *, drawn: bool) -> DataList:
    """The list with what `doubts` says of it among its notes."""
    doubt = doubts(items, drawn=drawn)
    return replace(items, notes=(*items.notes, doubt)) if doubt else items


def doubts(items: DataList, *, drawn: bool) -> str:
    """A line on patients who may be on both sides because the list does not name them, or "".

    `drawn`: the split was drawn by us, and not by whoever wrote the list.
    """
    trained = [item for item in items.training if is_unsure(items, item)]
    validated = [item for item in items.validation if is_unsure(items, item)]

    # Names of files that look like one patient's.
    trained_patients = {patient_of(item): item for item in trained}
    alike = [item for item in validated if patient_of(item) in trained_patients]
    if alike:
        name = alike[0].image[0].name
        like = trained_patients[patient_of(alike[0])].image[0].name
        count = f" ({len(alike)} such images)" if len(alike) > 1 else ""
        taken = 'Without "subject" in the list each image is taken for a patient of its own'
        if items.names_cases:
            taken = "Each case is taken for a patient of its own; splits_final.json may say more"
        return f"warning: {like} is trained on and {name} validated on: one patient?{count} {taken}"

    # Whoever wrote a split knows the patients; a split that we draw may divide one.
    unnamed = [item for item in (*trained, *validated) if not item.subject_named]
    if drawn and unnamed:
        names = " and ".join(item.image[0].name for item in unnamed[:2])
        return (
            f'no "subject" in the list for {names}: each image is taken for a patient of its own; '
            "name the subjects where a patient has several"
        )
    return ""


def is_unsure(items: DataList, item: Item) -> bool:
    """Whether two images that are taken for two patients may be one's."""
    return items.names_cases or not item.subject_named


def patient_of(item: Item) -> str:
    """A guess from the file's name: the words before the contrast, or the folder without any."""
    file = item.image[0]
    # BIDS: sub-01_ses-1_T1w. What begins with a digit is no part of it: sub-FETA_000 is a case.
    bids = re.match(r"(sub-[A-Za-z0-9]+)_[A-Za-z]", file.name)
    if bids:
        return bids[1]

    stem = file.name.lower().removesuffix(".gz").removesuffix(".nii")
    words = re.split(r"[_\-. ]+", stem)

    # nnU-Net's number of a channel comes after the number of the case.
    if re.fullmatch(r"000\d", words[-1]) and re.search(r"\d", "".join(words[:-1])):
        words.pop()
    while words and words[-1] in CONTRASTS.split():
        words.pop()
    return f"{file.parent}/{VISIT.sub('', '_'.join(words))}"


# --- what a checkpoint knows


def seen_by(
    items: DataList,
    training: Sequence[Content],
    *,
    fold: int,
    split_seed: int,
    before: Seen | None = None,
) -> dict[str, Any]:
    """For a checkpoint: hashes of those trained on and held out, and the flags that chose them.

    `before` is what the weights that the run started from had seen, which they still know.
    """
    before = before or {}
    trained = {name_of(item.subject) for item in items.training}
    held_out = {name_of(item.subject) for item in items.validation}
    voxels: set[str] = set()
    for content in training:
        voxels.update(content.image)
    return {
        "fold": fold,
        "split_seed": split_seed,
        "trained": sorted(trained.union(before.get("trained", ()))),
        "held_out": sorted(held_out),
        "voxels": sorted(voxels.union(before.get("voxels", ()))),
    }


def known_before(items: DataList, validated: Sequence[Content], before: Seen | None) -> list[str]:
    """A line, or none, on those who validate and whom the starting weights were trained on.

    `validated` is what the files hold that validate, in their order. Images are known by voxels or
    by subject.
    """
    before = before or {}
    voxels = set(before.get("voxels", ()))
    known = set(trained_among(items.validation, before))
    for n, content in enumerate(validated):
        if voxels & set(content.image):
            known.add(n)

    if not known:
        return []
    first = items.validation[min(known)].image[0].name
    line = (
        f"warning: the weights were trained on {len(known)} of the images that validate, "
        f"as {first}: their Dice says nothing of new ones"
    )
    return [line]


def seen_of(
    saved: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What several checkpoints know together: whom any was trained on, and whom all held out.

    Also the names of those that older versions wrote, which know their fold and no subject.
    """
    known: list[Mapping[str, Any]] = [state["plan"].get("seen", {}) for state in saved]
    trained: set[str] = set()
    voxels: set[str] = set()
    held_out = set(known[0].get("held_out", ()))
    for seen in known:
        trained.update(seen.get("trained", ()))
        voxels.update(seen.get("voxels", ()))
        held_out.intersection_update(seen.get("held_out", ()))

    # The flags are those of the first; an older version has them in its configuration alone.
    flags = known[0] or saved[0].get("config", {})
    together = {
        "fold": flags.get("fold", 0),
        "split_seed": flags.get("split_seed", 0),
        "trained": sorted(trained),
        "held_out": sorted(held_out),
        "voxels": sorted(voxels),
    }
    older = [name for name, seen in zip(names, known) if not seen]
    return together, older


def trained_among(items: Sequence[Item], seen: Seen) -> list[int]:
    """Indices of the items whose subject a checkpoint was trained on."""
    names = set(seen.get("trained", ()))
    return [n for n, item in enumerate(items) if name_of(item.subject) in names]


def is_among(hashes: Sequence[str], seen: Seen) -> bool:
    """Whether an image with these `hashes_of` its channels was seen, by whatever name."""
    return not set(seen.get("voxels", ())).isdisjoint(hashes)


# --- what pre-training has seen

# A checkpoint of pre-training keeps this apart from `seen`: a volume that was seen without its
# label is none that predictions must refuse. A run that fine-tunes the weights keeps it too.


def pretrained_on(
    items: DataList, training: Sequence[Content], before: Plan | None = None
) -> dict[str, list[str]]:
    """For a checkpoint: hashes of the voxels that were trained on, and of the subjects by name.

    `before` is the plan of the weights that the run started from, which know what they have seen.
    """
    voxels = voxels_known(before or {})
    for content in training:
        voxels.update(content.image)
    subjects = subjects_known(before or {})
    subjects.update(name_of(item.subject) for item in items.training if item.subject_named)
    return {"subjects": sorted(subjects), "voxels": sorted(voxels)}


def says_what_it_saw(plan: Plan) -> bool:
    """Whether a checkpoint tells what it was trained on. Older and foreign ones do not."""
    return "pretrained_on" in plan or "seen" in plan


def voxels_known(plan: Plan) -> set[str]:
    """Hashes of all that weights were trained on, with labels or without."""
    pretrained = plan.get("pretrained_on", {})
    return {*pretrained.get("voxels", ()), *plan.get("seen", {}).get("voxels", ())}


def subjects_known(plan: Plan) -> set[str]:
    """Hashes of the names of their subjects."""
    pretrained = plan.get("pretrained_on", {})
    return {*pretrained.get("subjects", ()), *plan.get("seen", {}).get("trained", ())}


def seen_unlabelled(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """What some checkpoints were pre-trained on, and none of them trained on with its label."""
    pretrained: set[str] = set()
    trained: set[str] = set()
    for plan in plans:
        pretrained.update(plan.get("pretrained_on", {}).get("voxels", ()))
        trained.update(plan.get("seen", {}).get("voxels", ()))
    return {"voxels": sorted(pretrained - trained)}


def hashes_in_files(item: Item) -> tuple[str, ...]:
    """Of the voxels of each channel. None where a file cannot be read, as that of a case that is
    to be tested elsewhere.
    """
    try:
        return hashes_of(read_channels(item.image).data)
    except InputError:
        return ()


def check_tested(
    items: Sequence[Item], hashes: Sequence[tuple[str, ...]], plan: Plan, *, allow_leak: bool
) -> list[str]:
    """What must be said of test cases, given what the weights of `plan` were trained on.

    `hashes` is what `hashes_in_files` gives of each. A case whose voxels they know is refused: its
    score would be no score of a new one. A subject that they know by name alone is said: the name
    may be that of another patient in another data set. Raises InputError unless `allow_leak`.
    """
    lines = []
    voxels = voxels_known(plan)
    known = [item for item, of_item in zip(items, hashes) if voxels.intersection(of_item)]
    if known:
        name = known[0].image[0]
        reason = f"the weights were trained on {len(known)} of the test cases, as {name}"
        if not allow_leak:
            raise InputError(
                f"--pretrained: {reason}; pre-train without them, or pass --allow-leak if this is "
                "meant"
            )
        lines.append(f"warning: {reason}: their scores say nothing of new cases (--allow-leak)")

    subjects = subjects_known(plan)
    namesakes = []
    for item in items:
        if item.subject_named and item not in known and name_of(item.subject) in subjects:
            namesakes.append(item.subject)
    if namesakes:
        lines.append(
            f"warning: the weights were trained on a subject {namesakes[0]}, and so is a test case "
            f"called ({len(set(namesakes))} such names): one patient, or two of one name?"
        )
    if () in hashes:
        lines.append(
            f"{hashes.count(())} of the {len(items)} test cases could not be read: whether the "
            "weights know them was not looked at"
        )
    return lines


def pretrained_before(items: DataList, validated: Sequence[Content], plan: Plan) -> list[str]:
    """A line, or none, on those who validate and whom pre-training saw without their labels."""
    voxels = set(plan.get("pretrained_on", {}).get("voxels", ()))
    known = [n for n, content in enumerate(validated) if voxels.intersection(content.image)]
    if not known:
        return []
    first = items.validation[known[0]].image[0].name
    line = (
        f"warning: the weights were pre-trained on {len(known)} of the images that validate, as "
        f"{first}, without their labels: their Dice may flatter"
    )
    return [line]


# --- what predictions know


def read_predicted(folder: Path) -> dict[str, Any]:
    """What `write_predicted` left beside predictions, or {}. Raises InputError if it is damaged."""
    path = folder / PREDICTED
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("trained"), list):
        raise InputError(f"{path}: not what eval.py predict writes; predict again, or remove it")
    return content


def write_predicted(
    path: Path,
    seen: Seen,
    *,
    before: Mapping[str, Any],
    split: str,
    cases: Sequence[str],
    trained: Sequence[str],
) -> None:
    """For predictions: their split, whom the network held out, and which cases it was trained on.

    Cases of an earlier prediction into the folder, of which `before` is the record, stay known.
    """
    others = set(before.get("trained", [])) - set(cases)
    content = {
        "split": split,
        "fold": seen["fold"],
        "split_seed": seen["split_seed"],
        "held_out": seen["held_out"],
        "trained": sorted(others | set(trained)),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def refuse_trained(cases: Sequence[str], where: str, doing: str) -> None:
    """Raises InputError, naming the first, where there are cases that were trained on."""
    if not cases:
        return
    more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
    raise InputError(
        f"{where}: the network was trained on case {cases[0]}{more}; {doing} what it has not seen, "
        "or pass --allow-trained if this is meant"
    )
