"""Predictions against labels: which file belongs to which, whether both lie on one grid, and a score for every class.

A case is a file name without its endings. It is measured on its label's own grid, with the spacing of the label's
header, and nothing is resampled: a prediction on another grid is refused, not moved. Label maps are (d, h, w) in RAS
order, so that two files may store one grid along different axes. What cannot be scored is one line that names the file.
"""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dae.data.nifti import SHEAR, difference, read_grid, read_labels
from dae.errors import InputError
from dae.evaluation.metrics import METRICS, DefinitionName, Labels, Row, diagonal, score_labels
from dae.files import write_bytes

ENDINGS = (".nii.gz", ".nii")
COLUMNS = ("case", "class", "name", "status", *METRICS, "volume_truth_ml", "volume_prediction_ml")
Classes = Mapping[int, str] | Sequence[int]
Spacing = tuple[float, float, float]


class Pair(NamedTuple):
    case: str
    prediction: Path
    label: Path


class Case(NamedTuple):
    """A prediction and its truth (d, h, w) on one grid of `spacing` mm."""

    name: str
    prediction: Labels
    truth: Labels
    spacing: Spacing
    ignore: int | None = None  # the label, of the truth alone, of what was not annotated

    @property
    def annotated(self) -> Any:
        """What picks the annotated voxels out of a map: all of it, or a mask."""
        return ... if self.ignore is None else self.truth != self.ignore


# --- which file belongs to which -------------------------------------------------------------------------------------


def case_name(image: Path) -> str:
    """The file's name without .nii or .nii.gz; other dots belong to the name."""
    ending = next((ending for ending in ENDINGS if image.name.lower().endswith(ending)), "")
    return image.name[: len(image.name) - len(ending)]


def case_names(images: Sequence[Path]) -> list[str]:
    """A name for each: its own, behind as many of its folders as tell it from the others (s1_t1, s2_t1).

    Raises InputError where a name is there twice all the same.
    """
    names = [case_name(image) for image in images]
    folders = [list(image.absolute().parts[1:-1]) for image in images]
    while repeated := {name for name, times in Counter(names).items() if times > 1}:
        for n, name in enumerate(names):
            if name in repeated:
                refuse(
                    not folders[n],
                    f"{images[n]}: its name is there twice; each is a case of its own",
                )
                names[n] = f"{folders[n].pop()}_{name}"
    return names


def pair(predictions: Path, labels: Path | Sequence[tuple[str, Path | None]]) -> list[Pair]:
    """The files of both folders, or of a folder and of a list, by case. Raises InputError unless each has its other.

    A case that is left out of a mean makes the mean another, so none is left out in silence, on either side.
    """
    predicted = files_in(predictions)
    if isinstance(labels, Path):
        where, true = str(labels), dict[str, Path | None](files_in(labels))
    else:
        where, true = "the list", dict(labels)
        repeated = [
            case for case, times in Counter(case for case, _ in labels).items() if times > 1
        ]
        refuse(repeated, f"the list names {several(repeated)} more than once")
    unlabelled = [case for case in predicted if true.get(case) is None]
    refuse(unlabelled, f"{where}: no label for {several(unlabelled)}, predicted in {predictions}")
    unpredicted = [case for case in true if case not in predicted]
    refuse(
        unpredicted,
        f"{predictions}: no prediction for {several(unpredicted)}; they are named <case>.nii.gz",
    )
    pairs = [
        Pair(case, predicted[case], label) for case, label in true.items() if label is not None
    ]
    lost = [str(each.label) for each in pairs if not each.label.is_file()]
    refuse(lost, f"{several(lost, 'label')}: no such file")
    same = [str(each.label) for each in pairs if each.prediction.samefile(each.label)]
    refuse(
        same,
        f"{several(same, 'label')}: is the prediction as well; name the folder of the predictions",
    )
    return pairs


def volumes_in(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, in order of name. Hidden files are none: macOS leaves a ._name beside each name."""
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.name.lower().endswith(ENDINGS))


def files_in(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by case, in order of name. Raises InputError where there are none."""
    refuse(not folder.is_dir(), f"{folder}: no such folder")
    files = volumes_in(folder)
    refuse(not files, f"{folder}: holds no .nii or .nii.gz file")
    found = {case_name(file): file for file in files}
    twice = [case for case, times in Counter(map(case_name, files)).items() if times > 1]
    refuse(twice, f"{folder}: {several(twice)} is there both as .nii and as .nii.gz; keep one")
    return found


def several(names: Sequence[str], kind: str = "case") -> str:
    """The first by name, the rest by number: "case s1 and 3 more"."""
    return f"{kind} {', '.join(names[:1])}" + (
        f" and {len(names) - 1} more" if len(names) > 1 else ""
    )


# --- what is in a file -----------------------------------------------------------------------------------------------


def read_case(
    prediction: Path, label: Path, classes: Classes, *, ignore: int | None = None
) -> Case:
    """Both files of one case. Raises InputError where they lie on different grids or hold labels beyond `classes`.

    `ignore` is the label, of the truth alone, of what was not annotated.
    """
    true = read_labels(label)
    predicted = read_labels(prediction, like=true.affine)
    apart = difference(predicted.grid, true.grid)
    refuse(apart, f"{prediction} and {label} lie on different grids: {apart}")
    shear = true.grid.shear
    refuse(
        shear > SHEAR,
        f"{label}: its axes are not perpendicular, so that distances in mm would be up to {shear:.0%} wrong; "
        "resample both files to a grid that is not sheared",
    )
    check_values(prediction, predicted.labels, {0, *classes} - {ignore})
    check_values(label, true.labels, {0, *classes, *([] if ignore is None else [ignore])})
    return Case(case_name(prediction), predicted.labels, true.labels, true.spacing, ignore)


def check_values(path: Path, labels: Labels, known: Collection[int]) -> None:
    """Raises InputError on a label that no class has: a map from another task, or of shifted numbers."""
    strange = labels[~np.isin(labels, np.array(sorted(known)))]
    if len(strange):
        raise InputError(
            f"{path}: label {strange.min()} is not declared; declared are {sorted(known)}"
        )


def classes_in(paths: Iterable[Path]) -> dict[int, str]:
    """Every label but 0 that occurs in any of the files, by its number: what is scored where no list names classes."""
    found = {int(value) for path in paths for value in np.unique(read_labels(path).labels)}
    return {value: str(value) for value in sorted(found - {0})}


# --- scores ----------------------------------------------------------------------------------------------------------


def score_case(
    prediction: Path,
    label: Path,
    classes: Classes,
    *,
    tolerance: float | Mapping[int, float] = 1.0,
    definition: DefinitionName = "default",
    ignore: int | None = None,
) -> list[Row]:
    """A row of `metrics.score_labels` for each class but 0, with the `case` in front. Raises InputError.

    Voxels whose true label is `ignore` count for nothing, and no surface ends at them.
    """
    case = read_case(prediction, label, classes, ignore=ignore)
    return rows_of(case, label, classes, tolerance=tolerance, definition=definition)


def rows_of(
    case: Case,
    label: Path,
    classes: Classes,
    *,
    tolerance: float | Mapping[int, float],
    definition: DefinitionName,
) -> list[Row]:
    """`score_case` of a case that has been read, `label` being its file."""
    names = classes if isinstance(classes, Mapping) else {value: str(value) for value in classes}
    scored = {value: name for value, name in names.items() if value not in (0, case.ignore)}
    hidden = None if case.ignore is None else ~case.annotated
    try:
        rows = score_labels(
            case.prediction,
            case.truth,
            case.spacing,
            scored,
            tolerance=tolerance,
            definition=definition,
            ignore=hidden,
        )
    except ValueError as error:
        raise InputError(f"{label}: {error}") from error
    return [{"case": case.name, **row} for row in rows]


class Scores(NamedTuple):
    """Of all cases."""

    rows: list[Row]
    diagonals: dict[str, float]  # of each case, in mm
    labels: dict[str, str]  # what each case's label map holds, as a hash


def score(
    pairs: Sequence[Pair],
    classes: Classes,
    *,
    tolerance: float | Mapping[int, float] = 1.0,
    definition: DefinitionName = "default",
    ignore: int | None = None,
) -> Scores:
    """The rows of `score_case` of all cases, one in memory at a time, with what tells their label maps from others."""
    rows, labels = list[Row](), dict[str, str]()
    for name, prediction, label in tqdm(
        pairs, desc="scoring", unit="case", disable=None
    ):  # silent without a terminal
        case = read_case(prediction, label, classes, ignore=ignore)
        rows += rows_of(case, label, classes, tolerance=tolerance, definition=definition)
        labels[name] = content_of(case.truth)
    return Scores(rows, diagonals(pairs), labels)


def content_of(labels: Labels) -> str:
    """A hash of the size and the voxels of a label map, however its file stores them."""
    digest = hashlib.sha256(repr(labels.shape).encode())
    for plane in labels:
        digest.update(np.ascontiguousarray(plane, dtype="<i8").tobytes())
    return digest.hexdigest()[:20]


def diagonals(pairs: Iterable[Pair]) -> dict[str, float]:
    """The diagonal of each case's volume in mm, from the header: what policy `diagonal` puts for a missed organ."""
    grids = {each.case: read_grid(each.label) for each in pairs}
    return {case: diagonal(grid.shape, grid.spacing) for case, grid in grids.items()}


# --- scores.csv ------------------------------------------------------------------------------------------------------


def write_csv(rows: Iterable[Row], path: Path, columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_scores(rows: Sequence[Row], path: Path) -> None:
    """A line per case and class with all digits of every number; what is not one is `inf` or `nan`."""
    write_csv(rows, path, COLUMNS)


def read_scores(path: Path) -> list[Row]:
    """The very rows that were written. Raises InputError on a file that is not a scores.csv."""
    rows: list[Row] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                numbers = {name: float(line[name]) for name in COLUMNS[4:]}
                rows.append(
                    {
                        **{name: line[name] for name in COLUMNS[:4]},
                        "class": int(line["class"]),
                        **numbers,
                    }
                )
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} after {len(rows)} rows: {error}"
        raise InputError(f"{path}: not a scores.csv of eval.py score ({reason})") from error
    refuse(not rows, f"{path}: holds no scores")
    return rows


def refuse(wrong: object, message: str) -> None:
    """Raises an InputError with `message` if something is wrong."""
    if wrong:
        raise InputError(message)
