"""Who is where: the same voxels, or the same subject, in two places of one list or of several.

A list is `to fine-tune on` if all that it trains and validates on has a label, and it names
classes; else it is to pre-train on. What is refused, and what is only said:

- within a list, what a run of it refuses: voxels that are trained on and also validated on, or, in
  fine-tuning, tested on. A list without a `validation` is divided as a run would divide it;
- between lists, voxels that one trains on and one to fine-tune on tests: refused. That one
  validates on them is said: pre-training sees a validation image without its label, and the
  numbers that count are those of the test;
- voxels that are twice in one part: said;
- one name of a subject in two lists: said. It may be one patient, or a name that both data sets
  happen to use.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dae.data import content, holdout, leaks
from dae.data.content import Turn
from dae.data.datalist import DataList, Item, check_all_labelled
from dae.data.examine import Examined
from dae.data.nifti import read_channels
from dae.data.preprocess import channel_of
from dae.errors import InputError, counted

Part = Literal["training", "validation", "test"]
PARTS: tuple[Part, ...] = ("training", "validation", "test")


class Listed(NamedTuple):
    """A list as it was read."""

    path: str
    items: DataList
    unlabelled: str  # why it cannot be fine-tuned on; empty where it can

    @property
    def purpose(self) -> str:
        return "to pre-train on" if self.unlabelled else "to fine-tune on"

    def part(self, name: Part) -> tuple[Item, ...]:
        parts = {
            "training": self.items.training,
            "validation": self.items.validation,
            "test": self.items.test,
        }
        return parts[name]


class Place(NamedTuple):
    """An item in a part of a list."""

    listed: Listed
    part: Part
    item: Item

    def __str__(self) -> str:
        return f"{self.item.image[0]} ({self.listed.path}, {self.part})"


class Finding(NamedTuple):
    """One thing that was found, in a line."""

    is_error: bool
    line: str


class Pair(NamedTuple):
    """Two channels that may hold the same voxels."""

    a: Item
    b: Item
    channels: tuple[int, int]
    turns: list[Turn]


def listed(path: str, items: DataList) -> Listed:
    """The list, and what it is for."""
    try:
        check_all_labelled(items, path)
    except InputError as error:
        return Listed(path, items, str(error))
    return Listed(path, items, "")


# --- the same voxels


def pairs_to_compare(volumes: Sequence[Examined]) -> list[tuple[int, int, Pair]]:
    """Two volumes, and a channel of each, whose signatures agree and whose values do not.

    Each content is looked at once: copies of equal values need no second look.
    """
    first: dict[str, tuple[int, int]] = {}
    for n, volume in enumerate(volumes):
        for c, channel in enumerate(volume.channels):
            first.setdefault(channel.content, (n, c))

    addresses = list(first.values())
    signatures = [volumes[n].channels[c].signature for n, c in addresses]
    pairs = []
    for i, j in content.alike(signatures):
        turns = content.turns_between(signatures[i], signatures[j])
        (a, channel_a), (b, channel_b) = addresses[i], addresses[j]
        if turns and a != b:
            pair = Pair(volumes[a].item, volumes[b].item, (channel_a, channel_b), turns)
            pairs.append((a, b, pair))
    return pairs


def compare(pair: Pair) -> Turn | None:
    """Both files read again and compared voxel by voxel: how `b` is turned, None where it differs.

    None as well where a file has gone since it was examined.
    """
    try:
        a = channel_of(read_channels(pair.a.image), pair.a)
        b = channel_of(read_channels(pair.b.image), pair.b)
    except InputError:
        return None
    return content.same_voxels(a.data[pair.channels[0]], b.data[pair.channels[1]], pair.turns)


def groups_of(volumes: Sequence[Examined], same: Mapping[tuple[int, int], Turn]) -> list[list[int]]:
    """The volumes that hold the same voxels, together; one that is alone is no group.

    `same` has the pairs of volumes whose voxels were compared and are the same.
    """
    links = list(same)
    first: dict[str, int] = {}
    for n, volume in enumerate(volumes):
        for channel in volume.channels:
            links.append((first.setdefault(channel.content, n), n))
    if not links:
        return []

    rows, columns = zip(*links)
    graph = coo_matrix(([1] * len(links), (rows, columns)), shape=(len(volumes), len(volumes)))
    _, group_of = connected_components(graph, directed=False)

    members: dict[int, list[int]] = {}
    for n, group in enumerate(group_of.tolist()):
        members.setdefault(group, []).append(n)
    return [group for group in members.values() if len(group) > 1]


def how_alike(
    a: int, b: int, volumes: Sequence[Examined], same: Mapping[tuple[int, int], Turn]
) -> str:
    """In words what two volumes of one group have in common."""
    if a == b:
        return "are one file"
    contents = {channel.content for channel in volumes[a].channels}
    if contents.intersection(channel.content for channel in volumes[b].channels):
        return "hold equal voxels"

    turn = same.get((a, b)) or same.get((b, a))
    turned = ", with their axes turned" if turn is not None and turn != content.AS_IT_IS else ""
    return f"hold the same voxels in another scale or rounding{turned}"


# --- is that a leak?


def judge(a: Place, b: Place, how: str) -> Finding | None:
    """What follows where two places hold the same voxels; None where that is as it should be."""
    if a.listed is b.listed:
        return judge_within(a, b, how)

    trained, other = (a, b) if a.part == "training" else (b, a)
    if trained.part != "training" or other.part == "training" or other.listed.unlabelled:
        return None
    if other.part == "test":
        return Finding(True, f"{trained} and {other} {how}: a test case would be trained on")
    return Finding(False, f"{trained} and {other} {how}: the network would know what validates")


def judge_within(a: Place, b: Place, how: str) -> Finding | None:
    """`judge` for two places of one list."""
    if a.part == b.part:
        if a.part == "training" and divided_by_split(a.listed, a.item, b.item):
            remedy = "a split puts them on both sides; remove one, or give both one subject"
            return Finding(True, f"{a} and {b} {how}: {remedy}")
        return Finding(False, f"{a} and {b} {how}: it counts twice; remove one of them")

    # Pre-training tests nothing.
    parts = {a.part, b.part}
    is_tested = "test" in parts and not a.listed.unlabelled
    is_error = "training" in parts and (is_tested or "validation" in parts)
    return Finding(is_error, f"{a} and {b} {how}: keep them in one part")


def divided_by_split(listed: Listed, a: Item, b: Item) -> bool:
    """Whether a run of the list may train on one of the two and validate on the other."""
    try:
        splits = splits_of(listed)
    except InputError:
        return False  # no run at all: `check_split` says so
    for split in splits:
        if (a in split.validation) != (b in split.validation):
            return True
    return False


def splits_of(listed: Listed) -> list[DataList]:
    """The list as a run divides it: its own split, each of its folds, or those that are drawn.

    Raises InputError where it cannot be divided.
    """
    items = listed.items
    if items.validation:
        return [items]
    if holdout.is_drawn(items) and listed.unlabelled:
        return [holdout.hold_out_share(items)]

    if items.splits:
        folds = list(range(len(items.splits)))
    elif holdout.has_folds(items):
        folds = sorted({item.fold for item in items.training if item.fold is not None})
    else:
        subjects = {item.subject for item in items.training}
        folds = list(range(min(holdout.FOLDS, len(subjects))))
    return [holdout.hold_out_fold(items, fold=fold) for fold in folds]


# --- the same subject


def check_split(listed: Listed) -> list[Finding]:
    """What a run of the list would refuse by names of files and subjects, and what it would say."""
    try:
        splits = splits_of(listed)
        for split in splits:
            leaks.check_sides(split, test=not listed.unlabelled)
    except InputError as error:
        return [Finding(True, f"{listed.path}: {error}")]

    doubt = leaks.doubts(splits[0], drawn=holdout.is_drawn(listed.items))
    if not doubt:
        return []
    return [Finding(False, f"{listed.path}: {doubt.removeprefix('warning: ')}")]


def shared_subjects(lists: Sequence[Listed]) -> list[Finding]:
    """Subjects by one name that one list trains on and another, to fine-tune on, holds out."""
    findings = []
    for a, b in combinations(lists, 2):
        for trained, held in ((a, b), (b, a)):
            if not held.unlabelled:
                findings += shared_by(trained, held)
    return findings


def shared_by(trained: Listed, held: Listed) -> list[Finding]:
    names = {item.subject for item in trained.items.training if item.subject_named}
    findings = []
    for part in PARTS[1:]:
        known = [item for item in held.part(part) if item.subject_named and item.subject in names]
        subjects = sorted({item.subject for item in known})
        if subjects:
            line = (
                f"{trained.path} trains on {counted(len(subjects), 'subject')} of the {part} of "
                f"{held.path} by name, as {subjects[0]}: one patient, or two of one name?"
            )
            findings.append(Finding(False, line))
    return findings
