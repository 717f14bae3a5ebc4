"""An nnU-Net raw folder as the content of a data list: dataset.json, imagesTr, labelsTr, imagesTs, splits_final.json.

What nnU-Net knows by file names stands here in words: a case is a subject, channels are files that end in _0000, _0001
and so on, and the name of a channel is its modality or says how it is normalised.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dae.data.listfile import LIST_KEYS, check_keys, in_order, read_json
from dae.errors import InputError

# Channel names that stand for a way to normalise, in small letters, and what that way is called here.
NORMALISATIONS = {
    "nonorm": "none",
    "zscore": "zscore_all",
    "rescale_to_0_1": "minmax",
    "rescale_0_to_1": "minmax",
}
OURS = ("labels", "swap", "tolerance_mm")  # keys of dataset.json that mean what they mean in a list
ITS_OWN = ("channel_names", "file_ending", "regions_class_order", "overwrite_image_reader_writer")
Split = tuple[frozenset[str], frozenset[str]]  # cases to train on, cases to validate on


def content_of(folder: Path) -> dict[str, Any]:
    """The list that the folder stands for. imagesTr is its training, imagesTs, where there is one, its test.

    Raises InputError where the folder is no such folder, or a file of it does not fit.
    """
    if not (folder / "dataset.json").is_file():
        raise InputError(
            f"{folder}: a folder must be an nnU-Net raw one, with dataset.json and imagesTr in it"
        )
    dataset = read_json(folder / "dataset.json")
    if not isinstance(dataset, dict):
        raise InputError(
            f"{folder / 'dataset.json'}: must be an object, with channel_names and labels in it"
        )
    known = {**LIST_KEYS, **dict.fromkeys(ITS_OWN, ())}
    check_keys(dataset, known, str(folder / "dataset.json"))
    ending = str(dataset.get("file_ending", ".nii.gz"))
    channels = in_order(dataset.get("channel_names") or dataset.get("modality"))
    declared = dataset.get("modalities", {})
    return {
        **{key: dataset[key] for key in OURS if key in dataset},
        "modalities": {**NORMALISATIONS, **declared} if isinstance(declared, dict) else declared,
        "training": _cases(folder, "imagesTr", "labelsTr", channels, ending),
        "test": _cases(folder, "imagesTs", "labelsTs", channels, ending),
    }


def splits_of(folder: Path) -> tuple[Split, ...]:
    """splits_final.json in the folder, beside it, or where nnU-Net keeps it: a pair of cases for each fold, or none.

    Raises InputError where the file does not hold what nnU-Net writes.
    """
    preprocessed = folder.absolute().parent.parent / "nnUNet_preprocessed" / folder.absolute().name
    places = (folder, preprocessed, folder.absolute().parent)
    path = next(
        (
            place / "splits_final.json"
            for place in places
            if (place / "splits_final.json").is_file()
        ),
        None,
    )
    if path is None:
        return ()
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(
            f'{path}: must be a list of folds, each {{"train": [cases], "val": [cases]}}'
        )
    return tuple(_split(fold, f"{path}: fold {n}") for n, fold in enumerate(content))


def _split(fold: Any, where: str) -> Split:
    sides = [fold.get(name) if isinstance(fold, Mapping) else None for name in ("train", "val")]
    if not all(isinstance(side, list) for side in sides):
        raise InputError(f'{where}: must have the lists "train" and "val"')
    train, val = (frozenset(map(str, side)) for side in sides if side is not None)
    if both := sorted(train & val):
        raise InputError(
            f"{where}: case {both[0]} is in both train and val; remove it from one of them"
        )
    return train, val


def _cases(
    folder: Path, images: str, labels: str, channels: list[str], ending: str
) -> list[dict[str, Any]]:
    """The cases of one folder of images, in order of name; a label where there is one."""
    found: dict[str, dict[int, str]] = {}
    for file in sorted((folder / images).glob(f"*{ending}")):
        if file.name.startswith("."):
            continue  # a Mac leaves "._name" beside the files that it copies
        named = re.fullmatch(r"(.+)_(\d{4})", file.name.removesuffix(ending))
        if not named:
            raise InputError(
                f"{file}: nnU-Net's images end in _0000{ending}; for other folders write a data list"
            )
        found.setdefault(named[1], {})[int(named[2])] = f"{images}/{file.name}"
    for case, files in found.items():
        if sorted(files) != list(range(len(files))):
            missing = min(set(range(len(files))) - set(files))
            raise InputError(
                f"{folder / images}: case {case} has no channel _{missing:04d}{ending}; copy it there"
            )

    def entry(case: str, files: Sequence[str]) -> dict[str, Any]:
        label = f"{labels}/{case}{ending}"
        known = {"image": list(files), "modality": channels, "subject": case}
        return {**known, "label": label} if (folder / label).is_file() else known

    return [entry(case, list(files.values())) for case, files in found.items()]
