"""Who was trained on: nobody may be on both sides of a split, and a checkpoint knows whom it has seen.

A patient is known by the `subject` of the list, an image by its path and by its voxels, whatever the name of its file.
A checkpoint keeps hashes of both, so that it names nobody.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dae.data import holdout
from dae.data.datalist import Content, DataList, Item
from dae.data.listfile import read_json
from dae.errors import InputError

RECORD = "predicted.json"  # beside predictions
Seen = Mapping[str, Any]  # what a checkpoint says of its training; see `seen_by`
# What stands last in the names of files that are images of one patient, in small letters.
CONTRASTS = frozenset(
    (
        "t1",
        "t1w",
        "t1n",
        "t1c",
        "t1ce",
        "t1gd",
        "t1km",
        "t2",
        "t2w",
        "t2f",
        "t2s",
        "t2star",
        "flair",
        "pd",
        "pdw",
        "mr",
        "mri",
        "ct",
        "ncct",
        "cta",
        "pet",
        "suv",
        "dwi",
        "adc",
        "swi",
        "mra",
        "dce",
        "image",
        "img",
        "scan",
        "volume",
    )
)


def hash_of(array: NDArray[Any]) -> str:
    """Of size and values, plane by plane, so that no copy of the whole array is made."""
    digest = hashlib.sha256(str((array.shape, array.dtype.str)).encode())
    for plane in array:
        digest.update(np.ascontiguousarray(plane).tobytes())
    return digest.hexdigest()[:20]


def hashes_of(image: NDArray[np.float32]) -> tuple[str, ...]:
    """Of each channel of (c, d, h, w), values as they were read."""
    return tuple(hash_of(channel) for channel in image)


def name_of(subject: str) -> str:
    """What stands in a checkpoint for a subject of the list."""
    return hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:20]


# --- both sides of a split -------------------------------------------------------------------------------------------


def check_sides(items: DataList, *, test: bool = False) -> None:
    """Nobody is trained on and validated on too, nor, with `test`, tested on. Raises InputError that names the files.

    Looks at subjects, paths of images and paths of labels; `check_voxels` at what the files hold.
    """
    others = [("validated on", item) for item in items.validation]
    others += [("tested on", item) for item in items.test if test]
    ways: list[tuple[str, Any]] = [
        ("image", lambda item: [os.path.normpath(file) for file in item.image]),
        ("subject", lambda item: [item.subject]),
        ("label", lambda item: [os.path.normpath(item.label)] if item.label else []),
    ]
    for what, names in ways:
        trained = {name: item for item in items.training for name in names(item)}
        for done, item in others:
            for name in names(item):
                if name in trained:
                    here, there = trained[name].image[0], item.image[0]
                    _refuse(f"{what} {name} is on both sides: {here} is trained on, {there} {done}")


def check_voxels(items: Sequence[Item], contents: Sequence[Content], *, trained: int) -> None:
    """No image has the voxels of one on the other side. Raises InputError that names both files.

    The first `trained` items are trained on, the others validated on; each with what its files hold.
    """
    seen = {
        voxels: item for item, content in zip(items[:trained], contents) for voxels in content.image
    }
    for item, content in zip(items[trained:], contents[trained:]):
        for voxels in content.image:
            if voxels in seen:
                here, there = seen[voxels].image[0], item.image[0]
                _refuse(f"{here}, trained on, and {there}, validated on, hold the same image")


def _refuse(what: str) -> NoReturn:
    raise InputError(
        f'{what}; keep all images of a patient on one side, under one "subject", or pass --allow-trained if this is '
        "meant"
    )


def with_doubts(items: DataList, *, drawn: bool) -> DataList:
    """The list with what `doubts` says of it among its notes."""
    doubt = doubts(items, drawn=drawn)
    return replace(items, notes=(*items.notes, doubt)) if doubt else items


def doubts(items: DataList, *, drawn: bool) -> str:
    """A line on patients who may be on both sides because the list does not name them; empty where there are none.

    `drawn`: the split was drawn here, and not by whoever wrote the list.
    """
    trained = [item for item in items.training if not item.subject_named]
    validated = [item for item in items.validation if not item.subject_named]
    by_patient = {patient_of(item): item for item in trained}
    alike = [
        (by_patient[patient], item)
        for item in validated
        if (patient := patient_of(item)) in by_patient
    ]
    if alike:
        here, there = (item.image[0].name for item in alike[0])
        more = f" ({len(alike)} such images)" if len(alike) > 1 else ""
        return (
            f"warning: {here} is trained on and {there} validated on: one patient?{more} "
            'Without "subject" in the list each image is taken for a patient of its own'
        )
    if drawn and (trained or validated):
        first = [item.image[0].name for item in (*trained, *validated)][:2]
        return (
            f'no "subject" in the list for {" and ".join(first)}: each image is taken for a patient of its own; name '
            "the subjects where a patient has several"
        )
    return ""


def patient_of(item: Item) -> str:
    """A guess from the file's name: what stands before the contrast, or its folder where nothing does."""
    file = item.image[0]
    bids = re.match(r"sub-[A-Za-z0-9]+", file.name)
    if bids:
        return bids[0]
    words = re.split(r"[_\-. ]+", file.name.lower().removesuffix(".gz").removesuffix(".nii"))
    if re.fullmatch(r"000\d", words[-1]) and re.search(r"\d", "".join(words[:-1])):
        words.pop()  # nnU-Net's number of a channel, behind the number of the case
    while words and words[-1] in CONTRASTS:
        words.pop()
    return f"{file.parent}/{'_'.join(words)}"


# --- what a checkpoint knows -----------------------------------------------------------------------------------------


def seen_by(
    items: DataList,
    training: Sequence[Content],
    *,
    fold: int,
    split_seed: int,
    before: Seen | None = None,
) -> dict[str, Any]:
    """For a checkpoint: hashes of those trained on and of those held out, and the flags that chose them.

    `before` is what the weights that the run started from had seen, which they still know.
    """
    trained = {name_of(item.subject) for item in items.training}
    voxels = {hashed for content in training for hashed in content.image}
    return {
        "fold": fold,
        "split_seed": split_seed,
        "trained": sorted(trained.union((before or {}).get("trained", ()))),
        "held_out": sorted({name_of(item.subject) for item in items.validation}),
        "voxels": sorted(voxels.union((before or {}).get("voxels", ()))),
    }


def known_before(items: DataList, validated: Sequence[Content], before: Seen | None) -> list[str]:
    """A line, or none, on those who validate and were trained on by the weights that the run starts from.

    validated: what was found in the files that validate, in their order; known by voxels or by subject.
    """
    voxels = set((before or {}).get("voxels", ()))
    places = set(trained_among(items.validation, before or {}))
    places |= {n for n, content in enumerate(validated) if voxels & set(content.image)}
    known = [items.validation[n].image[0].name for n in sorted(places)]
    told = (
        f"warning: the weights were trained on {len(known)} of the images that validate, as {', '.join(known[:1])}: "
        "their Dice says nothing of new ones"
    )
    return [told] if known else []


def seen_of(
    saved: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """What is known of several checkpoints together: whom any was trained on, and whom all of them held out.

    Also the names of those that older versions wrote, which know their fold and nobody by name.
    """
    configs: list[Mapping[str, Any]] = [
        state["plan"].get("seen") or state.get("config", {}) for state in saved
    ]
    flags = [{name: config.get(name, 0) for name in ("fold", "split_seed")} for config in configs]
    known: list[Mapping[str, Any]] = [state["plan"].get("seen", {}) for state in saved]
    trained, voxels = (
        {name for one in known for name in one.get(key, ())} for key in ("trained", "voxels")
    )
    held = set.intersection(*(set(one.get("held_out", ())) for one in known))
    told = {
        **flags[0],
        "trained": sorted(trained),
        "held_out": sorted(held),
        "voxels": sorted(voxels),
    }
    return told, [name for name, one in zip(names, known) if not one]


def held_out(
    items: DataList, seen: Seen, *, fold: int | None = None, split_seed: int | None = None
) -> DataList:
    """The split of a list as a checkpoint saw it: who was held out then is now, whoever has joined the list since.

    What the flags ask for goes first (None: not asked for), then the list's own `validation`. A list that knows none
    of them is split by the checkpoint's fold. Raises InputError.
    """
    if fold is not None or split_seed is not None or items.validation:
        return holdout.split(items, fold=fold, split_seed=split_seed)
    names = set(seen.get("held_out", ()))
    held = tuple(item for item in items.training if name_of(item.subject) in names)
    if held:
        kept = tuple(item for item in items.training if name_of(item.subject) not in names)
        return replace(
            items, training=kept, validation=held, notes=("the cases that the checkpoint held out",)
        )
    drawn = not holdout.has_folds(items)
    return holdout.split(
        items, fold=seen.get("fold", 0), split_seed=seen.get("split_seed", 0) if drawn else None
    )


def trained_among(items: Sequence[Item], seen: Seen) -> list[int]:
    """Places of the items whose subject a checkpoint was trained on."""
    names = set(seen.get("trained", ()))
    return [n for n, item in enumerate(items) if name_of(item.subject) in names]


def is_trained(image: NDArray[np.float32], seen: Seen) -> bool:
    """Whether a checkpoint was trained on these voxels (c, d, h, w), by whatever name."""
    return bool(set(seen.get("voxels", ())) & set(hashes_of(image)))


# --- what predictions know -------------------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` left beside predictions, or nothing. Raises InputError where it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("trained"), list):
        raise InputError(f"{path}: not what eval.py predict writes; predict again, or remove it")
    return content


def write_record(
    path: Path,
    seen: Seen,
    *,
    before: Mapping[str, Any],
    split: str,
    cases: Sequence[str],
    trained: Sequence[str],
) -> None:
    """For predictions: which split they are of, whom the network held out, and which cases it was trained on.

    Cases of an earlier prediction into the folder, of which `before` is the record, stay known.
    """
    content = {
        "split": split,
        **{name: seen[name] for name in ("fold", "split_seed", "held_out")},
        "trained": sorted((set(before.get("trained", [])) - set(cases)) | set(trained)),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def refuse_trained(cases: Sequence[str], where: str, doing: str) -> None:
    """Raises InputError, naming the first, where there are cases that were trained on."""
    if cases:
        more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
        raise InputError(
            f"{where}: the network was trained on case {cases[0]}{more}; {doing} what it has not seen, or pass "
            "--allow-trained if this is meant"
        )
