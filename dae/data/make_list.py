"""Write a data list from a folder and the pattern of its file names.

    python -m dae.data.make_list FOLDER --out list.json --dataset brats21
    python -m dae.data.make_list FOLDER --out list.json --add \
        --pattern '{subject}/{subject}_{modality}.nii.gz'

A pattern is the path of an image below FOLDER. In it {subject} and {modality} stand for what they
say, and any other word in braces, as {scan}, for any text. None of them contains a /, each is as
short as it can be, and a word that is there twice stands for the same text both times.

Nothing else is guessed from a path. What was found, how it was read and what was left out is
printed.
"""

import csv
import difflib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from dae.config.command_line import from_command_line, run_or_explain
from dae.config.lists import MakeListConfig
from dae.data.datalist import ALIASES, MODALITIES, DataList, load
from dae.data.datasets import DATASETS, DataSet
from dae.data.holdout import hold_out_share, is_drawn
from dae.data.listfile import read_json
from dae.errors import InputError, counted
from dae.files import write_atomic

PROG = "python -m dae.data.make_list"
NIFTI = (".nii", ".nii.gz")

# How people write the modalities in names of files, beside how they write them in lists.
SPELLINGS = ALIASES | {"t1n": "t1", "t1km": "t1ce", "t2star": "t2s", "pdw": "pd"}

WORD = re.compile(r"\{([A-Za-z]\w*)\}")  # in a pattern

# A last word that says that a file is no image.
LABEL_WORDS = ("seg", "dseg", "segmentation", "label", "labels", "mask")

# dcm2niix writes a scan of a tilted gantry, or of uneven slices, as it is and once more corrected.
CORRECTED = re.compile(r"(?:_Tilt|_Eq)+(?:_\d+)?$")

# Columns of a table of subjects: what {subject} stands for in the pattern, whose it is.
TABLES = (("name", "subject"), ("Series UID", "Subject ID"))

# What a list remembers of each folder; see `source_of`.
SOURCE_KEYS = {"folder", "dataset", "patients", "named_by"}


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


# --- the command


def main(folder: Path, config: MakeListConfig) -> DataList | None:
    """Write the list, print what is in it, and return it as a run will read it.

    None where it has nothing to train on yet. Raises InputError.
    """
    dataset = DATASETS[config.dataset] if config.dataset else None
    out = Path(config.out)
    content = content_of(out, add=config.add)

    # What is there, and whose it is.
    search = find(folder, config, dataset)
    patients = patients_of(config, dataset)
    names = subjects_of(search.found, config, patients)

    # Names of this folder must not join two patients of the list, nor divide one.
    source = source_of(config, dataset, folder=relative(folder, "", out))
    check_naming(content, source, out)
    items = []
    for found in search.found:
        modality = modality_of(found, config, dataset)
        items.append(item_of(found, modality, names[found.image], folder=folder, out=out))
    added = not_yet_in(content, items)
    if not patients:
        check_no_namesakes(content, added, folder=folder, out=out)

    content.setdefault(config.part, []).extend(added)
    if source not in content["sources"]:
        content["sources"].append(source)
    if dataset and any("label" in item for item in items):
        add_classes(content, dataset, out)

    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomic(out, partial(write_text, text))

    report(folder, search, items, dataset)
    return report_list(out, content, added=len(added), known=len(items) - len(added))


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def content_of(out: Path, *, add: bool) -> dict[str, Any]:
    """What the list holds so far. Raises InputError where it must not be written over."""
    if not out.name or out.is_dir():
        raise InputError("--out: name the list to write, as list.json")
    if not out.exists():
        return {"sources": [], "training": []}
    if not add:
        raise InputError(f"--out {out}: is there already; --add adds to it; else name another file")

    content = read_json(out)
    if not isinstance(content, dict) or not are_sources(content.get("sources")):
        raise InputError(f"--out {out}: this command has not written it; name another file")
    if content.get("training"):
        load(str(out))  # refuses what was changed by hand and is no list any more
    return content


def are_sources(sources: Any) -> bool:
    """Whether this is what the command leaves in a list under "sources"."""
    if not isinstance(sources, list):
        return False
    return all(isinstance(source, dict) and set(source) >= SOURCE_KEYS for source in sources)


# --- files and patterns


def find(folder: Path, config: MakeListConfig, dataset: DataSet | None) -> Search:
    """The images of the folder that fit a pattern, in order of path. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    patterns = config.pattern or (dataset.patterns if dataset else ())
    if not patterns:
        raise InputError("--pattern: name how the images are called, or --dataset")
    for pattern in patterns:
        check_pattern(pattern)

    files = files_in(folder)
    matched, others = match_all(files, patterns)
    if config.pattern:
        check_each_fits(config.pattern, files, folder)
    if not matched:
        refuse_unfit(patterns[0], files, folder)

    label = config.label
    if dataset and not config.pattern:
        label = label or dataset.label
    found, without_label, labels = with_labels(matched, label, files)
    if config.label and not labels:
        expected = filled(label, matched[0].words)
        raise InputError(
            f"--label {label}: no image of {folder} has one; {expected} is not there"
            f"{closest(expected, files)}"
        )
    used, replaced = without_replaced(found)
    if not used:
        raise InputError(f"--pattern {patterns[0]}: fits labels alone, and no image")

    left_out = {
        "labels": labels,
        "scans that dcm2niix has also written corrected": replaced,
        "files that fit no pattern": [path for path in others if path not in set(labels)],
    }
    return Search(used, left_out, without_label)


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


def first_match(path: str, expressions: Sequence[re.Pattern[str]]) -> dict[str, str] | None:
    for expression in expressions:
        match = expression.fullmatch(path)
        if match:
            return match.groupdict()
    return None


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


def filled(label: str, words: Mapping[str, str]) -> str:
    """The path of a label, with the words of its image. Raises InputError for another word."""
    path, *rest = WORD.split(label)
    for word, text in zip(rest[::2], rest[1::2]):
        if word not in words:
            raise InputError(f"--label {label}: {{{word}}} is not in --pattern")
        path += words[word] + text
    return path


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
    """ "a/b.nii.gz" -> ("a/b", ".nii.gz")."""
    stem = path.removesuffix(".gz").removesuffix(".nii")
    return stem, path[len(stem) :]


# --- whose an image is


def patients_of(config: MakeListConfig, dataset: DataSet | None) -> str:
    """The word before the names of the subjects, "" for none."""
    if config.patients or dataset is None:
        return config.patients
    return dataset.patients


def subjects_of(found: Sequence[Found], config: MakeListConfig, patients: str) -> dict[str, str]:
    """The subject of each image. Raises InputError where a table does not know one."""
    prefix = f"{patients}/" if patients else ""
    if not config.subjects:
        return {one.image: prefix + one.words["subject"] for one in found}

    table = table_of(Path(config.subjects))
    unknown = [one.words["subject"] for one in found if one.words["subject"] not in table]
    if unknown:
        raise InputError(
            f"--subjects {config.subjects}: has no line for {unknown[0]} "
            f"({counted(len(unknown), 'such image')})"
        )
    return {one.image: prefix + table[one.words["subject"]] for one in found}


def table_of(path: Path) -> dict[str, str]:
    """Name -> subject, of a CSV file with a line of headings. Raises InputError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--subjects {path}: not a CSV file in UTF-8 ({error})") from error

    for name, subject in TABLES:
        if lines and name in lines[0] and subject in lines[0]:
            return subjects_by_name(lines, name, subject, path)
    raise InputError(
        f'--subjects {path}: must have the columns "name" and "subject", or "Series UID" and '
        '"Subject ID" as metadata.csv of TCIA'
    )


def subjects_by_name(
    lines: Iterable[Mapping[str, str]], name: str, subject: str, path: Path
) -> dict[str, str]:
    table: dict[str, str] = {}
    for line in lines:
        known = table.setdefault(line[name], line[subject])
        if known != line[subject] or not known:
            raise InputError(
                f"--subjects {path}: {line[name]} must have one subject; it has "
                f"{known or 'none'} and {line[subject] or 'none'}"
            )
    return table


def source_of(config: MakeListConfig, dataset: DataSet | None, *, folder: str) -> dict[str, Any]:
    """What the list remembers of a folder: how its subjects are named."""
    by_series = dataset is not None and dataset.named_by == "series" and not config.subjects
    return {
        "folder": folder,
        "dataset": config.dataset,
        "patients": patients_of(config, dataset),
        "named_by": "series" if by_series else "patient",
    }


def check_naming(content: Mapping[str, Any], source: Mapping[str, Any], out: Path) -> None:
    """Raises InputError where one patient would be two: by the name, and by a series' UID."""
    for other in content["sources"]:
        same_patients = other["patients"] == source["patients"]
        if same_patients and other["named_by"] != source["named_by"]:
            raise InputError(
                f"{source['folder']}: {out} names the patients of {source['patients']} by "
                f"{other['named_by']} and this folder by {source['named_by']}, so one scan could "
                "be trained and validated on; give the folder of LUNA16 --subjects metadata.csv, "
                "of LIDC-IDRI"
            )


def check_no_namesakes(
    content: Mapping[str, Any], added: Sequence[Mapping[str, str]], *, folder: Path, out: Path
) -> None:
    """Raises InputError where two patients might become one.

    Only a word before the names says whether those of two calls are of the same patients.
    """
    known = {item.get("subject") for item in items_in(content)}
    for item in added:
        if item["subject"] in known:
            raise InputError(
                f"{folder}: subject {item['subject']} is in {out} already; is it one patient? "
                "--patients WORD keeps this folder's subjects apart; calls with one WORD share "
                "their patients"
            )


def items_in(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for part in ("training", "validation", "test"):
        items += content.get(part, [])
    return items


# --- what is written


def item_of(
    found: Found, modality: str, subject: str, *, folder: Path, out: Path
) -> dict[str, str]:
    """The item of the list."""
    item = {
        "image": relative(folder, found.image, out),
        "modality": modality,
        "subject": subject,
    }
    if found.label:
        item["label"] = relative(folder, found.label, out)
    return item


def relative(folder: Path, path: str, out: Path) -> str:
    """The path from the list's folder. Links above the folder are resolved, those below are not.

    "../x" from a folder that is a link leads to where the link points, not to where it is.
    """
    file = Path(os.path.realpath(folder)) / path
    return Path(os.path.relpath(file, os.path.realpath(out.parent))).as_posix()


def modality_of(found: Found, config: MakeListConfig, dataset: DataSet | None) -> str:
    """The modality that the list has for it. Raises InputError where nothing names one."""
    named = found.words.get("modality") or config.modality
    if not named and dataset and len(dataset.modalities) == 1:
        named = dataset.modalities[0]
    if not named:
        raise InputError("--modality: name it, as ct, or let --pattern have {modality}")

    modality = plain_modality(named)
    if modality not in MODALITIES:
        raise InputError(f"--modality {named}: not known; known are {', '.join(MODALITIES)}")
    return modality


def plain_modality(named: str) -> str:
    """A modality as the list has it: "T1Gd" -> "t1ce"."""
    return SPELLINGS.get(named.lower(), named.lower())


def not_yet_in(content: Mapping[str, Any], items: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The items whose image the list does not have yet."""
    known = {item.get("image") for item in items_in(content)}
    return [item for item in items if item["image"] not in known]


def add_classes(content: dict[str, Any], dataset: DataSet, out: Path) -> None:
    """Add the classes of the data set, if it has any.

    Raises InputError where the list has other classes.
    """
    if not dataset.labels:
        return
    classes: dict[str, Any] = {
        "labels": {str(label): name for label, name in enumerate(dataset.labels)}
    }
    if dataset.swap:
        classes["swap"] = [list(pair) for pair in dataset.swap]
    if dataset.tolerance_mm:
        classes["tolerance_mm"] = dict(dataset.tolerance_mm)

    if content.get("labels", classes["labels"]) != classes["labels"]:
        raise InputError(f"--out {out}: has other classes than {dataset.title}; write two lists")
    for key, value in classes.items():
        content.setdefault(key, value)


# --- what is printed


def report(
    folder: Path,
    search: Search,
    items: Sequence[Mapping[str, str]],
    dataset: DataSet | None,
) -> None:
    """What was found in the folder, how it was read, and what was left out."""
    subjects = sorted({item["subject"] for item in items})
    modalities = Counter(item["modality"] for item in items)
    each = ", ".join(f"{modality} {count}" for modality, count in sorted(modalities.items()))
    print(
        f"{folder}: {counted(len(items), 'image')} of {counted(len(subjects), 'subject')} "
        f"({each}); subjects as {subjects[0]}"
    )

    for line in lines_on_reading(search, items):
        print(f"  {line}")
    if dataset is not None:
        volumes = dataset.training + dataset.validation
        print(f"  the paper has {volumes} of each modality of {dataset.title}")
    for reason, paths in search.left_out.items():
        if paths:
            print(f"  left out, {reason}: {len(paths)}, as {paths[0]}")


def lines_on_reading(search: Search, items: Sequence[Mapping[str, str]]) -> list[str]:
    lines = []
    spelled = {one.words["modality"] for one in search.found if "modality" in one.words}
    for name in sorted(spelled):
        if plain_modality(name) != name:
            lines.append(f"{name} is read as {plain_modality(name)}")

    if search.without_label:
        count = counted(len(search.without_label), "image")
        lines.append(f"without a label: {count}, as {search.without_label[0]}")

    doubtful = in_two_folders(search.found)
    if doubtful:
        lines.append(f"warning: {doubtful}; if it is two patients, give each folder a --patients")

    alike = [one.image for one in search.found if looks_like_label(one.image)]
    if alike:
        lines.append(
            f"warning: {counted(len(alike), 'image')} may be labels, as {alike[0]}; "
            "name them by --label, or narrow --pattern"
        )
    return lines


def in_two_folders(found: Sequence[Found]) -> str:
    """A subject whose images are in two folders, neither of them its own, in words; or ""."""
    first_of: dict[str, Found] = {}
    for one in found:
        subject = one.words["subject"]
        first = first_of.setdefault(subject, one)
        if folder_of(first) != folder_of(one):
            return f"subject {subject} is in two folders, {first.image} and {one.image}"
    return ""


def folder_of(found: Found) -> PurePosixPath:
    """The folder with the name of the subject, as sub-01 of sub-01/ses-1/anat; else the file's."""
    parent = PurePosixPath(found.image).parent
    for folder in (parent, *parent.parents):
        if found.words["subject"] in folder.name:
            return folder
    return parent


def looks_like_label(path: str) -> bool:
    stem, _ = parted(path)
    return re.split(r"[_\-. /]", stem.lower())[-1] in LABEL_WORDS


def report_list(
    out: Path, content: Mapping[str, Any], *, added: int, known: int
) -> DataList | None:
    """What is in the list now, and whom a run of pre-training would hold out of it."""
    subjects = {item.get("subject") for item in items_in(content)}
    were = f", {known} were there already" if known else ""
    print(
        f"{out}: {counted(added, 'image')} added{were}; now "
        f"{counted(len(items_in(content)), 'image')} of {counted(len(subjects), 'subject')}"
    )
    if not content.get("training"):
        print("  nothing to train on yet")
        return None

    twice = files_of_one_series(content)
    if twice:
        print(f"  {twice}")

    items = load(str(out))
    trained = {item.subject for item in items.training}
    if is_drawn(items) and len(trained) > 1:
        split = hold_out_share(items)
        print(f"  pre-training holds out {len(split.validation)} of these images: {split.notes[0]}")
    return items


def files_of_one_series(content: Mapping[str, Any]) -> str:
    """How many files hold a scan that another holds too, where names are UIDs; or ""."""
    subject_of: dict[str, Any] = {}
    again = 0
    strangers = 0
    for item in items_in(content):
        stem, _ = parted(PurePosixPath(str(item.get("image"))).name)
        uid = CORRECTED.sub("", stem)
        if not re.fullmatch(r"\d+(\.\d+){5,}", uid):
            continue

        subject = item.get("subject")
        if uid in subject_of:
            again += 1
            strangers += subject_of[uid] != subject
        subject_of.setdefault(uid, subject)

    if strangers:
        return (
            f"warning: {counted(strangers, 'file')} hold a scan, by the UID of its series, that "
            "the list has under another subject: it may be trained and validated on"
        )
    return f"{counted(again, 'scan')} there twice, by the UID of the series" if again else ""


# --- the command line


def read_command(arguments: Sequence[str]) -> tuple[Path, MakeListConfig]:
    """The folder and the flags of this process. Raises InputError."""
    words = list(arguments)
    folder = words.pop(0) if words and not words[0].startswith("-") else ""
    config = from_command_line(
        MakeListConfig, prog=f"{PROG} FOLDER", description=__doc__, arguments=words
    )
    if not folder:
        raise InputError("name the folder first, as in " + PROG + " FOLDER --out list.json")
    return Path(folder).expanduser(), config


def run() -> None:
    folder, config = read_command(sys.argv[1:])
    main(folder, config)


if __name__ == "__main__":
    run_or_explain(run, PROG)
