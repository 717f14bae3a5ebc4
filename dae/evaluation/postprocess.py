"""Steps that may mend a predicted label map, and how to find on validation cases which of them do.

There are three steps, each of one class: keep its largest components, fill its holes, smooth its
boundary (Appendix F smooths boundaries and keeps components). Which class gets which is JSON, the
postprocess.json of `eval.py tune`:
{"2": [{"do": "largest_components", "keep": 1}, {"do": "fill_holes"}]}.

`choose` finds the steps as nnU-Net does (Isensee et al., Nature Methods 2021): one is kept where it
raises the mean Dice of its class and lowers that of no other. It counts the components of the truth
first: of two kidneys both are kept.

Label maps are (d, h, w), spacing is in mm. Voxels of a class touch by faces, edges and corners (26
neighbours). No function writes into the map it is given. All work is done in the bounding box of
one class, which is most of the speed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dae.boxes import Box, bounding_box
from dae.data.listfile import read_json
from dae.errors import InputError, one_line
from dae.evaluation.cases import Case, Spacing
from dae.evaluation.metrics import Labels, Mask, count_voxels
from dae.evaluation.statistics import spread
from dae.files import write_bytes

Step = dict[str, Any]  # {"do": name of the step, and its settings}
Steps = dict[int, list[Step]]  # label of a class -> its steps, in order

LARGEST_SIGMA = 100.0  # mm; no boundary is blurred by more, and a kernel has its size
GAUSSIAN_REACH = 3  # standard deviations after which a Gaussian is taken for zero

# A component of the truth with a smaller share of its class's voxels is a slip of the annotator.
SMALLEST_ORGAN = 0.05

CANDIDATES: Sequence[Step] = (
    {"do": "largest_components"},
    {"do": "fill_holes"},
    {"do": "smooth_boundary", "sigma_mm": 0.5},
    {"do": "smooth_boundary", "sigma_mm": 1.0},
    {"do": "smooth_boundary", "sigma_mm": 2.0},
)


# --- the three steps


def largest_components(labels: Labels, cls: int, keep: int = 1) -> Labels:
    """All but the `keep` largest components of a class become background."""
    if keep < 1:
        raise ValueError(f"largest_components must keep 1 or more, not {keep}")

    result = labels.copy()
    box = bounding_box(labels == cls)
    if box:
        parts, sizes = components(labels[box] == cls)
        largest = 1 + np.argsort(-sizes, kind="stable")[:keep]
        too_small = (parts > 0) & ~np.isin(parts, largest)
        result[box][too_small] = 0
    return result


def components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """The component of each voxel (d, h, w), from 1 on and 0 outside; and their sizes (n,)."""
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts, np.bincount(parts.ravel())[1:]


def fill_holes(labels: Labels, cls: int) -> Labels:
    """Background that a class encloses on all sides becomes that class. Another organ there stays.

    A hole is connected by faces alone: through corners it would leak out of a wall that touches by
    corners.
    """
    result = labels.copy()
    box = bounding_box(labels == cls)
    if box:
        # The padding joins all that is outside, and is met first: it gets number 1.
        outside = np.pad(labels[box] != cls, 1, constant_values=True)
        gaps, _ = ndimage.label(outside)
        holes = gaps[1:-1, 1:-1, 1:-1] > 1
        result[box][holes & (labels[box] == 0)] = cls
    return result


def smooth_boundary(labels: Labels, cls: int, spacing: Spacing, sigma_mm: float) -> Labels:
    """The boundary of a class moves to where its blurred mask equals its strongest neighbour's.

    All labels around are blurred with a Gaussian of `sigma_mm`. A voxel where the class is highest
    becomes the class. A voxel that the class loses becomes the highest of the others. A class that
    would vanish keeps its voxels.
    """
    if not 0 <= sigma_mm <= LARGEST_SIGMA:
        raise ValueError(
            f"smooth_boundary needs a sigma_mm of 0 to {LARGEST_SIGMA:g}, not {sigma_mm}"
        )

    result = labels.copy()
    sigma = [sigma_mm / mm for mm in spacing]  # in voxels
    margin = [2 * int(np.ceil(GAUSSIAN_REACH * s)) + 1 for s in sigma]
    box = bounding_box(labels == cls, margin)
    if not box or sigma_mm == 0:
        return result

    old = labels[box]
    own = np.zeros(old.shape, np.float32)  # the blurred mask of the class
    rival = np.full(old.shape, -1, np.float32)  # the highest of the others
    rival_label = np.zeros_like(old)
    for value in np.unique(old):
        mask = (old == value).astype(np.float32)
        blurred = ndimage.gaussian_filter(mask, sigma, mode="nearest", truncate=GAUSSIAN_REACH)
        if value == cls:
            own = blurred
        else:
            rival_label[blurred > rival] = value
            rival = np.maximum(rival, blurred)

    new = old.copy()
    new[own > rival] = cls
    lost = (own < rival) & (old == cls)
    new[lost] = rival_label[lost]

    for value in np.setdiff1d(old, new):
        new[old == value] = value
    result[box] = new
    return result


# --- steps as postprocess.json has them


def apply_step(step: Step, labels: Labels, cls: int, spacing: Spacing) -> Labels:
    """One step of one class. Raises KeyError, TypeError or ValueError on what is no step."""
    settings = {name: value for name, value in step.items() if name != "do"}
    if step["do"] == "largest_components":
        return largest_components(labels, cls, **settings)
    if step["do"] == "fill_holes":
        return fill_holes(labels, cls, **settings)
    if step["do"] == "smooth_boundary":
        return smooth_boundary(labels, cls, spacing, **settings)
    raise KeyError(step["do"])


def apply(labels: Labels, steps: Steps, spacing: Spacing) -> Labels:
    """All steps of all classes, in order: (d, h, w) -> (d, h, w) of the same type."""
    for cls, steps_of_class in steps.items():
        for step in steps_of_class:
            labels = apply_step(step, labels, cls, spacing)
    return labels


def save_steps(steps: Steps, path: Path) -> None:
    write_bytes(path, json.dumps(steps, indent=1).encode())


def load_steps(path: Path) -> Steps:
    """The steps in a JSON file. Raises InputError on a file of anything else."""
    steps: Steps = {}
    nothing = np.ones((1, 1, 1), np.uint8)
    try:
        for cls, steps_of_class in read_json(path, "a post-processing plan").items():
            steps[int(cls)] = [dict(step) for step in steps_of_class]

        # A wrong name or setting is found here, and not after an hour of prediction.
        for steps_of_class in steps.values():
            apply(nothing, {1: steps_of_class}, (1.0, 1.0, 1.0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: not a post-processing plan ({type(error).__name__}: {one_line(error)})"
        ) from error
    return steps


# --- the choice, on cases whose truth is known


class Organs(NamedTuple):
    """The true components of one class in its box."""

    box: Box
    parts: NDArray[np.int32]  # from 1 on; 0 in the smallest, which are no organs
    number: int


class Outcome(NamedTuple):
    """How good the label maps of all cases are."""

    dice: dict[int, float]  # mean over cases, of each class
    met: set[tuple[int, int]]  # (case, component) of one class that the prediction touches


class Trial(NamedTuple):
    """A step that was tried, and how good all cases are after it."""

    step: Step
    after: Outcome
    objection: str  # why the step should not be done, or nothing


def choose(
    cases: Sequence[Case], classes: Mapping[int, str], candidates: Sequence[Step] = CANDIDATES
) -> tuple[Steps, list[dict[str, Any]]]:
    """The steps that help, found on cases whose truth is known; and a row for every step tried.

    It goes class by class, and for each class through the kinds of step in the order of the
    candidates. Of several settings of one kind the best is kept. A step is kept if the mean Dice of
    its class rises, that of no other class falls, and no true component that the prediction touches
    is lost.

    Rows: class, name, step, dice_before, dice_after, change, kept, why. Raises ValueError without
    cases.
    """
    if not cases:
        raise ValueError("a plan is chosen on cases, and there are none")

    steps: Steps = {}
    table: list[dict[str, Any]] = []
    maps = [case.prediction for case in cases]
    for cls in classes:
        if cls == 0:
            continue
        organs = [organs_of(case.truth, cls) for case in cases]

        for settings in by_name_of_step(candidates):
            before = outcome(maps, cases, classes, cls, organs)
            trials = []
            for candidate in settings:
                step = with_count(candidate, organs)
                after = outcome(after_step(step, maps, cases, cls), cases, classes, cls, organs)
                trials.append(Trial(step, after, objection(before, after, cls, classes)))

            best = best_of(trials, cls)
            for trial in trials:
                why = trial.objection
                if not why and trial is not best:
                    why = "another setting is better"
                table.append(row(trial, before, cls, classes[cls], why))

            if best is not None:
                steps.setdefault(cls, []).append(best.step)
                maps = list(after_step(best.step, maps, cases, cls))
    return steps, table


def by_name_of_step(candidates: Sequence[Step]) -> list[list[Step]]:
    """The candidates that differ in their settings alone, together."""
    by_name: dict[str, list[Step]] = {}
    for step in candidates:
        by_name.setdefault(step["do"], []).append(step)
    return list(by_name.values())


def organs_of(truth: Labels, cls: int) -> Organs | None:
    """What must not be lost. None where the truth has nothing of the class."""
    box = bounding_box(truth == cls)
    if not box:
        return None
    parts, sizes = components(truth[box] == cls)
    slips = 1 + np.flatnonzero(sizes < SMALLEST_ORGAN * sizes.sum())
    parts[np.isin(parts, slips)] = 0
    return Organs(box, parts, len(sizes) - len(slips))


def with_count(step: Step, organs: Sequence[Organs | None]) -> Step:
    """The step. Of components it keeps as many as the case that truly has the most, or more."""
    if step["do"] != "largest_components":
        return step
    numbers = [of_case.number for of_case in organs if of_case]
    return {**step, "keep": max([step.get("keep", 1), *numbers])}


def after_step(
    step: Step, maps: Iterable[Labels], cases: Iterable[Case], cls: int
) -> Iterator[Labels]:
    """The label maps of all cases after a step, one at a time."""
    for labels, case in zip(maps, cases):
        yield apply_step(step, labels, cls, case.spacing)


def outcome(
    maps: Iterable[Labels],
    cases: Sequence[Case],
    classes: Iterable[int],
    cls: int,
    organs: Sequence[Organs | None],
) -> Outcome:
    """The mean Dice of every class over the cases that have it, and the true components of `cls`
    that the label maps touch.
    """
    scored = [label for label in classes if label != 0]
    dice: dict[int, list[float]] = {label: [] for label in scored}
    met: set[tuple[int, int]] = set()
    for n, (labels, case, of_case) in enumerate(zip(maps, cases, organs)):
        counts = count_voxels(labels[case.annotated], case.truth[case.annotated], scored)
        for label, (predicted, true, both) in zip(scored, counts):
            size = predicted + true
            dice[label].append(2 * both / size if size else nan)

        if of_case:
            touched = of_case.parts[labels[of_case.box] == cls]
            met |= {(n, part) for part in np.unique(touched).tolist() if part != 0}

    means = {label: spread(values)["mean"] for label, values in dice.items()}
    return Outcome(means, met)


def objection(before: Outcome, after: Outcome, cls: int, classes: Mapping[int, str]) -> str:
    """Why a step should not be done, or nothing."""
    for label, dice in after.dice.items():
        if dice < before.dice[label]:
            return f"lowers the Dice of {classes[label]}"

    lost = before.met - after.met
    if lost:
        return f"loses {len(lost)} true components"
    if not after.dice[cls] > before.dice[cls]:  # nor is it, where no case has the class
        return "does not raise Dice"
    return ""


def best_of(trials: Sequence[Trial], cls: int) -> Trial | None:
    """The one with the highest Dice of those without an objection. The first of equals."""
    best = None
    for trial in trials:
        if trial.objection:
            continue
        if best is None or trial.after.dice[cls] > best.after.dice[cls]:
            best = trial
    return best


def row(trial: Trial, before: Outcome, cls: int, name: str, why: str) -> dict[str, Any]:
    """One line of the table of what was tried. `why` is empty for a step that is kept."""
    return {
        "class": cls,
        "name": name,
        "step": trial.step,
        "dice_before": before.dice[cls],
        "dice_after": trial.after.dice[cls],
        "change": trial.after.dice[cls] - before.dice[cls],
        "kept": not why,
        "why": why or "raises Dice",
    }


def as_text(table: Sequence[Mapping[str, Any]]) -> str:
    """What `choose` tried, a line each. What it kept has a plus."""
    width = max(len(line["name"]) for line in table)
    lines = []
    for line in table:
        mark = "+" if line["kept"] else " "
        step = " ".join(map(str, line["step"].values()))
        change = f"Dice {line['dice_before']:.4f} to {line['dice_after']:.4f}"
        lines.append(f"{mark} {line['name']:{width}}  {step:21}  {change}  {line['why']}")
    return "\n".join(lines)
