"""Left and right in the names of classes, and the flips that are safe for them.

A left-right flip makes a left kidney look like a right one. It is safe where the list says which labels change places
(`"swap": [[2, 3]]`), where the list says that sides do not matter (`"swap": []`), or where no two classes can be the
left and the right one of a pair. Names are written in many ways (Left-Thalamus, Parotid_L, rkid), so what is read from
them only ever turns flips off, and says so; it never decides which labels change places.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from dae.errors import InputError

AXES = {0: "left-right", 1: "front-back", 2: "up-down"}
LEFT, RIGHT = "left", "right"
Pairs = Sequence[tuple[int, int]]

# Words that name a side wherever they stand. All in lower case.
WORDS = {
    LEFT: "left l lt lft lh lhs sinister sinistra sinistrum gauche links linke linker linkes izquierdo izquierda izq "
    "esquerdo esquerda sinistro sx lewy lewa lewe vänster venstre vasen левый левая левое 左 左侧 왼쪽",
    RIGHT: "right r rt rgt rh rhs dexter dextra dextrum droit droite rechts rechte rechter rechtes derecho derecha "
    "direito direita destro destra dx prawy prawa prawe höger højre høyre oikea правый правая правое 右 右侧 "
    "오른쪽",
}
# Words that name a side only where another class has the other one in their place: "rein g" and "rein d".
WORDS_OF_PAIRS = {LEFT: "g li sin izda sol", RIGHT: "d re dex dcha sag sağ"}
# Ordinary words that end in one that names a side.
NOT_SIDES = {"bright", "upright", "cleft"}
# Words that tell nothing about a class.
EMPTY_WORDS = {
    "class",
    "label",
    "organ",
    "roi",
    "region",
    "structure",
    "object",
    "part",
    "segment",
    "seg",
}


class Flips(NamedTuple):
    """What training does with left and right."""

    axes: tuple[int, ...]  # that are flipped: 0 left-right, 1 front-back, 2 up-down
    swap: tuple[tuple[int, int], ...]  # labels that change places
    swap_axes: tuple[int, ...]  # in a flip along which of the axes
    reason: str  # in one sentence

    def __str__(self) -> str:
        axes = ", ".join(f"{axis} ({AXES[axis]})" for axis in self.axes)
        return f"flips along axes {axes}: {self.reason}" if axes else f"no flips: {self.reason}"


def choose_flips(
    classes: Mapping[int, str], swap: Pairs | None, *, chance: float = 1.0, turned: bool = False
) -> Flips:
    """The axes that may be flipped, for the classes {label: name} of a list and its `swap` (None: it has none).

    `chance` is that of a flip. `turned` says that crops are also rotated by 180 degrees in the axial plane. Then a
    front-back flip can end as a left-right one, so that both are off together, and swap together.
    Raises InputError where `swap` names what is no class, or a class twice.
    """
    organs = {label: name for label, name in classes.items() if label != 0}
    check_swap(organs, swap)
    sideways = (0, 1) if turned else (0,)
    others = tuple(axis for axis in AXES if axis not in sideways)
    pairs = likely_pairs(organs)
    if chance == 0:
        return Flips((), (), (), "--flip is 0")
    if swap:
        named = {frozenset(pair) for pair in swap}
        missing = [pair for pair in pairs if frozenset(pair) not in named]
        missing_words = (
            f", which does not name {in_words(missing, organs)}; add {missing[0]}"
            if missing
            else ""
        )
        reason = (
            f'{in_words(swap, organs)} change places, as the list\'s "swap" says{missing_words}'
        )
        return Flips(tuple(AXES), tuple((a, b) for a, b in swap), sideways, reason)
    if swap is not None:
        return Flips(tuple(AXES), (), (), 'the list says "swap": [], so left and right are alike')
    if not (doubt := doubt_of(organs, pairs)):
        return Flips(
            tuple(AXES), (), (), "no two classes can be the left and the right one of a pair"
        )
    also = ", nor front and back (crops are also turned by 180 degrees)" if turned else ""
    return Flips(others, (), (), f"left and right are not flipped{also}, since {doubt}")


def flips_of(plan: Mapping[str, Any], config: Mapping[str, Any]) -> Flips:
    """What the network of a checkpoint was trained with. Plans of before name all axes where --flip was 0."""
    if config.get("flip", 1) == 0:
        return Flips((), (), (), "--flip was 0")
    axes, swap = tuple(plan["flip_axes"]), tuple((int(a), int(b)) for a, b in plan.get("swap", ()))
    return Flips(
        axes, swap, tuple(plan.get("swap_axes", (0,))) if swap else (), plan.get("flips", "")
    )


def continued(now: Flips, began: Flips, path: Path) -> Flips:
    """The flips of a run that goes on: those that it began with, whatever a new run would do.

    Raises InputError where it flipped left and right and that is not known to be safe.
    """
    if began[:3] == now[:3]:
        return now
    if 0 in began.axes and 0 not in now.axes:
        raise InputError(
            f"{path}: the run so far flipped left and right; {now.reason}; start it anew in another --out"
        )
    return began._replace(reason=f"as the run began; in a new one {now.reason}")


def check_swap(organs: Mapping[int, str], swap: Pairs | None) -> None:
    """Raises InputError where `swap` is no exchange of classes."""
    labels = [label for pair in swap or () for label in pair]
    if unknown := [label for label in labels if label not in organs]:
        known = ", ".join(map(str, organs))
        raise InputError(f'"swap" names label {unknown[0]}, which is no class; classes are {known}')
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f'"swap" names label {twice[0]} twice; each class changes places with one')


def doubt_of(organs: Mapping[int, str], pairs: Pairs) -> str:
    """Why a left-right flip may be wrong, with what to add to the list; "" where nothing is."""
    if not pairs and (alike := indistinct(organs)):
        pairs = [alike]
    if pairs:
        line = f'"swap": {[list(pair) for pair in pairs]}'
        like = "look like a pair" if len(pairs) == 1 else "look like pairs"
        return (
            f"{in_words(pairs, organs)} {like}; add {line} to the list if each is the mirror image "
            'of the other, or "swap": [] if left and right may be flipped as they are'
        )
    if sided := [name for name in organs.values() if side_of(name)]:
        return (
            f'{sided[0]!r} names a side; add "swap" to the list with the pairs of labels that change '
            'places, or "swap": [] if left and right may be flipped as they are'
        )
    return ""


def in_words(pairs: Pairs, organs: Mapping[int, str], most: int = 3) -> str:
    """'left kidney' and 'right kidney', 'lad' and 'rad' and 4 more"""
    named = ", ".join(f"{organs[a]!r} and {organs[b]!r}" for a, b in pairs[:most])
    return named + (f" and {len(pairs) - most} more" if len(pairs) > most else "")


# --- names


def words_of(name: str) -> list[str]:
    """A name split at whatever is no letter or digit, and at capitals: "LeftLung (a)" -> ["left", "lung", "a"]."""
    name = unicodedata.normalize(
        "NFKC", name
    )  # a Mac writes ö as o and a mark, which would end the word
    apart = re.sub(r"(?<=[a-zà-ÿ])(?=[A-ZÀ-Þ])|(?<=[A-ZÀ-Þ])(?=[A-ZÀ-Þ][a-zà-ÿ])", " ", name)
    return re.findall(r"[^\W_]+", apart.casefold())


def side_of(name: str) -> str:
    """The side that a name by itself speaks of, "left" or "right"; "" where it speaks of none, or of both."""
    found = {side for word in words_of(name) for side in sides_of_word(word)}
    return found.pop() if len(found) == 1 else ""


def sides_of_word(word: str) -> set[str]:
    """The sides that a word may speak of: "left", "l", "leftkidney", "kidneyleft"."""
    if word in NOT_SIDES:
        return set()
    found = set()
    for side, marks in WORDS.items():
        for mark in marks.split():
            joined = is_long(mark) and (word.startswith(mark) or word.endswith(mark))
            if word == mark or joined:
                found.add(side)
    return found


def is_long(mark: str) -> bool:
    """Whether a mark is known even where it is joined to another word."""
    return len(mark) >= 4 or not mark.isascii()


def likely_pairs(organs: Mapping[int, str]) -> list[tuple[int, int]]:
    """Labels of classes whose names differ by their side alone, each class in one pair at most."""
    pairs, paired = list[tuple[int, int]](), set[int]()
    for (a, one), (b, other) in combinations(organs.items(), 2):
        if not paired & {a, b} and are_a_pair(one, other):
            pairs.append((a, b))
            paired |= {a, b}
    return pairs


def are_a_pair(one: str, other: str) -> bool:
    """Whether two names are the same but for left in the one and right in the other."""
    a, b = words_of(one), words_of(other)
    if len(a) == len(b) and a != b:
        for here, there in ((LEFT, RIGHT), (RIGHT, LEFT)):
            if all(s == t or readings(s, here) & readings(t, there) for s, t in zip(a, b)):
                return True
    sides = side_of(one), side_of(other)
    return set(sides) == {LEFT, RIGHT} and without_sides(a) == without_sides(b)


def readings(word: str, side: str) -> set[tuple[str, str]]:
    """What is left of a word on either side of a mark of `side`: "lkid" as a left one gives ("", "kid")."""
    marks = WORDS[side].split()
    found = {("", "") for mark in (*marks, *WORDS_OF_PAIRS[side].split()) if word == mark}
    found |= {("", word[len(mark) :]) for mark in marks if word.startswith(mark) and word != mark}
    return found | {
        (word[: -len(mark)], "") for mark in marks if word.endswith(mark) and word != mark
    }


def without_sides(words: Sequence[str]) -> list[str]:
    """The words that name no side, in order of the alphabet: "kidney, left" is "left kidney"."""
    return sorted(word for word in words if not sides_of_word(word))


def indistinct(organs: Mapping[int, str]) -> tuple[int, int] | None:
    """Two classes that may be a pair as far as their names tell.

    Either the names tell nothing ("1", "class 2"), or a number alone tells the only two of a kind
    apart ("kidney 1", "kidney 2").
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for label, name in organs.items():
        words = [word.strip("0123456789") for word in words_of(name)]
        telling = tuple(word for word in words if len(word) > 1 and word not in EMPTY_WORDS)
        groups.setdefault(telling, []).append(label)
    for telling, labels in groups.items():
        if len(labels) == 2 or (len(labels) > 2 and not telling):
            return labels[0], labels[1]
    return None
