"""The images of a folder whose paths fit a pattern.

A pattern is the path of an image below the folder, as {subject}/{subject}_{modality}.nii.gz. Words
in braces stand for text without a /, each for the shortest that fits. A word that is there twice
stands for the same text both times, and {modality} for the name of one.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from dae.data.datalist import ALIASES, MODALITIES
from dae.errors import InputError, counted

NIFTI = (".nii", ".nii.gz")
WORD = re.compile(r"\{([A-Za-z]\w*)\}")  # in a pattern

# How people write the modalities in names of files, beside how they write them in lists.
SPELLINGS = ALIASES | {"t1n": "t1", "t1km": "t1ce", "t2star": "t2s", "pdw": "pd"}

# dcm2niix writes a scan of a tilted gantry, or of uneven slices, as it is and once more corrected.
CORRECTED = re.compile(r"(?:_Tilt|_Eq)+(?:_\d+)?$")


class Found(NamedTuple):
    """An image that fits a pattern."""

    image: str  # path below the folder, with /
    words: Mapping[str, str]  # of the pattern, as they are in the path
    label: str = ""  # path below the folder, if there is one


class Search(NamedTuple):
    """The images of a folder, and how many files were left out for which reason."""

    found: list[Found]
    left_out: dict[str, list[str]]  # reason -> paths
    without_label: list[str]


def find(
    folder: Path,
    patterns: Sequence[str],
    label: str = "",
    *,
    all_must_fit: bool = False,
    label_must_fit: bool = True,
) -> Search:
    """The images that fit a pattern, in order of path, and the label of each.

    Of several patterns the first that fits a file holds. Raises InputError where no file fits any,
    with `all_must_fit` where one pattern fits no file, with `label_must_fit` where no label is
    there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for pattern in patterns:
        check_pattern(pattern)

    files = files_in(folder)
    matched, others = match_all(files, patterns)
    if all_must_fit:
        check_each_fits(patterns, files, folder)
    if not matched:
        refuse_unfit(patterns[0], files, folder)

    found, without_label, labels = with_labels(matched, label, files)
    if label and label_must_fit and not labels:
        expected = filled(label, matched[0].words)
        raise InputError(
            f"--label {label}: no image of {folder} has one; {expected} is not there"
            f"{closest(expected, files)}"
        )
    images, replaced = without_replaced(found)
    if not images:
        raise InputError(f"--pattern {patterns[0]}: fits labels alone, and no image")

    left_out = {
        "labels": labels,
        "scans that dcm2niix has also written corrected": replaced,
        "files that fit no pattern": sorted(set(others) - set(labels)),
    }
    return Search(images, left_out, without_label)


# --- a pattern


def check_pattern(pattern: str) -> None:
    """Raises InputError for a pattern that no image can fit."""
    if not pattern.endswith(NIFTI):
        raise InputError(
            f"--pattern {pattern}: images are NIfTI, .nii or .nii.gz; "
            "docs/datasets.md says how DICOM and .mhd become NIfTI"
        )
    if "{subject}" not in pattern:
        raise InputError(
            f"--pattern {pattern}: has no {{subject}}; without it nobody knows "
            "which images are of one patient"
        )


def expression_of(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern.

    "{subject}/{subject}_{modality}.nii" has the words subject and modality; the second {subject}
    must be the same text as the first.
    """
    modalities = sorted({*MODALITIES, *SPELLINGS}, key=len, reverse=True)
    any_modality = "|".join(map(re.escape, modalities))

    # The text before the first word, then each word and the text after it.
    text, *rest = WORD.split(pattern)
    expression = re.escape(text)
    seen = set[str]()
    for word, text in zip(rest[::2], rest[1::2]):
        if word in seen:
            expression += f"(?P={word})"
        elif word == "modality":
            expression += f"(?P<modality>(?i:{any_modality}))"
        else:
            expression += f"(?P<{word}>[^/]+?)"
        seen.add(word)
        expression += re.escape(text)
    return re.compile(expression)


def first_match(path: str, expressions: Sequence[re.Pattern[str]]) -> dict[str, str] | None:
    for expression in expressions:
        match = expression.fullmatch(path)
        if match:
            return match.groupdict()
    return None


def filled(label: str, words: Mapping[str, str]) -> str:
    """The path of a label, with the words of its image. Raises InputError for another word."""
    path, *rest = WORD.split(label)
    for word, text in zip(rest[::2], rest[1::2]):
        if word not in words:
            raise InputError(f"--label {label}: {{{word}}} is not in --pattern")
        path += words[word] + text
    return path


def plain_modality(named: str) -> str:
    """A modality as the list has it: "T1Gd" -> "t1ce"."""
    return SPELLINGS.get(named.lower(), named.lower())


# --- the files


def files_in(folder: Path) -> list[str]:
    """Paths of all files below the folder, in order, but hidden ones. Links are followed."""
    paths = []
    seen = set[str]()
    for parent, folders, files in os.walk(folder, followlinks=True):
        # A link may lead back to where we have been.
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)

        folders[:] = [name for name in folders if not name.startswith(".")]
        below = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        for name in files:
            if not name.startswith("."):  # a Mac leaves "._name" beside the files that it copies
                paths.append(str(below / name))
    return sorted(paths)


def match_all(files: Sequence[str], patterns: Sequence[str]) -> tuple[list[Found], list[str]]:
    """The files that fit a pattern, each by the first that it fits, and the others."""
    expressions = [expression_of(pattern) for pattern in patterns]
    matched = []
    others = []
    for path in files:
        words = first_match(path, expressions)
        if words is None:
            others.append(path)
        else:
            matched.append(Found(path, words))
    return matched, others


def check_each_fits(patterns: Sequence[str], files: Sequence[str], folder: Path) -> None:
    """Raises InputError for the first pattern that fits no file.

    It is for patterns of the command line. A data set has patterns for several ways to name its
    files, of which one will do.
    """
    for pattern in patterns:
        expression = expression_of(pattern)
        if not any(map(expression.fullmatch, files)):
            refuse_unfit(pattern, files, folder)


def refuse_unfit(pattern: str, files: Sequence[str], folder: Path) -> NoReturn:
    raise InputError(
        f"--pattern {pattern}: fits none of {counted(len(files), 'file')} in {folder}"
        f"{closest(pattern, files)}"
    )


def closest(pattern: str, files: Sequence[str]) -> str:
    """The path that is most like the pattern, in words; "" of no file."""
    # Of a thousand cases that differ by their numbers, one stands for all.
    by_shape: dict[str, str] = {}
    for path in files:
        by_shape.setdefault(re.sub(r"[0-9]+", "0", path), path)

    best = ""
    best_ratio = -1.0
    for path in by_shape.values():
        ratio = difflib.SequenceMatcher(None, pattern, path, autojunk=False).ratio()
        if ratio > best_ratio:
            best, best_ratio = path, ratio
    return f"; the closest is {best}" if best else ""


# --- labels, and scans that are there twice


def with_labels(
    matched: Sequence[Found], label: str, files: Sequence[str]
) -> tuple[list[Found], list[str], list[str]]:
    """The images with the labels that are there, those without one, and the labels themselves."""
    if not label:
        return list(matched), [], []

    there = set(files)
    label_of = {}
    for one in matched:
        path = filled(label, one.words)
        if path in there:
            label_of[one.image] = path
    labels = set(label_of.values())

    # A wide pattern takes in labels as well.
    images = [one for one in matched if one.image not in labels]
    found = [one._replace(label=label_of.get(one.image, "")) for one in images]
    without = [one.image for one in found if not one.label]
    return found, without, sorted(labels)


def without_replaced(found: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """Without the scans of which dcm2niix has written a corrected version too; and these."""
    replaced = set[tuple[str, str]]()
    for one in found:
        stem, ending = parted(one.image)
        plain = CORRECTED.sub("", stem)
        if plain != stem:
            replaced.add((plain, ending))

    used = [one for one in found if parted(one.image) not in replaced]
    left_out = [one.image for one in found if parted(one.image) in replaced]
    return used, left_out


def parted(path: str) -> tuple[str, str]:
    """The path and its ending: a/b.nii.gz -> a/b and .nii.gz."""
    stem = path.removesuffix(".gz").removesuffix(".nii")
    return stem, path[len(stem) :]
