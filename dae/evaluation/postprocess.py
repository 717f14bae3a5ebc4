"""What may be mended in a predicted label map, and how to find out on validation cases whether mending helps.

Three steps, each of one class: keep its largest components, fill its holes, smooth its boundary. A plan says which
classes get which, and is JSON: {"2": [{"do": "largest_components", "keep": 1}, {"do": "fill_holes"}]}. `choose` makes
a plan the way nnU-Net does (Isensee et al., Nature Methods 2021): a step is kept where it raises the mean Dice of its
class and lowers that of no other. It counts the components of the truth first: of two kidneys both are kept.

Label maps are (d, h, w), spacing is in mm, and voxels of a class touch by faces, edges and corners (26 neighbours).
No function writes into the map it is given. All work is done in the box of one class, which is most of the speed.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dae.errors import InputError
from dae.evaluation.cases import Case, Spacing
from dae.evaluation.metrics import Labels, Mask, count_voxels, refuse, spread
from dae.files import write_bytes

Step = dict[str, Any]  # {"do": name of the step, and its settings}
Plan = dict[int, list[Step]]
Box = tuple[slice, slice, slice]

REACH = 3  # standard deviations after which a Gaussian is taken for zero
AN_ORGAN = 0.05  # of its class's volume: a true component of less is a slip of the annotator's hand

CANDIDATES: Sequence[Step] = (
    {"do": "largest_components"},
    {"do": "fill_holes"},
    {"do": "smooth_boundary", "sigma_mm": 0.5},
    {"do": "smooth_boundary", "sigma_mm": 1.0},
    {"do": "smooth_boundary", "sigma_mm": 2.0},
)


def box_of(labels: Labels, cls: int, margin: Sequence[int] = (0, 0, 0)) -> Box | None:
    """The smallest box that holds a class, with a margin of voxels where the map has them; None for no such voxel."""
    mask = labels == cls
    along = [np.flatnonzero(mask.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not len(along[0]):
        return None
    d, h, w = (slice(max(int(at[0]) - m, 0), int(at[-1]) + 1 + m) for at, m in zip(along, margin))
    return d, h, w


def components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Each voxel's component, from 1, and the number of voxels of each: (d, h, w) and (n,)."""
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts, np.bincount(parts.ravel())[1:]


def largest_components(labels: Labels, cls: int, keep: int = 1) -> Labels:
    """All but the `keep` largest components of a class become background."""
    refuse(keep < 1, f"largest_components must keep 1 or more, not {keep}")
    box, result = box_of(labels, cls), labels.copy()
    if box:
        parts, sizes = components(labels[box] == cls)
        largest = 1 + np.argsort(-sizes, kind="stable")[:keep]
        result[box][(parts > 0) & ~np.isin(parts, largest)] = 0
    return result


def fill_holes(labels: Labels, cls: int) -> Labels:
    """Background that a class shuts in on all sides becomes that class; another organ in the hole stays.

    What is inside touches the outside by faces alone, or it would leak through a wall that touches by corners.
    """
    box, result = box_of(labels, cls), labels.copy()
    if box:
        gaps, _ = ndimage.label(np.pad(labels[box] != cls, 1, constant_values=True))
        holes = (
            gaps[1:-1, 1:-1, 1:-1] > 1
        )  # gap 1 is the outside, which the padding joins and is met first
        result[box][holes & (labels[box] == 0)] = cls
    return result


def smooth_boundary(labels: Labels, cls: int, spacing: Spacing, sigma_mm: float) -> Labels:
    """The boundary of a class, moved to where its blurred mask and its strongest neighbour's are level.

    All labels around are blurred with a Gaussian of `sigma_mm`; a voxel becomes the class where that is the highest,
    and a voxel that the class loses goes to the highest of the others. A class that would vanish keeps its voxels.
    """
    refuse(
        not 0 <= sigma_mm < inf, f"smooth_boundary needs a sigma_mm of 0 or more, not {sigma_mm}"
    )
    sigma = [sigma_mm / mm for mm in spacing]
    box, result = (
        box_of(labels, cls, [2 * int(np.ceil(REACH * s)) + 1 for s in sigma]),
        labels.copy(),
    )
    if not box or not sigma_mm:
        return result
    old = labels[box]
    own, rival, best = (
        np.zeros(old.shape, np.float32),
        np.full(old.shape, -1, np.float32),
        np.zeros_like(old),
    )
    for value in np.unique(old):
        blurred = ndimage.gaussian_filter(
            (old == value).astype(np.float32), sigma, mode="nearest", truncate=REACH
        )
        if value == cls:
            own = blurred
        else:
            best[blurred > rival] = value
            rival = np.maximum(rival, blurred)
    new = np.where(own > rival, cls, np.where((own < rival) & (old == cls), best, old))
    for value in np.setdiff1d(old, new):
        new[old == value] = value
    result[box] = new
    return result


STEPS: dict[str, Callable[..., Labels]] = {
    "largest_components": lambda labels, cls, spacing, keep=1: largest_components(
        labels, cls, keep
    ),
    "fill_holes": lambda labels, cls, spacing: fill_holes(labels, cls),
    "smooth_boundary": smooth_boundary,
}


def take(step: Step, labels: Labels, cls: int, spacing: Spacing) -> Labels:
    """One step, as a plan has it, of one class."""
    settings = {name: value for name, value in step.items() if name != "do"}
    return STEPS[step["do"]](labels, cls, spacing, **settings)


def apply(labels: Labels, plan: Plan, spacing: Spacing) -> Labels:
    """All steps of a plan in its order: (d, h, w) -> (d, h, w) of the same type."""
    for cls, steps in plan.items():
        for step in steps:
            labels = take(step, labels, cls, spacing)
    return labels


def save(plan: Plan, path: Path) -> None:
    write_bytes(path, json.dumps(plan, indent=1).encode())


def load(path: Path) -> Plan:
    """The plan in a JSON file, by itself or beside other things as "plan". Raises InputError on what is not one."""
    try:
        content = json.loads(path.read_text())
        plan = {
            int(cls): [dict(step) for step in steps]
            for cls, steps in content.get("plan", content).items()
        }
        for (
            steps
        ) in plan.values():  # a wrong name or setting is met here, not after an hour of prediction
            apply(np.ones((1, 1, 1), np.uint8), {1: steps}, (1.0, 1.0, 1.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a post-processing plan ({type(error).__name__}: {error})"
        ) from error
    return plan


class Organs(NamedTuple):
    """The true components of one class in its box, numbered; the smallest are left out, and zero."""

    box: Box
    parts: NDArray[np.int32]
    number: int


class Outcome(NamedTuple):
    """How good all cases are: mean Dice of each class, and the (case, component) of one class that are met."""

    dice: dict[int, float]
    met: set[tuple[int, int]]


def choose(
    cases: Sequence[Case], classes: Mapping[int, str], candidates: Sequence[Step] = CANDIDATES
) -> tuple[Plan, list[dict[str, Any]]]:
    """A plan for what is to come, from cases whose truth is known; and a row for every step that was tried.

    Class by class, and for each the kinds of step in the order of the candidates; of several settings of one kind the
    best. A step stays if the mean Dice of its class rises, that of no other class falls, and no true component that the
    prediction has met is lost. Rows: class, name, step, dice_before, dice_after, change, kept, why.
    """
    refuse(not cases, "a plan is chosen on cases, and there are none")
    maps, plan, table = [case.prediction for case in cases], Plan(), list[dict[str, Any]]()
    for cls in (cls for cls in classes if cls):
        organs = [organs_of(case.truth, cls) for case in cases]
        for kind in dict.fromkeys(step["do"] for step in candidates):
            before = outcome(maps, cases, classes, cls, organs)
            steps = [with_count(step, organs) for step in candidates if step["do"] == kind]
            after = [
                outcome(taken(step, maps, cases, cls), cases, classes, cls, organs)
                for step in steps
            ]
            objections = [objection(before, each, cls, classes) for each in after]
            allowed = [n for n, why in enumerate(objections) if not why]
            best = max(allowed, key=lambda n: after[n].dice[cls], default=None)
            for n, step in enumerate(steps):
                why = objections[n] or ("" if n == best else "another setting is better")
                table.append(
                    row(cls, classes[cls], step, before.dice[cls], after[n].dice[cls], why)
                )
            if best is not None:
                plan.setdefault(cls, []).append(steps[best])
                maps = list(taken(steps[best], maps, cases, cls))
    return plan, table


def organs_of(truth: Labels, cls: int) -> Organs | None:
    """What must not be lost; None where the truth has nothing of the class."""
    box = box_of(truth, cls)
    if not box:
        return None
    parts, sizes = components(truth[box] == cls)
    slips = 1 + np.flatnonzero(sizes < AN_ORGAN * sizes.sum())
    parts[np.isin(parts, slips)] = 0
    return Organs(box, parts, len(sizes) - len(slips))


def with_count(step: Step, organs: Sequence[Organs | None]) -> Step:
    """The step; of components it keeps no fewer than the case that truly has the most."""
    if step["do"] != "largest_components":
        return step
    return {**step, "keep": max([step.get("keep", 1), *(each.number for each in organs if each)])}


def taken(step: Step, maps: Iterable[Labels], cases: Iterable[Case], cls: int) -> Iterator[Labels]:
    """The maps of all cases after a step, one at a time."""
    return (take(step, labels, cls, case.spacing) for labels, case in zip(maps, cases))


def outcome(
    maps: Iterable[Labels],
    cases: Sequence[Case],
    classes: Iterable[int],
    cls: int,
    organs: Sequence[Organs | None],
) -> Outcome:
    """The mean Dice of every class over the cases that have it, and what is met of `cls`."""
    scored, dice, met = (
        [each for each in classes if each],
        list[list[float]](),
        set[tuple[int, int]](),
    )
    for n, (labels, case, its) in enumerate(zip(maps, cases, organs)):
        counts = count_voxels(labels[case.annotated], case.truth[case.annotated], scored)
        dice.append(
            [
                2 * both / (predicted + true) if predicted + true else nan
                for predicted, true, both in counts
            ]
        )
        if its:
            met |= {
                (n, part) for part in np.unique(its.parts[labels[its.box] == cls]).tolist() if part
            }
    return Outcome({each: spread(values)["mean"] for each, values in zip(scored, zip(*dice))}, met)


def objection(before: Outcome, after: Outcome, cls: int, classes: Mapping[int, str]) -> str:
    """Why a step should not be taken, or nothing."""
    worse = [classes[each] for each in after.dice if after.dice[each] < before.dice[each]]
    if worse:
        return f"lowers the Dice of {worse[0]}"
    if lost := before.met - after.met:
        return f"loses {len(lost)} true components"
    return "" if after.dice[cls] > before.dice[cls] else "does not raise Dice"


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """What `choose` tried, a line each; what it kept has a plus."""
    wide = max(len(line["name"]) for line in table)
    return "\n".join(
        f"{'+' if line['kept'] else ' '} {line['name']:{wide}}  {' '.join(map(str, line['step'].values())):21}  "
        f"Dice {line['dice_before']:.4f} to {line['dice_after']:.4f}  {line['why']}"
        for line in table
    )


def row(cls: int, name: str, step: Step, before: float, after: float, why: str) -> dict[str, Any]:
    """One line of the table that says what was tried."""
    scores = {"dice_before": before, "dice_after": after, "change": after - before}
    return {
        "class": cls,
        "name": name,
        "step": step,
        **scores,
        "kept": not why,
        "why": why or "raises Dice",
    }
