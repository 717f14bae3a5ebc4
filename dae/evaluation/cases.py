"""Predictions against labels: which file belongs to which, and a score for every class of a case.

A case is a file name without its endings. It is measured on its label's own grid, with the spacing
of the label's header. Nothing is resampled: a prediction on another grid is refused. Label maps are
(d, h, w) in RAS order, so two files may store one grid along different axes. Whatever cannot be
scored is an InputError of one line that names the file.
"""

import csv
import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dae.config.evaluate import DefinitionName
from dae.data.datalist import DataList, Item
from dae.data.listfile import LARGEST, LONGEST
from dae.data.nifti import SHEAR, difference_in_words, read_grid, read_labels
from dae.data.regions import Region, check_same
from dae.errors import InputError, one_line
from dae.evaluation.metrics import METRICS, Labels, Mask, Row, score_labels
from dae.files import write_bytes

ENDINGS = (".nii.gz", ".nii")
AROUND_NAME = ".1234567..nii.gz"  # of a label map while it is written (dae/files.py)

TEXT_COLUMNS = ("case", "class", "name", "status")
NUMBERS = (*METRICS, "volume_truth_ml", "volume_prediction_ml")
COLUMNS = (*TEXT_COLUMNS, *NUMBERS)  # of scores.csv

Classes = Mapping[int, str] | Sequence[int]
Spacing = tuple[float, float, float]


class Pair(NamedTuple):
    """The two files of a case."""

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
    def annotated(self) -> Mask:
        """Which voxels were annotated (d, h, w)."""
        if self.ignore is None:
            return np.ones(self.truth.shape, bool)
        return self.truth != self.ignore


# --- which file belongs to which


def case_name(image: Path) -> str:
    """The file's name without .nii or .nii.gz; other dots belong to the name."""
    for ending in ENDINGS:
        if image.name.lower().endswith(ending):
            return image.name[: -len(ending)]
    return image.name


def case_names(images: Sequence[Path], among: Iterable[Path] = ()) -> list[str]:
    """A name for each: its own, after as many of its folders as set it apart (s1_t1, s2_t1).

    It is set apart from those of `among` as well: of all images of a list, so that a case has the
    same name in every fold and every split. Raises InputError where two are one and the same.
    """
    own = {image.absolute() for image in images}
    others = dict.fromkeys(image.absolute() for image in among)
    every = [*images, *(image for image in others if image not in own)]
    names = [case_name(image) for image in every]
    folders = [list(image.absolute().parts[1:-1]) for image in every]

    # Each round puts one more folder in front of the names that are still there twice.
    repeated = repeats(names)
    while repeated:
        for n, name in enumerate(names):
            if name not in repeated:
                continue
            if folders[n]:
                names[n] = f"{folders[n].pop()}_{name}"
            elif n >= len(images):
                names[n] = str(every[n])  # of another part: any name of its own will do
            elif names[: len(images)].count(name) > 1:
                raise InputError(f"{every[n]}: its name is there twice; each is a case of its own")
        repeated = repeats(names)

    names = names[: len(images)]
    check_file_names(names, images)
    return names


def names_in_list(items: DataList, chosen: Sequence[Item]) -> list[str]:
    """The case of each chosen item of a list. Raises InputError as `case_names`."""
    every = (*items.training, *items.validation, *items.test)
    images = [item.image[0] for item in chosen]
    return case_names(images, among=[item.image[0] for item in every])


def check_file_names(names: Sequence[str], images: Sequence[Path]) -> None:
    """Raises InputError where two cases may be one file, or a case is too long for a file's name.

    Some disks take A for a, and some é for e with an accent.
    """
    first_of: dict[str, Path] = {}
    for name, image in zip(names, images):
        if len(os.fsencode(name)) > LONGEST - len(AROUND_NAME):
            raise InputError(f"{image}: its name is too long for that of a label map; shorten it")

        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        first = first_of.setdefault(folded, image)
        if first is not image:
            raise InputError(
                f"{image}: its name is that of {first} but for capitals or accents, and many disks "
                "take the two for one; rename it"
            )


def pair(predictions: Path, labels: Path | Sequence[tuple[str, Path | None]]) -> list[Pair]:
    """The predictions of a folder and the labels of another folder, or of a list, by case.

    Raises InputError where a case has only one of the two: without it a mean would be another.
    """
    predicted = files_in(predictions)
    true: dict[str, Path | None] = {}
    if isinstance(labels, Path):
        source = str(labels)
        true.update(files_in(labels))
    else:
        source = "the list"
        true.update(labels)
        repeated = repeats([case for case, _ in labels])
        if repeated:
            raise InputError(f"the list names {first_and_count(repeated)} more than once")

    # On neither side is a case left out in silence.
    unlabelled = [case for case in predicted if true.get(case) is None]
    if unlabelled:
        raise InputError(
            f"{source}: no label for {first_and_count(unlabelled)}, predicted in {predictions}"
        )

    unpredicted = [case for case in true if case not in predicted]
    if unpredicted:
        raise InputError(
            f"{predictions}: no prediction for {first_and_count(unpredicted)}; "
            "they are named <case>.nii.gz"
        )

    pairs = []
    for case, label in true.items():
        if label is not None:
            pairs.append(Pair(case, predicted[case], label))
    check_labels(pairs)
    return pairs


def check_labels(pairs: Sequence[Pair]) -> None:
    """Raises InputError where a label is no file, or is the prediction itself."""
    missing = [str(pair.label) for pair in pairs if not pair.label.is_file()]
    if missing:
        raise InputError(f"{first_and_count(missing, 'label')}: no such file")

    same = [str(pair.label) for pair in pairs if pair.prediction.samefile(pair.label)]
    if same:
        raise InputError(
            f"{first_and_count(same, 'label')}: is the prediction as well; "
            "name the folder of the predictions"
        )


def check_task(
    items: DataList, classes: Mapping[str, str], regions: Sequence[Region], data: str
) -> None:
    """Raises InputError where the list `data` is of another task than a checkpoint.

    classes and regions: of the checkpoint. A list without labels is of any task.
    """
    if items.regions or (items.labels and regions):
        check_same(items.regions, regions, data)
    else:
        check_classes(items.labels, classes, data)


def check_classes(labels: Mapping[int, str], classes: Mapping[str, str], data: str) -> None:
    """Raises InputError where a list gives a label of the checkpoint another name: that is another
    task.

    labels: of the list `data`. classes: of the checkpoint, with labels as JSON has them.
    """
    for label, name in labels.items():
        known = classes.get(str(label), name)  # a label of the list alone is no matter
        if label != 0 and known.casefold() != name.casefold():
            raise InputError(
                f"--data {data}: label {label} is {name!r} there and {known!r} in the checkpoint"
            )


def volumes_in(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, in order of name, without hidden files.

    macOS leaves a hidden ._name beside each name.
    """
    files = []
    for file in folder.iterdir():
        if file.name.lower().endswith(ENDINGS) and not file.name.startswith("."):
            files.append(file)
    return sorted(files)


def files_in(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by case, in order of name. Raises InputError without any."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")

    files = volumes_in(folder)
    if not files:
        raise InputError(f"{folder}: holds no .nii or .nii.gz file")

    twice = repeats([case_name(file) for file in files])
    if twice:
        raise InputError(
            f"{folder}: {first_and_count(twice)} is there both as .nii and as .nii.gz; keep one"
        )
    return {case_name(file): file for file in files}


def repeats(names: Sequence[str]) -> list[str]:
    """The names that are there more than once."""
    return [name for name, times in Counter(names).items() if times > 1]


def first_and_count(names: Sequence[str], kind: str = "case") -> str:
    """The first by name, the rest by number: "case s1 and 3 more"."""
    if len(names) == 1:
        return f"{kind} {names[0]}"
    return f"{kind} {names[0]} and {len(names) - 1} more"


# --- what is in a file


def read_case(
    prediction: Path, label: Path, classes: Classes, *, ignore: int | None = None
) -> Case:
    """Both files of a case. `ignore` is the label, of the truth alone, of what was not annotated.

    Raises InputError where they lie on different grids or hold labels that are not in `classes`.
    """
    true = read_labels(label)
    predicted = read_labels(prediction, like=true.affine)
    differing = difference_in_words(predicted.grid, true.grid)
    if differing:
        raise InputError(f"{prediction} and {label} lie on different grids: {differing}")

    shear = true.grid.shear
    if shear > SHEAR:
        raise InputError(
            f"{label}: its axes are not perpendicular, so that distances in mm would be "
            f"up to {shear:.0%} wrong; resample both files to a grid that is not sheared"
        )

    # The ignored label is nothing to predict, and it need not be among the classes.
    known = {0, *classes}
    check_values(prediction, predicted.labels, known - {ignore})
    check_values(label, true.labels, known if ignore is None else known | {ignore})
    return Case(case_name(prediction), predicted.labels, true.labels, true.spacing, ignore)


def check_values(path: Path, labels: Labels, known: Collection[int]) -> None:
    """Raises InputError on a label that is no class: a map of another task, or of other numbers."""
    unknown = labels[~np.isin(labels, np.array(sorted(known)))]
    if len(unknown):
        raise InputError(
            f"{path}: label {unknown.min()} is not declared; declared are {sorted(known)}"
        )


def classes_in(paths: Iterable[Path]) -> dict[int, str]:
    """Every label but 0 in any of the files, named by its number, for want of a list with names."""
    values: set[int] = set()
    for path in paths:
        values.update(np.unique(read_labels(path).labels).tolist())
    return {value: str(value) for value in sorted(values - {0})}


# --- scores


class Scores(NamedTuple):
    """Of all cases."""

    rows: list[Row]
    diagonals: dict[str, float]  # of each case, in mm
    labels: dict[str, str]  # a hash of each case's label map


def score(
    pairs: Sequence[Pair],
    classes: Classes,
    *,
    tolerance: float | Mapping[int, float] = 1.0,
    definition: DefinitionName = "default",
    ignore: int | None = None,
    regions: Sequence[Region] = (),
) -> Scores:
    """The rows of `score_case` of all cases, one in memory at a time. Raises InputError."""
    rows: list[Row] = []
    hashes: dict[str, str] = {}
    # `disable=None` shows no progress where there is no terminal.
    for name, prediction, label in tqdm(pairs, desc="scoring", unit="case", disable=None):
        case = read_case(prediction, label, classes, ignore=ignore)
        rows += rows_of(
            case, label, classes, tolerance=tolerance, definition=definition, regions=regions
        )
        hashes[name] = content_of(case.truth)
    return Scores(rows, diagonals(pairs), hashes)


def score_case(
    prediction: Path,
    label: Path,
    classes: Classes,
    *,
    tolerance: float | Mapping[int, float] = 1.0,
    definition: DefinitionName = "default",
    ignore: int | None = None,
    regions: Sequence[Region] = (),
) -> list[Row]:
    """A row of `metrics.score_labels` for each class but 0, with the `case` in front.

    Where there are `regions`, it is a row for each of them: the union of its labels, in the truth
    and in the prediction. Its class is its number, from 1 on, which `tolerance` goes by as well.

    Voxels whose true label is `ignore` count for nothing, and no surface ends at them.
    Raises InputError.
    """
    case = read_case(prediction, label, classes, ignore=ignore)
    return rows_of(
        case, label, classes, tolerance=tolerance, definition=definition, regions=regions
    )


def rows_of(
    case: Case,
    label: Path,
    classes: Classes,
    *,
    tolerance: float | Mapping[int, float],
    definition: DefinitionName,
    regions: Sequence[Region] = (),
) -> list[Row]:
    """`score_case` of a case that has been read; `label` is the file of its truth."""
    rows: list[Row] = []
    try:
        for prediction, truth, names in maps_to_score(case, classes, regions):
            rows += score_labels(
                prediction,
                truth,
                case.spacing,
                names,
                tolerance=tolerance,
                definition=definition,
                ignore=None if case.ignore is None else ~case.annotated,
            )
    except ValueError as error:
        raise InputError(f"{label}: {error}") from error
    return [{"case": case.name, **row} for row in rows]


def maps_to_score(
    case: Case, classes: Classes, regions: Sequence[Region]
) -> Iterator[tuple[Labels, Labels, dict[int, str]]]:
    """Prediction and truth (d, h, w), and the names of what is scored in them.

    Of classes both maps as they are. Regions overlap: of each a map of its own, whose only label
    is the number of the region.
    """
    if not regions:
        names = (
            classes if isinstance(classes, Mapping) else {value: str(value) for value in classes}
        )
        scored = {value: name for value, name in names.items() if value not in (0, case.ignore)}
        yield case.prediction, case.truth, scored

    for n, region in enumerate(regions, start=1):
        predicted = np.isin(case.prediction, region.labels) * np.uint16(n)
        true = np.isin(case.truth, region.labels) * np.uint16(n)
        yield predicted, true, {n: region.name}


def content_of(labels: Labels) -> str:
    """A hash of the size and the voxels of a label map, however its file stores them."""
    digest = hashlib.sha256(repr(labels.shape).encode())
    for plane in labels:
        digest.update(np.ascontiguousarray(plane, dtype="<i8").tobytes())
    return digest.hexdigest()[:20]


def diagonals(pairs: Iterable[Pair]) -> dict[str, float]:
    """The diagonal of each case's volume in mm: no distance within it is longer."""
    lengths = {}
    for case, _, label in pairs:
        grid = read_grid(label)
        edges = [voxels * mm for voxels, mm in zip(grid.shape, grid.spacing)]
        lengths[case] = hypot(*edges)
    return lengths


# --- scores.csv


def write_csv(rows: Iterable[Row], path: Path, columns: Sequence[str]) -> None:
    """These columns of the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_scores(rows: Sequence[Row], path: Path) -> None:
    """A line for each case and class with all digits of every number, or `inf`, or `nan`."""
    write_csv(rows, path, COLUMNS)


def read_scores(path: Path) -> list[Row]:
    """The very rows that were written. Raises InputError on a file that is not a scores.csv.

    A file without the column `msd` takes it from `assd`, which is the same number.
    """
    rows: list[Row] = []
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path}: scores of more than {LARGEST} bytes are not read")
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                line.setdefault("msd", line.get("assd"))
                numbers = {name: float(line[name]) for name in NUMBERS}
                words = {name: line[name] for name in TEXT_COLUMNS}
                rows.append({**words, "class": int(line["class"]), **numbers})
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} after {len(rows)} rows: {one_line(error)}"
        raise InputError(f"{path}: not a scores.csv of eval.py score ({reason})") from error
    if not rows:
        raise InputError(f"{path}: holds no scores")
    return rows
