"""Which items train, and which are held out: decided here for all three scripts.

A list may have a `validation` of its own, or say what each fold holds out. Else subjects are drawn
by a hash of their names, so that neither the order of the list nor a subject that joins it changes
the folds of the others.

In all functions None is a flag that nobody has set, and means 0. A flag that was set and cannot act
is refused.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dae.config.command_line import value_if_set
from dae.config.evaluate import CasesConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data import datalist, leaks
from dae.data.datalist import DataList, Item, check_all_labelled, check_channel_order
from dae.data.leaks import Seen
from dae.errors import InputError, counted

FOLDS = 5
SHARE = 0.05  # of the subjects are held out of pre-training (Table 1)


# --- one function for each script


def read_for_pretraining(config: PretrainConfig) -> DataList:
    """The list of --data, divided as train_pretrain.py does it. Raises InputError."""
    items = datalist.load(config.data, root=config.data_root, modality=config.modality)
    if config.channels == "apart":
        items = datalist.split_channels(items)
    return for_pretraining(
        items,
        fold=value_if_set(config, "fold"),
        split_seed=value_if_set(config, "split_seed"),
        allow_trained=config.allow_trained,
    )


def read_for_segmentation(config: SegConfig) -> DataList:
    """The list of --data, divided as train_seg.py does it. Raises InputError."""
    items = datalist.load(config.data, root=config.data_root, modality=config.modality)
    return for_segmentation(
        items,
        config.data,
        fold=value_if_set(config, "fold"),
        split_seed=value_if_set(config, "split_seed"),
        label_fraction=config.label_fraction,
        label_count=config.label_count,
        allow_trained=config.allow_trained,
    )


def read_for_evaluation(
    config: CasesConfig, modality: str, seen: Seen, older: Sequence[str] = ()
) -> tuple[DataList, Sequence[Item]]:
    """The list of --data, divided as eval.py does it, and its items of --split.

    `validation` is what the fine-tuning run held out, as far as `seen` tells. `older` are
    checkpoints of older versions, which drew five folds otherwise. Raises InputError.
    """
    items = datalist.load(config.data, root=config.data_root, modality=modality)
    if config.split == "validation":
        items = for_evaluation(
            items,
            config.data,
            seen,
            fold=config.fold,
            split_seed=config.split_seed,
            older=older,
            allow_trained=config.allow_trained,
        )

    chosen: Sequence[Item] = getattr(items, config.split)
    if not chosen:
        raise InputError(f"--split {config.split}: {config.data} has no such items")
    return items, chosen


def for_pretraining(
    items: DataList, *, fold: int | None, split_seed: int | None, allow_trained: bool
) -> DataList:
    """The list's own split, one of its folds, or 5 % of the subjects held out (Table 1).

    Raises InputError where a flag cannot act, and where somebody is on both sides.
    """
    check_channel_order(items)
    split = hold_out_share(items, fold=fold, split_seed=split_seed)
    if not allow_trained:
        leaks.check_sides(split)
    return leaks.with_doubts(split, drawn=is_drawn(items))


def for_segmentation(
    items: DataList,
    data: str,
    *,
    fold: int | None,
    split_seed: int | None,
    label_fraction: float,
    label_count: int = 0,
    allow_trained: bool,
) -> DataList:
    """The list's own split, one of its folds, or one of five; of its training subjects a share.

    A `label_count` above 0 takes so many of them in place of a share. Everything that is trained or
    validated on has a label. Raises InputError as for pre-training, and where a label is missing in
    the list, which `data` names.
    """
    # The seed draws the share as well: with one it acts, even where it draws no folds.
    seed_of_folds = split_seed
    if (label_fraction != 1 or label_count) and not is_drawn(items):
        seed_of_folds = None

    check_channel_order(items)
    split = hold_out_fold(items, fold=fold, split_seed=seed_of_folds)
    if not allow_trained:
        leaks.check_sides(split, test=True)
    check_all_labelled(split, data)

    split = leaks.with_doubts(split, drawn=is_drawn(items))
    if label_count:
        return first_subjects(split, label_count, split_seed=split_seed or 0)
    return fraction(split, label_fraction, split_seed=split_seed or 0)


def for_evaluation(
    items: DataList,
    data: str,
    seen: Seen,
    *,
    fold: int | None,
    split_seed: int | None,
    older: Sequence[str],
    allow_trained: bool,
) -> DataList:
    """What the checkpoints held out, as far as it is `seen` (`leaks.seen_of`).

    `older` are checkpoints of older versions, which drew five folds otherwise: without a fold that
    is asked for they are refused, by the name of the list, `data`. Raises InputError.
    """
    if is_drawn(items) and older and fold is None and not allow_trained:
        raise InputError(
            f"--checkpoint {older[0]}: an older version wrote it, and drew the folds of {data} "
            'otherwise; write "fold" into the list, or name another --split'
        )
    return hold_out_as_seen(items, seen, fold=fold, split_seed=split_seed)


# --- the ways to hold out


def has_folds(items: DataList) -> bool:
    """Whether the list itself says what each fold holds out."""
    return bool(items.splits) or any(item.fold is not None for item in items.training)


def is_drawn(items: DataList) -> bool:
    """Whether the list leaves it to us who is held out."""
    return not items.validation and not has_folds(items)


def hold_out_share(
    items: DataList, *, fold: int | None = None, split_seed: int | None = None
) -> DataList:
    """The list's own split, or 5 % of the subjects held out: for pre-training."""
    if not is_drawn(items):
        return split_of_list(items, fold=fold, split_seed=split_seed)

    reason = "the list has no folds, and 5 % of its subjects are held out; leave the flag out"
    refuse_flags(reason, fold=fold)

    seed = split_seed or 0
    subjects = in_drawn_order(items, "hold out", seed)
    held = subjects[: max(1, round(SHARE * len(subjects)))]
    note = f"{len(held)} of {len(subjects)} subjects validate, drawn by --split-seed {seed}"
    return with_held_out(items, held, "one subject", note)


def hold_out_fold(
    items: DataList, *, fold: int | None = None, split_seed: int | None = None
) -> DataList:
    """The list's own split, or one of five folds held out: for fine-tuning."""
    if not is_drawn(items):
        return split_of_list(items, fold=fold, split_seed=split_seed)
    return five_folds(items, fold=fold or 0, split_seed=split_seed or 0)


def hold_out_as_seen(
    items: DataList, seen: Seen, *, fold: int | None = None, split_seed: int | None = None
) -> DataList:
    """Who was held out when a checkpoint was trained, whoever has joined the list since.

    Flags that are set come first, then the list's own `validation`. A list that has nobody of those
    who were held out is split by the checkpoint's fold. Raises InputError.
    """
    if fold is not None or split_seed is not None or items.validation:
        return hold_out_fold(items, fold=fold, split_seed=split_seed)

    # A checkpoint has hashes in place of names.
    names = set(seen.get("held_out", ()))
    subjects = {item.subject for item in items.training}
    held = {subject for subject in subjects if leaks.name_of(subject) in names}
    if held:
        return divided(items, held, "the cases that the checkpoint held out")

    # A list that has folds has no use for the seed, and would refuse it.
    seed = seen.get("split_seed", 0) if is_drawn(items) else None
    return hold_out_fold(items, fold=seen.get("fold", 0), split_seed=seed)


def split_of_list(items: DataList, *, fold: int | None, split_seed: int | None) -> DataList:
    """A list that has a `validation` as it is; else one of the folds that it names."""
    if items.validation:
        reason = 'the list has a "validation" of its own; leave the flag out'
        refuse_flags(reason, fold=fold, split_seed=split_seed)
        return items

    if items.splits:
        reason = "splits_final.json has the folds; leave the flag out"
        refuse_flags(reason, split_seed=split_seed)
        return fold_of_splits(items, fold or 0)

    reason = "the list has folds of its own; leave the flag out"
    refuse_flags(reason, split_seed=split_seed)
    return fold_of_list(items, fold or 0)


def fold_of_list(items: DataList, fold: int) -> DataList:
    """The items whose `fold` it is are held out. One without a fold is always trained on."""
    folds = sorted({item.fold for item in items.training if item.fold is not None})
    if fold not in folds:
        raise InputError(f"--fold {fold}: the list has the folds {', '.join(map(str, folds))}")

    held = {item.subject for item in items.training if item.fold == fold}
    note = f"fold {fold} of the list validates: {counted(len(held), 'subject')}"

    always = [item for item in items.training if item.fold is None]
    if always:
        name = always[0].image[0].name
        count = counted(len(always), "item")
        note += f"; {count} without a fold always trained on, as {name}"
    return with_held_out(items, held, f"--fold {fold}", note)


def fold_of_splits(items: DataList, fold: int) -> DataList:
    """The cases that splits_final.json names for the fold; others are left out."""
    if fold >= len(items.splits):
        raise InputError(
            f"--fold {fold}: splits_final.json has the folds 0 to {len(items.splits) - 1}"
        )
    train, val = items.splits[fold]
    note = f"fold {fold} of splits_final.json validates: {counted(len(val), 'case')}"

    neither = sorted({item.subject for item in items.training} - train - val)
    if neither:
        count = counted(len(neither), "case")
        note += f"; {count} in neither train nor val of it left out, as {neither[0]}"

    used = tuple(item for item in items.training if item.subject in train | val)
    return with_held_out(replace(items, training=used), val, f"--fold {fold}", note)


def five_folds(items: DataList, *, fold: int, split_seed: int = 0) -> DataList:
    """Fold `fold` of five by subject is held out. Raises InputError.

    The drawn order of the subjects is cut into five parts, whose sizes differ by one at most. When
    a subject joins, only the borders between two parts move, each by one subject at most.
    """
    subjects = in_drawn_order(items, "folds", split_seed)
    parts = min(FOLDS, len(subjects))
    if fold >= parts:
        raise InputError(
            f"--fold {fold}: {len(subjects)} subjects make {parts} folds, 0 to {parts - 1}"
        )

    # Position p of n subjects is in part floor(p * parts / n).
    held = []
    for position, subject in enumerate(subjects):
        if position * parts // len(subjects) == fold:
            held.append(subject)
    note = (
        f"fold {fold} of {parts} validates, drawn by --split-seed {split_seed}: "
        f"{counted(len(held), 'subject')}"
    )
    return with_held_out(items, held, f"--fold {fold}", note)


def fraction(items: DataList, share: float, *, split_seed: int = 0) -> DataList:
    """A share of the training subjects, at least one.

    Of one seed, a smaller share is part of every larger one.
    """
    number = len({item.subject for item in items.training})
    return first_subjects(items, max(1, round(share * number)), split_seed=split_seed)


def first_subjects(items: DataList, number: int, *, split_seed: int = 0) -> DataList:
    """So many of the training subjects, in the order in which `fraction` takes them.

    Of one seed, fewer are part of more. Raises InputError where there are not so many.
    """
    subjects = in_drawn_order(items, "fraction", split_seed)
    if number > len(subjects):
        raise InputError(
            f"--label-count {number}: there are {counted(len(subjects), 'subject')} to train on"
        )
    kept = set(subjects[:number])
    return replace(items, training=tuple(item for item in items.training if item.subject in kept))


def in_drawn_order(items: DataList, purpose: str, seed: int) -> list[str]:
    """The subjects that train, each once, in the order of their lots.

    A lot is a hash of the subject's name: the order of two subjects is the same whoever else is in
    the list.
    """
    subject_by_lot = {}
    for item in items.training:
        name = f"{purpose} {seed} {item.subject}".encode("utf-8", "surrogatepass")
        subject_by_lot[hashlib.sha256(name).hexdigest()] = item.subject
    return [subject_by_lot[lot] for lot in sorted(subject_by_lot)]


def with_held_out(items: DataList, held: Iterable[str], reason: str, note: str) -> DataList:
    """`divided`, but nothing to train or to validate on is refused. Raises InputError."""
    split = divided(items, held, note)
    if not split.training or not split.validation:
        raise InputError(
            f"--data: {reason} leaves nothing to train or to validate on; name a validation split"
        )
    return split


def divided(items: DataList, held: Iterable[str], note: str) -> DataList:
    """The training items of the subjects `held` become the validation."""
    subjects = set(held)
    training = tuple(item for item in items.training if item.subject not in subjects)
    validation = tuple(item for item in items.training if item.subject in subjects)
    return replace(items, training=training, validation=validation, notes=(note,))


def refuse_flags(reason: str, *, fold: int | None = None, split_seed: int | None = None) -> None:
    """Raises InputError for a flag that is set: here it cannot act."""
    for flag, value in (("--fold", fold), ("--split-seed", split_seed)):
        if value is not None:
            raise InputError(f"{flag} {value}: cannot choose what is held out: {reason}")
