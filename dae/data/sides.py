"""Left and right in the names of classes, and the flips that are safe for them.

A left-right flip makes a left kidney look like a right one. It is safe where the list says which
labels change places (`"swap": [[2, 3]]`), where the list says that sides do not matter
(`"swap": []`), or where no two classes can be the left and the right one of a pair.

Names are written in many ways (Left-Thalamus, Parotid_L, rkid), so what is read from them only ever
turns flips off, and says so; it never decides which labels change places.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dae.errors import InputError

Side = Literal["left", "right"]
Pairs = Sequence[tuple[int, int]]

AXES = {0: "left-right", 1: "front-back", 2: "up-down"}
ALL_AXES = tuple(AXES)

# Words that name a side wherever they are in a name. All in lower case.
WORDS: dict[Side, str] = {
    "left": "left l lt lft lh lhs sinister sinistra sinistrum gauche links linke linker linkes "
    "izquierdo izquierda izq esquerdo esquerda sinistro sx lewy lewa lewe vänster venstre vasen "
    "левый левая левое 左 左侧 왼쪽",
    "right": "right r rt rgt rh rhs dexter dextra dextrum droit droite rechts rechte rechter "
    "rechtes derecho derecha direito direita destro destra dx prawy prawa prawe höger højre "
    "høyre oikea правый правая правое 右 右侧 오른쪽",
}

# Words that name a side only where another class has the opposite one in their place: "rein g" and
# "rein d".
WORDS_OF_PAIRS: dict[Side, str] = {
    "left": "g li sin izda sol",
    "right": "d re dex dcha sag sağ",
}

# Ordinary words that end in one that names a side.
NOT_SIDES = {"bright", "upright", "cleft"}

# Words that tell nothing about a class.
EMPTY_WORDS = "class label organ roi region structure object part segment seg"


class Flips(NamedTuple):
    """What training does with left and right."""

    axes: tuple[int, ...]  # that are flipped: 0 left-right, 1 front-back, 2 up-down
    swap: tuple[tuple[int, int], ...]  # labels that change places
    swap_axes: tuple[int, ...]  # in a flip along which of the axes
    reason: str  # in one sentence

    def __str__(self) -> str:
        if not self.axes:
            return f"no flips: {self.reason}"
        axes = ", ".join(f"{axis} ({AXES[axis]})" for axis in self.axes)
        return f"flips along axes {axes}: {self.reason}"


# --- which axes are flipped


def choose_flips(
    classes: Mapping[int, str],
    swap: Pairs | None,
    *,
    chance: float = 1.0,
    turned: bool = False,
    regions: Sequence[str] = (),
) -> Flips:
    """The axes that may be flipped, for the classes {label: name} of a list and its `swap`.

    `swap` is None where the list has none. `chance` is that of a flip. `turned` says that crops are
    also rotated by 180 degrees in the axial plane. Then a front-back flip can end as a left-right
    one, so that both are off together, and swap together. `regions` are the names of regions, which
    need not all be names of `classes`.

    Raises InputError where `swap` names what is no class, or a class twice.
    """
    organs = {label: name for label, name in classes.items() if label != 0}
    check_swap(organs, swap)
    if chance == 0:
        return Flips((), (), (), "--flip is 0")

    sideways = (0, 1) if turned else (0,)
    pairs = likely_pairs(organs)

    # The list says which labels change places.
    if swap:
        pairs_to_swap = tuple((a, b) for a, b in swap)
        return Flips(ALL_AXES, pairs_to_swap, sideways, reason_of_swap(swap, pairs, organs))

    # The list says that sides do not matter.
    if swap is not None:
        reason = 'the list says "swap": [], so left and right are alike'
        return Flips(ALL_AXES, (), (), reason)

    # The list does not say: names decide whether left and right are flipped.
    doubt = doubt_of(organs, pairs, regions)
    if not doubt:
        reason = "no names of two classes were recognised as the left and the right one of a pair"
        return Flips(ALL_AXES, (), (), reason)

    also = ", nor front and back (crops are also turned by 180 degrees)" if turned else ""
    others = tuple(axis for axis in ALL_AXES if axis not in sideways)
    return Flips(others, (), (), f"left and right are not flipped{also}, since {doubt}")


def check_swap(organs: Mapping[int, str], swap: Pairs | None) -> None:
    """Raises InputError where `swap` is no exchange of classes."""
    labels: list[int] = []
    for pair in swap or ():
        labels += pair

    for label in labels:
        if label not in organs:
            known = ", ".join(map(str, organs))
            raise InputError(f'"swap" names label {label}, which is no class; classes are {known}')
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f'"swap" names label {label} twice; each class changes places with one'
            )


def reason_of_swap(swap: Pairs, pairs: Pairs, organs: Mapping[int, str]) -> str:
    """What changes places, and which pairs look as if they should and do not."""
    reason = f'{pairs_in_words(swap, organs)} change places, as the list\'s "swap" says'
    swapped = {frozenset(pair) for pair in swap}
    missing = [pair for pair in pairs if frozenset(pair) not in swapped]
    if missing:
        reason += f", which does not name {pairs_in_words(missing, organs)}; add {missing[0]}"
    return reason


def doubt_of(organs: Mapping[int, str], pairs: Pairs, regions: Sequence[str] = ()) -> str:
    """Why a left-right flip may be wrong, with what to add to the list; "" where nothing is."""
    if not pairs:
        pairs = indistinct(organs)
    if pairs:
        line = f'"swap": {[list(pair) for pair in pairs]}'
        like = "look like a pair" if len(pairs) == 1 else "look like pairs"
        return (
            f"{pairs_in_words(pairs, organs)} {like}; add {line} to the list if each is the mirror "
            'image of the other, or "swap": [] if left and right may be flipped as they are'
        )

    for name in (*organs.values(), *regions):
        if side_of(name):
            return (
                f'{name!r} names a side; add "swap" to the list with the pairs of labels that '
                'change places, or "swap": [] if left and right may be flipped as they are'
            )
    return ""


def pairs_in_words(pairs: Pairs, organs: Mapping[int, str], most: int = 3) -> str:
    """'left kidney' and 'right kidney', 'lad' and 'rad' and 4 more"""
    named = ", ".join(f"{organs[a]!r} and {organs[b]!r}" for a, b in pairs[:most])
    if len(pairs) > most:
        named += f" and {len(pairs) - most} more"
    return named


# --- flips of a run that was saved


def flips_of(plan: Mapping[str, Any], config: Mapping[str, Any]) -> Flips:
    """What the network of a checkpoint was trained with."""
    # Older plans name all axes even where --flip was 0.
    if config.get("flip", 1) == 0:
        return Flips((), (), (), "--flip was 0")

    axes = tuple(plan["flip_axes"])
    swap = tuple((int(a), int(b)) for a, b in plan.get("swap", ()))
    swap_axes = tuple(plan.get("swap_axes", (0,))) if swap else ()
    return Flips(axes, swap, swap_axes, plan.get("flips", ""))


def continued(now: Flips, began: Flips, path: Path) -> Flips:
    """The flips of a run that goes on: those that it began with, whatever a new run would do.

    Raises InputError where it flipped left and right and that is not known to be safe.
    """
    if began[:3] == now[:3]:
        return now
    if 0 in began.axes and 0 not in now.axes:
        raise InputError(
            f"{path}: the run so far flipped left and right; {now.reason}; "
            "start it anew in another --out"
        )
    return began._replace(reason=f"as the run began; in a new one {now.reason}")


# --- pairs of classes


def likely_pairs(organs: Mapping[int, str]) -> list[tuple[int, int]]:
    """Labels of classes whose names differ by their side alone, each class in one pair at most."""
    pairs: list[tuple[int, int]] = []
    paired: set[int] = set()
    for (a, name_a), (b, name_b) in combinations(organs.items(), 2):
        if a in paired or b in paired:
            continue
        if are_a_pair(name_a, name_b):
            pairs.append((a, b))
            paired |= {a, b}
    return pairs


def are_a_pair(name_a: str, name_b: str) -> bool:
    """Whether two names are the same but for left in the one and right in the other."""
    a = words_of(name_a)
    b = words_of(name_b)
    if len(a) == len(b) and a != b and (are_opposite(a, b) or are_opposite(b, a)):
        return True

    # The side may be in another place: "left kidney" and "kidney, right".
    sides = {side_of(name_a), side_of(name_b)}
    return sides == {"left", "right"} and without_sides(a) == without_sides(b)


def are_opposite(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether each word of the one is that of the other, or its opposite."""
    for word, opposite in zip(left, right):
        alike = word == opposite
        if not alike and not stems(word, "left") & stems(opposite, "right"):
            return False
    return True


def stems(word: str, side: Side) -> set[tuple[str, str]]:
    """What is before and after a mark of `side` in a word, one of them empty.

    "lkid" as a left one gives ("", "kid"). A word that is itself a mark gives ("", "").
    """
    found = set()
    if word in WORDS_OF_PAIRS[side].split():
        found.add(("", ""))
    for mark in WORDS[side].split():
        if word.startswith(mark):
            found.add(("", word[len(mark) :]))
        if word.endswith(mark):
            found.add((word[: -len(mark)], ""))
    return found


def indistinct(organs: Mapping[int, str]) -> list[tuple[int, int]]:
    """The first two classes that may be a pair as far as their names tell, or none.

    Either the names tell nothing ("1", "class 2"), or a number alone tells the only two of a kind
    apart ("kidney 1", "kidney 2"). Labels of one name are one region, and no pair.
    """
    labels_of: dict[tuple[str, ...], list[int]] = {}
    known: set[str] = set()
    for label, name in organs.items():
        if name not in known or not name:  # labels without a name are no region
            labels_of.setdefault(telling_words(name), []).append(label)
        known.add(name)

    for words, labels in labels_of.items():
        if len(labels) == 2 or (len(labels) > 2 and not words):
            return [(labels[0], labels[1])]
    return []


def telling_words(name: str) -> tuple[str, ...]:
    """The words that say what a class is, without numbers and single letters."""
    words = [word.strip("0123456789") for word in words_of(name)]
    return tuple(word for word in words if len(word) > 1 and word not in EMPTY_WORDS.split())


# --- words of a name


def words_of(name: str) -> list[str]:
    """A name split at whatever is no letter or digit, and at capitals.

    "LeftLung (a)" -> ["left", "lung", "a"]
    """
    # A Mac writes ö as o and a mark, which would end the word.
    name = unicodedata.normalize("NFKC", name)

    before_capital = r"(?<=[a-zà-ÿ])(?=[A-ZÀ-Þ])"
    after_capitals = r"(?<=[A-ZÀ-Þ])(?=[A-ZÀ-Þ][a-zà-ÿ])"
    spaced = re.sub(f"{before_capital}|{after_capitals}", " ", name)
    return re.findall(r"[^\W_]+", spaced.casefold())


def side_of(name: str) -> str:
    """The side that a name by itself speaks of; "" where it speaks of none, or of both."""
    sides: set[Side] = set()
    for word in words_of(name):
        sides |= sides_of_word(word)
    return sides.pop() if len(sides) == 1 else ""


def sides_of_word(word: str) -> set[Side]:
    """The sides that a word may speak of: "left", "l", "leftkidney", "kidneyleft"."""
    sides: set[Side] = set()
    if word in NOT_SIDES:
        return sides
    for side, marks in WORDS.items():
        for mark in marks.split():
            is_joined = word.startswith(mark) or word.endswith(mark)
            if word == mark or (is_joined and is_long(mark)):
                sides.add(side)
    return sides


def is_long(mark: str) -> bool:
    """Whether a mark is known even where it is joined to another word."""
    return len(mark) >= 4 or not mark.isascii()


def without_sides(words: Sequence[str]) -> list[str]:
    """The words that name no side, in alphabetical order: "kidney, left" is "left kidney"."""
    return sorted(word for word in words if not sides_of_word(word))
