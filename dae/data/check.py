"""Read all that some lists name, once, and say whether a run may start.

    python -m dae.data.check LIST [LIST ...]
    python -m dae.data.check pretrain.json btcv.json --out runs/check

Several lists are looked at together: a volume that one trains on may be a test case of another,
under any name. --out gets check.json, with everything, and check.html, a page with histograms and
slices. The exit code is 0 where a run may start and 2 where it would be refused. Warnings stop
nothing.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from dae.config.check import CheckConfig
from dae.config.command_line import from_command_line, run_or_explain
from dae.data import overlaps
from dae.data.cache import default_folder, in_bytes
from dae.data.check_page import page_of
from dae.data.content import Turn
from dae.data.datalist import Item, check_channel_order, load
from dae.data.examine import RANGE, Examined, examine
from dae.data.fingerprint import (
    classes_of,
    fingerprint,
    regions_in,
    room_in_cache,
    suggested,
)
from dae.data.overlaps import PARTS, Finding, Listed, Place
from dae.data.preprocess import Recipe, by
from dae.errors import InputError, counted
from dae.evaluation.report import strict_json
from dae.evaluation.written import Written

PROG = "python -m dae.data.check"
NAMES = ("check.json", "check.html")
SAID = 12  # errors, and warnings, that are printed; check.json has all

A = TypeVar("A")
B = TypeVar("B")
Same = dict[tuple[int, int], Turn]  # two volumes -> how the second is turned


class Found(NamedTuple):
    """All that the lists name."""

    lists: list[Listed]
    places: list[tuple[Place, int]]  # where an item stands, and the index of its volume
    volumes: list[Examined]

    def volumes_of(self, listed: Listed, parts: Sequence[str] = PARTS) -> list[Examined]:
        """Those in some parts of a list."""
        numbers = []
        for place, n in self.places:
            if place.listed is listed and place.part in parts:
                numbers.append(n)
        return [self.volumes[n] for n in numbers]


def main(paths: Sequence[str], config: CheckConfig) -> int:
    """0 where a run may start, else 2. Raises InputError where --out or a flag cannot be used."""
    recipe = recipe_of(config)
    lists, findings = read_lists(paths, config)
    places, items = places_in(lists)
    out = Written(Path(config.out))
    out.check(NAMES, [*map(Path, paths), *files_of(items)])

    volumes = in_processes(partial(examine, recipe=recipe), items, "reading volumes", config)
    found = Found(lists, places, volumes)
    same = copies_in(volumes, config)
    groups = overlaps.groups_of(volumes, same)
    described = [describe_list(listed, found, config) for listed in lists]

    findings += findings_in_volumes(found)
    for listed in lists:
        findings += overlaps.check_split(listed)
    findings += findings_in_groups(found, groups, same)
    findings += overlaps.shared_subjects(lists)
    findings += findings_in_room(described)

    report = {
        "ok": not any(finding.is_error for finding in findings),
        "errors": [finding.line for finding in findings if finding.is_error],
        "warnings": [finding.line for finding in findings if not finding.is_error],
        "lists": described,
        "same_voxels": [describe_group(group, found) for group in groups],
        "volumes": [describe_volume(volume) for volume in volumes],
    }
    page = page_of(report, findings, volumes, config.pictures)
    with out.alone():
        out.write("check.json", partial(write, strict_json(report, indent=1).encode()))
        out.write("check.html", partial(write, page))
    print(in_words(report, out.folder))
    return 0 if report["ok"] else 2


def recipe_of(config: CheckConfig) -> Recipe:
    """As a run would prepare the volumes, at their own spacing. Raises InputError."""
    if len(config.ct_window) != 2 or config.ct_window[0] >= config.ct_window[1]:
        raise InputError("--ct-window: give the lower and the upper HU")
    return Recipe(ct_window=config.ct_window, mr_intensity=config.mr_intensity)


def write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


# --- lists, and the volumes that they name


def read_lists(paths: Sequence[str], config: CheckConfig) -> tuple[list[Listed], list[Finding]]:
    """The lists that can be read, and an error for each of the others."""
    lists = []
    findings = []
    for path in dict.fromkeys(paths):
        try:
            items = load(path, root=config.data_root, modality=config.modality)
            lists.append(overlaps.listed(path, items))
        except InputError as error:
            findings.append(Finding(True, str(error)))
    return lists, findings


def places_in(lists: Sequence[Listed]) -> tuple[list[tuple[Place, int]], list[Item]]:
    """Every item of every list with the index of its volume, and the volumes, each once."""
    places = []
    for listed in lists:
        for part in PARTS:
            places += [Place(listed, part, item) for item in listed.part(part)]

    # One list may have the labels of images that another pre-trains on.
    labels = {image_key(place.item): place.item.label for place in places if place.item.label}

    numbers: dict[tuple[object, ...], int] = {}
    items: list[Item] = []
    placed = []
    for place in places:
        item = place.item
        label = item.label or labels.get(image_key(item))
        key = (*image_key(item), item.intensity, label and label.resolve())
        if key not in numbers:
            numbers[key] = len(items)
            items.append(replace(item, label=label))
        placed.append((place, numbers[key]))
    return placed, items


def image_key(item: Item) -> tuple[object, ...]:
    """What two items of one image share, by whatever way the lists lead there."""
    return tuple(path.resolve() for path in item.image)


def files_of(items: Iterable[Item]) -> list[Path]:
    files: list[Path] = []
    for item in items:
        files += item.image
        if item.label:
            files.append(item.label)
    return files


# --- work in parallel


def in_processes(
    work: Callable[[A], B], tasks: Sequence[A], title: str, config: CheckConfig
) -> list[B]:
    """`work` on each of the tasks, in order, with a line that says how far it is.

    Raises InputError where a process dies.
    """
    options: dict[str, Any] = {"leave": False, "disable": not sys.stderr.isatty()}
    workers = min(config.workers, len(tasks))
    if workers <= 1:
        return list(tqdm(map(work, tasks), title, len(tasks), **options))

    with ProcessPoolExecutor(workers) as pool:
        try:
            return list(tqdm(pool.map(work, tasks), title, len(tasks), **options))
        except BrokenProcessPool as error:
            raise InputError(
                "--workers: a process that reads volumes has died; out of memory? take fewer"
            ) from error


def copies_in(volumes: Sequence[Examined], config: CheckConfig) -> Same:
    """Pairs of volumes that hold the same voxels in other values, and how the second is turned."""
    candidates = overlaps.pairs_to_compare(volumes)
    pairs = [pair for _, _, pair in candidates]
    turns = in_processes(overlaps.compare, pairs, "comparing volumes", config)

    same = {}
    for (a, b, _), turn in zip(candidates, turns):
        if turn is not None:
            same[a, b] = turn
    return same


# --- what was found


def findings_in_volumes(found: Found) -> list[Finding]:
    """What is wrong with each volume, and whether it stops a run of the lists that name it."""
    # Pre-training does not look at labels.
    labelled = {n for place, n in found.places if not place.listed.unlabelled}
    findings = []
    for n, volume in enumerate(found.volumes):
        findings += [Finding(True, line) for line in volume.errors]
        findings += [Finding(n in labelled, line) for line in volume.label_errors]
        findings += [Finding(False, line) for line in volume.warnings]

    for listed in found.lists:
        findings += findings_in_channels(found, listed)
    for place, n in found.places:
        items = place.listed.items
        unknown = found.volumes[n].labels.keys() - {*items.labels, items.ignore}
        if unknown and not place.listed.unlabelled:
            line = (
                f"{place.item.label}: label {min(unknown)} is not among the classes "
                f"that {place.listed.path} names"
            )
            findings.append(Finding(True, line))
    return findings


def findings_in_channels(found: Found, listed: Listed) -> list[Finding]:
    """A volume that has not as many channels as the first of its list, or has them in another
    order.
    """
    readable = [volume for volume in found.volumes_of(listed) if volume.channels]
    for volume in readable:
        count, first = len(volume.channels), len(readable[0].channels)
        if count != first:
            line = (
                f"{volume.item.image[0]}: {counted(count, 'channel')}, the first volume of "
                f"{listed.path} has {first}; one run takes one number of channels"
            )
            # `train_pretrain.py --channels apart` takes both.
            return [Finding(not listed.unlabelled, line)]
    try:
        check_channel_order(listed.items)
    except InputError as error:
        return [Finding(not listed.unlabelled, str(error))]
    return []


def findings_in_groups(found: Found, groups: Sequence[Sequence[int]], same: Same) -> list[Finding]:
    """What follows from the volumes that hold the same voxels, or are one file of two lists."""
    places: dict[int, list[Place]] = {}
    for place, n in found.places:
        places.setdefault(n, []).append(place)

    grouped = {n for group in groups for n in group}
    alone = [[n] for n in places if n not in grouped]
    findings = []
    for group in (*groups, *alone):
        members = []
        for n in group:
            members += [(place, n) for place in places[n]]
        for (a, n_a), (b, n_b) in combinations(members, 2):
            how = overlaps.how_alike(n_a, n_b, found.volumes, same)
            findings.append(overlaps.judge(a, b, how))
    return [finding for finding in findings if finding is not None]


def findings_in_room(described: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A cache that does not fit its disk."""
    findings = []
    for listed in described:
        room = listed["cache"]
        if room and room["bytes"] > room["free_bytes"]:
            line = (
                f"{listed['path']}: prepared volumes take {in_bytes(room['bytes'])} at "
                f"{by(listed['suggested']['spacing'])} mm, {in_bytes(room['free_bytes'])} are "
                "free; name another --cache-dir"
            )
            findings.append(Finding(False, line))
    return findings


# --- as JSON


def describe_list(listed: Listed, found: Found, config: CheckConfig) -> dict[str, Any]:
    """What a list is for, what is in it, and the flags that follow."""
    volumes = found.volumes_of(listed)
    flags = suggested(found.volumes_of(listed, ("training",)))
    folder = Path(config.cache_dir).expanduser() if config.cache_dir else default_folder()
    cache = {}
    if flags:
        used = (*listed.items.training, *listed.items.validation)
        cache = room_in_cache(used, flags["spacing"], folder)
    return {
        "path": listed.path,
        "purpose": listed.purpose,
        "unlabelled": listed.unlabelled,
        "items": {part: len(listed.part(part)) for part in PARTS},
        "suggested": flags,
        "flags": flags_in_words(flags),
        "cache": cache,
        "fingerprint": fingerprint(volumes),
        "classes": sizes_in(volumes, listed),
    }


def sizes_in(volumes: Sequence[Examined], listed: Listed) -> dict[str, Any]:
    """Of each class, or of each region, in how many volumes it is, and its size."""
    if listed.unlabelled:
        return {}
    if listed.items.regions:
        return regions_in(volumes, listed.items.regions)
    return classes_of(volumes, listed.items.labels)


def flags_in_words(flags: Mapping[str, Any]) -> str:
    """As they stand on a command line."""
    words = []
    for name, values in flags.items():
        if values:
            words.append(f"--{name.replace('_', '-')} {' '.join(f'{v:g}' for v in values)}")
    return " ".join(words)


def describe_group(group: Sequence[int], found: Found) -> list[dict[str, str]]:
    """Every place of the volumes that hold the same voxels."""
    described = []
    for place, n in found.places:
        if n in group:
            image = str(place.item.image[0])
            described.append({"image": image, "list": place.listed.path, "part": place.part})
    return described


def describe_volume(volume: Examined) -> dict[str, Any]:
    """All that is known of a volume, but for its pictures."""
    channels = []
    for channel in volume.channels:
        percentiles = {f"{q:g}": value for q, value in zip(RANGE, channel.percentiles)}
        channels.append(
            {
                "content": channel.content,
                "percentiles": percentiles,
                "at_window_ends": channel.at_ends,
                "histogram": {"ends": channel.ends, "counts": channel.histogram.tolist()},
            }
        )
    return {
        "image": [str(path) for path in volume.item.image],
        "label": str(volume.item.label) if volume.item.label else None,
        "modality": volume.item.modality_name,
        "subject": volume.item.subject,
        "sha256": volume.sha256,
        "stored_shape": volume.shape,
        "axes": volume.axes,
        "unit": volume.unit,
        "dtype": volume.dtype,
        "size": volume.size,
        "spacing_mm": volume.spacing,
        "channels": channels,
        "labels_ml": volume.labels,
        "errors": [*volume.errors, *volume.label_errors],
        "warnings": volume.warnings,
    }


# --- in words


def in_words(report: Mapping[str, Any], out: Path) -> str:
    """The short form of the report, for a terminal."""
    lines = []
    for listed in report["lists"]:
        lines += list_in_words(listed)
    for kind in ("errors", "warnings"):
        lines += some_of(report[kind], kind, out)

    copies = report["same_voxels"]
    if copies:
        lines.append(f"{counted(len(copies), 'image')} there more than once, by their voxels")
    lines.append(f"{out / 'check.html'} shows the volumes, {out / 'check.json'} has everything")
    stopped = counted(len(report["errors"]), "error")
    lines.append("a run may start" if report["ok"] else f"a run may not start: {stopped}")
    return "\n".join(lines)


def list_in_words(listed: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(f"{n} {part}" for part, n in listed["items"].items() if n)
    lines = [f"{listed['path']}: {listed['purpose']}, {parts}"]
    if listed["unlabelled"]:
        lines[0] += f" ({listed['unlabelled']})"
    for name, found in listed["fingerprint"].items():
        spacing = found["spacing_mm"]["median"]
        size = found["size"]["median"]
        mm = by([round(value, 2) for value in spacing])
        lines.append(f"  {name}: {counted(found['volumes'], 'volume')}, {by(size)} of {mm} mm")
    if listed["flags"]:
        room = listed["cache"]
        lines.append(f"  suggested: {listed['flags']}")
        lines.append(
            f"  the cache takes {in_bytes(room['bytes'])} at that spacing, "
            f"{in_bytes(room['free_bytes'])} are free"
        )
    return lines


def some_of(findings: Sequence[str], kind: str, out: Path) -> list[str]:
    """The first lines, and how many more there are."""
    if not findings:
        return []
    lines = [f"{kind}:", *(f"  {line}" for line in findings[:SAID])]
    if len(findings) > SAID:
        lines.append(f"  and {len(findings) - SAID} more in {out / 'check.json'}")
    return lines


# --- the command line


def read_command(arguments: Sequence[str]) -> tuple[list[str], CheckConfig]:
    """The lists and the flags of this process. Raises InputError."""
    words = list(arguments)
    paths = []
    while words and not words[0].startswith("-"):
        paths.append(words.pop(0))
    config = from_command_line(
        CheckConfig, prog=f"{PROG} LIST [LIST ...]", description=__doc__, arguments=words
    )
    if not paths:
        raise InputError(f"name the lists first, as in {PROG} list.json")
    return paths, config


def run() -> int:
    paths, config = read_command(sys.argv[1:])
    return main(paths, config)


if __name__ == "__main__":
    sys.exit(run_or_explain(run, PROG))
