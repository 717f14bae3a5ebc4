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
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dae.config.command_line import from_command_line, run_or_explain
from dae.config.lists import MakeListConfig
from dae.data.datalist import MODALITIES, DataList, load
from dae.data.datasets import DATASETS, DataSet
from dae.data.holdout import hold_out_share, is_drawn
from dae.data.listfile import check_name, lies_within, read_json, root_of
from dae.data.patterns import CORRECTED, Found, Search, find, parted, plain_modality
from dae.errors import InputError, counted
from dae.files import write_atomic

PROG = "python -m dae.data.make_list"

PARTS = ("training", "validation", "test")

# A last word that says that a file is no image.
LABEL_WORDS = ("seg", "dseg", "segmentation", "label", "labels", "mask")

# Columns of a table of subjects: what {subject} stands for in the pattern, whose it is.
TABLES = (("name", "subject"), ("Series UID", "Subject ID"))

ANYWHERE = "/"  # as --data-root: this command writes what the user has named

# What a list remembers of each folder; see `source_of`.
SOURCE_KEYS = {"folder", "dataset", "patients", "named_by"}


# --- the command


def main(folder: Path, config: MakeListConfig) -> DataList | None:
    """Write the list, print what is in it, and return it as a run will read it.

    None where it has nothing to train on yet. Raises InputError.
    """
    dataset = DATASETS[config.dataset] if config.dataset else None
    out = Path(config.out)
    content = content_of(out, add=config.add, root=config.data_root)
    start = start_of(folder, out, config.data_root)

    # What is there, and whose it is.
    search = find_images(folder, config, dataset)
    patients = patients_of(config, dataset)
    names = subjects_of(search.found, config, patients)

    # Names of this folder must not join two patients of the list, nor divide one.
    source = source_of(config, dataset, folder=relative(folder, "", start))
    check_naming(content, source, out)
    items = []
    for found in search.found:
        modality = modality_of(found, config, dataset)
        items.append(item_of(found, modality, names[found.image], folder=folder, start=start))
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
    return report_list(out, content, config, added=len(added), known=len(items) - len(added))


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def start_of(folder: Path, out: Path, data_root: str) -> Path:
    """The folder that the paths of the list start from. Raises InputError where it is none."""
    root = root_of(data_root, out.parent)
    if data_root and root.bound is not None and not lies_within(folder.absolute(), root.bound):
        raise InputError(f"--data-root {data_root}: {folder} is not in it; name a folder above it")
    return root.start


def content_of(out: Path, *, add: bool, root: str) -> dict[str, Any]:
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
    for part in PARTS:
        items = content.get(part, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise InputError(f'--out {out}: "{part}" is no list of items; mend it by hand')
    if content.get("training"):
        load(str(out), root=root or ANYWHERE)  # refuses what was spoilt by hand
    return content


def are_sources(sources: Any) -> bool:
    """Whether this is what the command leaves in a list under "sources"."""
    if not isinstance(sources, list):
        return False
    return all(isinstance(source, dict) and set(source) >= SOURCE_KEYS for source in sources)


# --- which images


def find_images(folder: Path, config: MakeListConfig, dataset: DataSet | None) -> Search:
    """The images by the patterns of the command line, else by those of the data set.

    Raises InputError.
    """
    if config.pattern or dataset is None:
        if not config.pattern:
            raise InputError("--pattern: name how the images are called, or --dataset")
        return find(folder, config.pattern, config.label, all_must_fit=True)

    if config.label:
        return find(folder, dataset.patterns, config.label)
    return find(folder, dataset.patterns, dataset.label, label_must_fit=False)


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
    for part in PARTS:
        items += content.get(part, [])
    return items


# --- what is written


def item_of(
    found: Found, modality: str, subject: str, *, folder: Path, start: Path
) -> dict[str, str]:
    """The item of the list. Raises InputError where a name cannot be in a list."""
    for name in (found.image, found.label, subject):
        check_name(name, f"{folder}: the name")
    item = {
        "image": relative(folder, found.image, start),
        "modality": modality,
        "subject": subject,
    }
    if found.label:
        item["label"] = relative(folder, found.label, start)
    return item


def relative(folder: Path, path: str, start: Path) -> str:
    """The path from `start`. Links above the folder are resolved, those below are not.

    "../x" from a folder that is a link leads to where the link points, not to where it is.
    """
    file = Path(os.path.realpath(folder)) / path
    return Path(os.path.relpath(file, os.path.realpath(start))).as_posix()


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
    out: Path, content: Mapping[str, Any], config: MakeListConfig, *, added: int, known: int
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

    items = load(str(out), root=config.data_root or ANYWHERE)
    line = root_in_words(out, content, config.data_root)
    if line:
        print(f"  {line}")
    trained = {item.subject for item in items.training}
    if is_drawn(items) and len(trained) > 1:
        split = hold_out_share(items)
        print(f"  pre-training holds out {len(split.validation)} of these images: {split.notes[0]}")
    return items


def root_in_words(out: Path, content: Mapping[str, Any], data_root: str) -> str:
    """The flag that commands need to read the list, or ""."""
    if data_root:
        return f"commands that read it need --data-root {data_root}"
    for item in items_in(content):
        if not lies_within(out.parent / str(item.get("image")), out.parent):
            return (
                "its images lie outside its folder: commands that read it need "
                f"--data-root {ANYWHERE}, unless it is written into a folder above them"
            )
    return ""


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
