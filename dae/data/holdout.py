"""Which items train, and which are held out."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dae.data.datalist import DataList, Item
from dae.errors import InputError

FOLDS = 5


def channels_apart(items: DataList) -> DataList:
    """Each channel of every image as an item of its own: to pre-train on single channels of what is fine-tuned on all.

    A file of several channels is taken apart where the list names a modality for each of them.
    """

    def apart(item: Item) -> list[Item]:
        n = max(len(item.image), len(item.modality))
        kinds = item.modality if len(item.modality) == n else item.modality * n
        intensities = item.intensity if len(item.intensity) == n else item.intensity * n
        places = (
            [(item.image[0], (k, n)) for k in range(n)]
            if len(item.image) == 1
            else [(f, (0, 1)) for f in item.image]
        )
        return [
            replace(item, image=(file,), modality=(kind,), intensity=(intensity,), channel=place)
            for (file, place), kind, intensity in zip(places, kinds, intensities)
        ]

    training, validation, test = (
        tuple(one for item in split for one in apart(item))
        for split in (items.training, items.validation, items.test)
    )
    return replace(items, training=training, validation=validation, test=test)


def has_folds(items: DataList) -> bool:
    """Whether the list itself says what each fold holds out."""
    return bool(items.splits) or any(item.fold is not None for item in items.training)


def split(items: DataList, *, fold: int | None = None, split_seed: int | None = None) -> DataList:
    """What a fine-tuning run trains and validates on: the list's own split, one of its folds, or one of five drawn.

    None stands for a flag that was not asked for, and means 0. Raises InputError where one that was cannot act.
    """
    if items.validation or has_folds(items):
        return hold_out(items, fold=fold, split_seed=split_seed)
    return five_folds(items, fold=fold or 0, split_seed=split_seed or 0)


def hold_out(
    items: DataList, *, fold: int | None = None, split_seed: int | None = None
) -> DataList:
    """Choose what validates: the list's `validation`; else the items of `fold`; else 5 % of the subjects (Table 1).

    None stands for a flag that was not asked for, and means 0. Raises InputError where one that was cannot act, or
    where nothing would be left on one side.
    """
    asked = {"--fold": fold, "--split-seed": split_seed}
    if items.validation:
        _refuse_idle(asked, 'the list has a "validation" of its own; leave the flag out')
        return items
    if items.splits:
        _refuse_idle(
            {"--split-seed": split_seed}, "splits_final.json has the folds; leave the flag out"
        )
        return _fold_of_splits(items, fold or 0)
    if has_folds(items):
        _refuse_idle(
            {"--split-seed": split_seed}, "the list has folds of its own; leave the flag out"
        )
        return _fold_of_list(items, fold or 0)

    _refuse_idle(
        {"--fold": fold},
        "the list has no folds, and 5 % of its subjects are held out; leave the flag out",
    )
    subjects = drawn((item.subject for item in items.training), "hold out", split_seed or 0)
    held = subjects[: max(1, round(0.05 * len(subjects)))]
    note = (
        f"{len(held)} of {len(subjects)} subjects validate, drawn by --split-seed {split_seed or 0}"
    )
    return _with_held(items, set(held), "one subject", note)


def five_folds(items: DataList, *, fold: int, split_seed: int = 0) -> DataList:
    """Fold `fold` of five by subject: what a list without folds and validation is split into. Raises InputError.

    The drawn order of the subjects is cut into five parts, whose sizes differ by one at most. When a subject joins,
    only the borders between two parts move, each by one subject at most.
    """
    subjects = drawn((item.subject for item in items.training), "folds", split_seed)
    parts = min(FOLDS, len(subjects))
    if fold >= parts:
        raise InputError(
            f"--fold {fold}: {len(subjects)} subjects make {parts} folds, 0 to {parts - 1}"
        )
    held = {
        subject for place, subject in enumerate(subjects) if place * parts // len(subjects) == fold
    }
    note = f"fold {fold} of {parts} validates, drawn by --split-seed {split_seed}: {_count(len(held), 'subject')}"
    return _with_held(items, held, f"--fold {fold}", note)


def fraction(items: DataList, share: float, *, split_seed: int = 0) -> DataList:
    """A share of the training subjects, at least one; smaller shares lie within larger ones of the same seed."""
    subjects = drawn((item.subject for item in items.training), "fraction", split_seed)
    kept = set(subjects[: max(1, round(share * len(subjects)))])
    return replace(items, training=tuple(item for item in items.training if item.subject in kept))


def drawn(subjects: Iterable[str], purpose: str, seed: int) -> list[str]:
    """Each subject once, in an order drawn by the seed: two of them stand in one order whoever else is in the list."""

    def lot(subject: str) -> str:
        return hashlib.sha256(
            f"{purpose} {seed} {subject}".encode("utf-8", "surrogatepass")
        ).hexdigest()

    return sorted(set(subjects), key=lot)


def _fold_of_list(items: DataList, fold: int) -> DataList:
    """The items whose `fold` it is are held out. One without a fold is always trained on."""
    folds = sorted({item.fold for item in items.training if item.fold is not None})
    if fold not in folds:
        raise InputError(f"--fold {fold}: the list has the folds {', '.join(map(str, folds))}")
    held = {item.subject for item in items.training if item.fold == fold}
    note = f"fold {fold} of the list validates: {_count(len(held), 'subject')}"
    if always := [item for item in items.training if item.fold is None]:
        note += f"; {_count(len(always), 'item')} without a fold always trained on, as {always[0].image[0].name}"
    return _with_held(items, held, f"--fold {fold}", note)


def _fold_of_splits(items: DataList, fold: int) -> DataList:
    """The cases that splits_final.json names for the fold; a case in neither of its lists is left out."""
    if fold >= len(items.splits):
        raise InputError(
            f"--fold {fold}: splits_final.json has the folds 0 to {len(items.splits) - 1}"
        )
    train, val = items.splits[fold]
    note = f"fold {fold} of splits_final.json validates: {_count(len(val), 'case')}"
    if neither := sorted({item.subject for item in items.training} - train - val):
        note += f"; {_count(len(neither), 'case')} in neither train nor val of it left out, as {neither[0]}"
    used = replace(
        items, training=tuple(item for item in items.training if item.subject in train | val)
    )
    return _with_held(used, set(val), f"--fold {fold}", note)


def _with_held(items: DataList, held: set[str], reason: str, note: str) -> DataList:
    training = tuple(item for item in items.training if item.subject not in held)
    validation = tuple(item for item in items.training if item.subject in held)
    if not training or not validation:
        raise InputError(
            f"--data: {reason} leaves nothing to train or to validate on; name a validation split"
        )
    return replace(items, training=training, validation=validation, notes=(note,))


def _refuse_idle(flags: Mapping[str, int | None], reason: str) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise InputError(f"{flag} {value}: cannot choose what is held out: {reason}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
