"""Fine-tune a pre-trained backbone for segmentation (section 3.2), or train it from scratch
for comparison.

phantoms, after the demo of pre-training:  python train_seg.py --preset demo
one fold of your labelled volumes:
    python train_seg.py --data list.json --pretrained runs/a/last.pt --fold 0
the same without the weights:
    python train_seg.py ... --from-scratch --out runs/scratch
"""

import dae.quiet  # noqa: F401 - before torch
from dae.config.command_line import from_command_line, run_or_explain
from dae.config.segment import SegConfig

# The command line is read before torch is imported, which takes seconds: --help and a wrong flag
# are answered at once. The run itself starts at the end of this file.
if __name__ == "__main__":
    CONFIG = from_command_line(SegConfig, prog="train_seg.py", description=__doc__)

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dae.config.command_line import was_set
from dae.config.shared import NEEDS_LESS
from dae.data import holdout, leaks
from dae.data.augment import augment
from dae.data.batches import LabelledBatch, LabelledCrops, collate_labelled
from dae.data.cache import Cached
from dae.data.datalist import DataList
from dae.data.preprocess import Recipe
from dae.data.regions import Region, check_same, from_plan, membership, to_plan
from dae.data.sides import Flips, choose_flips, continued, flips_of
from dae.errors import InputError, counted
from dae.evaluation.validation import dice_of_volumes
from dae.figures import overlay_sheet, seg_curve
from dae.model.probe import Probe
from dae.training import resume
from dae.training.distributed import (
    Ranks,
    Stopped,
    StopSignal,
    gather_objects,
    joined,
    mean_over_ranks,
    parallel,
    sync_at_last,
)
from dae.training.kernels import advice, choose_kernels, lay_out
from dae.training.log import Clock, Log, read_log
from dae.training.losses import LOSSES, loss_of_regions
from dae.training.optim import FROZEN, adamw_in_parts, due, fine_tuning_factors, warmup_steps
from dae.training.precision import autocast, autocast_type, grad_scaler
from dae.training.run import (
    build_backbone,
    check_finite,
    how_to_start,
    log_start,
    metadata_of,
    open_log,
    plan_of_network,
    prepare_volumes,
    read_ahead,
    restore,
    save_checkpoint,
    stopped_in_words,
    with_phantoms,
)
from dae.weights import checkpoint
from dae.weights.foreign import Weights
from dae.weights.plan import about_intensities, with_plan
from dae.weights.transfer import Report, check_same_classes, parts_to_transfer, transfer


@dataclass
class Run:
    """What the loop works with. Only weights, optimiser, scaler, clock and `state` change."""

    config: SegConfig  # with the number of steps that --epochs gives
    ranks: Ranks
    out: Path
    log: Log
    clock: Clock
    classes: dict[int, str]  # label value -> name, background first; a network knows their order
    regions: tuple[Region, ...]  # unions of labels, which then are the channels of the network
    loss: Callable[[Tensor, Tensor], Tensor]  # of logits and labels, of classes or of regions
    crops: LabelledCrops
    class_table: Tensor  # label value -> class index, on the device
    held_out: list[Cached]  # to validate on
    network: nn.Module
    net: nn.Module  # the same, compiled and wrapped in DDP where that is asked for
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast
    metadata: dict[str, Any]  # in every checkpoint: configuration, plan, fingerprint of the data
    # step: how many are done. best: highest mean Dice. unvalidated: whether a stop signal has cut
    # the validation of this step short.
    state: dict[str, Any]
    notes: list[str]  # what was decided, for the user
    report: Report | None  # which of the pre-trained weights were taken


def main(config: SegConfig) -> dict[str, Any]:
    """One run. Returns its last validation. Raises InputError on what the user can mend."""
    with joined(config.device) as ranks:
        # A signal ends the setup at once, which is safe: prepared volumes are written atomically.
        run = setup(config, ranks)
        ahead = read_ahead(
            run.crops, run.config, ranks, step=run.state["step"], gather=collate_labelled
        )
        with closing(run.log), StopSignal(ranks.store) as signal, closing(ahead) as batches:
            return loop(run, batches, signal)


# --------------------------------------------------------------------------------------------------


def loop(run: Run, batches: Iterator[LabelledBatch], signal: StopSignal) -> dict[str, Any]:
    """Train, validate, save.

    The body of the loop runs once more than there are steps, so that the last validation and the
    last save are written as all others are.
    """
    config = run.config
    first = run.state["step"]
    validation: dict[str, Any] = {}
    stop = False

    say_start(run)
    run.clock.restart()
    for step in range(first, config.steps + 1):
        run.state["step"] = step
        done = step == config.steps
        if 0 < config.stop_after <= step:
            stop = True

        with run.clock.paused():
            # A resumed run makes up for a validation that a signal had cut short.
            is_new = step > first or run.state["unvalidated"]
            run.state["unvalidated"] = False
            if (is_new or done) and due(step, config.validate_every, config.steps):
                validation = validate(run, signal)
                if validation:
                    run.log.event("validation", step=step, **validation)
                    run.log.say(f"step {step}: {in_words(validation)}")
                    draw_losses(run)
                    keep_best(run, validation)
                else:
                    run.state["unvalidated"] = True
                    stop = True
                    done = False
            if is_new and (stop or due(step, config.save_every, config.steps, most=500)):
                save(run, "last.pt")
            if is_new and config.keep_every and step % config.keep_every == 0:
                save(run, f"step-{step}.pt")

        if done or stop:
            break

        result = train_step(run, batches, signal)
        stop = result.stop
        if due(step + 1, config.log_every, config.steps):
            log_training(run, result)
            run.clock.restart()

    step = run.state["step"]
    reason = "finished" if done else "stopped"
    run.log.event("end", step=step, reason=reason, best=run.state["best"])
    run.log.close()
    if done:
        run.log.say(f"{in_words(validation)}; weights in {run.out / 'best.pt'}")
    else:
        run.log.say(stopped_in_words(config, step))
    return validation


# --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step gives."""

    loss: float  # mean over its samples, on all ranks
    grad_norm: float  # before clipping
    lr_encoder: float
    lr: float  # of the decoder
    stop: bool  # whether any rank was asked to stop


def train_step(run: Run, batches: Iterator[LabelledBatch], signal: StopSignal) -> Step:
    """One step of the optimiser, over `accumulate` micro-batches on every rank."""
    config = run.config
    device = run.ranks.device
    step = run.state["step"]

    factor_encoder, factor = fine_tuning_factors(
        config.schedule, step, config.steps, warmup_steps(config)
    )
    lr_encoder = config.lr * factor_encoder
    lr = config.lr * factor
    for group in run.optimizer.param_groups:
        group["lr"] = lr_encoder if group["part"] == "encoder" else lr

    total = torch.zeros((), device=device)
    for micro in range(config.accumulate):
        with run.clock.waiting():
            batch = next(batches).to(device)
        x, label = augment(batch.x, batch.label, batch.drawn)
        label = run.class_table.take(label.long())

        with sync_at_last(run.net, last=micro == config.accumulate - 1):
            with autocast(run.dtype, device):
                logits = run.net(x)
            loss = run.loss(logits, label) / config.accumulate
            run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()

    run.scaler.unscale_(run.optimizer)
    if factor_encoder == 0:
        # These gradients move nothing, and must not count in the norm that is clipped.
        drop_gradients(run.optimizer, "encoder")
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), config.clip or math.inf)

    # One exchange between the ranks, and the only wait of a step. The stop flag goes along with the
    # loss: its mean is above 0 once any rank was asked to stop, so all ranks stop together.
    flag = torch.tensor(float(signal.asked), device=device)
    mean_loss, grad_norm, stop = mean_over_ranks(torch.stack([total, norm.float(), flag]))
    check_finite(run.log, step, mean_loss, grad_norm, run.scaler)

    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return Step(mean_loss, grad_norm, lr_encoder, lr, stop=stop > 0)


# --------------------------------------------------------------------------------------------------


def drop_gradients(optimizer: torch.optim.Optimizer, part: str) -> None:
    """As if the parameters of this part had not been in the network."""
    for group in optimizer.param_groups:
        if group["part"] == part:
            for parameter in group["params"]:
                parameter.grad = None


def log_training(run: Run, result: Step) -> None:
    """The train event and the progress line."""
    step = run.state["step"] + 1
    run.clock.read(step)
    run.log.event(
        "train",
        step=step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr_encoder=result.lr_encoder,
        lr=result.lr,
        samples_per_s=run.clock.rate,
        data_wait=run.clock.data_wait,
    )
    speed = f"{run.clock.rate:.1f} samples/s, {run.clock.left} left"
    run.log.progress(step, f"loss {result.loss:.4f}, {speed}")


# --- setup: how to start, data, network, optimiser, run


def setup(config: SegConfig, ranks: Ranks) -> Run:
    """Everything before the first step. What needs no data is tried before any data is touched."""
    # How to start: where the run in --out was stopped, from the weights of --pretrained, or from
    # scratch. The weights also say how the network is built and fed.
    out = Path(config.out)
    resumed, weights = how_to_start(config, path=config.pretrained, script="train_seg.py")
    if resumed:
        config = with_plan(config, resumed["plan"], out / "last.pt")
        resume.check_same_batch(out / "last.pt", resumed, config, world=ranks.world)
    elif weights:
        config = with_plan(config, weights.plan, Path(config.pretrained))
    elif not config.from_scratch:
        raise InputError("--pretrained: give a file of weights, or --from-scratch")
    if config.lr_min and not resumed:
        raise InputError("--lr-min: the rates of fine-tuning end at 0 (--schedule); leave it out")

    # A rehearsal, so that flags and weights that do not fit are refused before any data is read.
    # On the device "meta" tensors have shapes and no values.
    dtype = autocast_type(config.amp, ranks.device)
    recipe = Recipe.of(config, foreground_crop=config.foreground_crop)
    outputs = 2
    if weights and config.transfer == "all":
        outputs = weights.plan["out_channels"]
    with torch.device("meta"):
        build(config, 1, outputs, weights)

    # Data.
    phantoms = Path(config.pretrained).parent / "phantoms"  # those of the demo of pre-training
    config = with_phantoms(config, ranks, phantoms)
    items = holdout.read_for_segmentation(config)
    classes = dict(sorted(items.labels.items()))
    on_head = notes_on_head(items, classes, weights, config)
    flips = flips_for(items, classes, resumed, config)
    config = replace(config, steps=steps_of(items, resumed, config, ranks))
    started_from = plan_started_from(resumed, weights, config)
    known_tests = notes_on_tests(items, started_from, config, ranks) if not resumed else []
    crops, held_out = crops_of(items, classes, flips, recipe, config, ranks)
    if resumed:
        resume.check_same_flags(out / "last.pt", resumed, config)

    trained = [volume.content for volume in crops.volumes]
    validated = [volume.content for volume in held_out]
    channels = crops.volumes[0].shape[0]

    # Network.
    checkpoint.seed_rng(config.seed)
    network, report = build(config, channels, len(items.regions) or len(classes), weights)
    choose_kernels(ranks.device, tf32=config.tf32)
    network = network.to(ranks.device)
    lay_out(network, ranks.device, compiled=config.compile)
    if config.schedule in FROZEN:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith("encoder."))
    set_mode(network, config)

    # Optimiser.
    optimizer = adamw_in_parts(network.named_parameters(), config)
    scaler = grad_scaler(dtype, ranks.device)

    # The images and subjects that the weights were trained on, an earlier fine-tuning included.
    seen_before = None
    if resumed:
        seen_before = resumed["plan"].get("seen")
    elif weights and report:
        seen_before = weights.plan.get("seen")
    seen = leaks.seen_by(
        items, trained, fold=config.fold, split_seed=config.split_seed, before=seen_before
    )

    # Run: from step 0, or from where it was stopped.
    plan = {**plan_of(config, items, crops, classes), "seen": seen}
    if "pretrained_on" in started_from:
        plan["pretrained_on"] = started_from["pretrained_on"]
    if config.allow_leak:
        plan["leak"] = started_from.get("leak", known_tests)
    data = items.fingerprint(trained, validated, labels=True)
    metadata = metadata_of(config, plan=plan, data=data, global_batch=crops.global_batch)
    state: dict[str, Any] = {"step": 0, "best": -1.0, "unvalidated": False}
    notes = [*items.notes, *known_tests, *leaks.known_before(items, validated, seen_before)]
    notes += leaks.pretrained_before(items, validated, started_from)
    if weights and report:
        notes += about_intensities(weights.plan) + on_head

    if resumed:
        by_size = items.fingerprint_by_size(labels=True)
        resume.check_same_samples(out / "last.pt", resumed, metadata, data_by_size=by_size)
        restore(out / "last.pt", resumed, network, optimizer, scaler)
        state = {key: resumed.get(key, value) for key, value in state.items()}
        notes += resume.changes_in_words(resumed, config, world=ranks.world)

    # DDP and the compiler wrap the forward pass. Parameters, optimiser and checkpoints are those of
    # `network` itself.
    net: Any = torch.compile(network) if config.compile else network
    net = parallel(net, ranks)
    return Run(
        config=config,
        ranks=ranks,
        out=out,
        log=open_log(config, ranks, state["step"]),
        clock=Clock(step=state["step"], steps=config.steps, global_batch=crops.global_batch),
        classes=classes,
        regions=items.regions,
        loss=loss_of(config, items.regions, classes, ranks),
        crops=crops,
        class_table=crops.class_table().to(ranks.device),
        held_out=held_out,
        network=network,
        net=net,
        optimizer=optimizer,
        scaler=scaler,
        dtype=dtype,
        metadata=metadata,
        state=state,
        notes=notes,
        report=report,
    )


def plan_started_from(
    resumed: Mapping[str, Any] | None, weights: Weights | None, config: SegConfig
) -> dict[str, Any]:
    """The plan of the weights that the run goes on from, or none of a run from scratch."""
    if resumed:
        return dict(resumed["plan"])
    if weights and not config.from_scratch:
        return weights.plan
    return {}


def notes_on_head(
    items: DataList, classes: dict[int, str], weights: Weights | None, config: SegConfig
) -> list[str]:
    """What the user should know of a head that --transfer all takes, if it is taken.

    Raises InputError where it is of another task than the list.
    """
    if weights is None or config.transfer != "all" or config.from_scratch:
        return []

    if weights.plan["classes"]:  # those of other programs name none
        theirs = from_plan(weights.plan)
        check_same(items.regions, theirs, config.data)
        if [region.labels for region in items.regions] != [region.labels for region in theirs]:
            raise InputError(
                f"--transfer all: {config.pretrained} has the regions of {config.data} in another "
                "order; put them in its order, or take --transfer both"
            )
    path = Path(config.pretrained)
    return check_same_classes(weights.plan, classes, path, regions=items.regions)


def notes_on_tests(
    items: DataList, plan: dict[str, Any], config: SegConfig, ranks: Ranks
) -> list[str]:
    """Whether the weights were trained on what the list keeps for the test, as far as they say.

    Raises InputError where they were, unless --allow-leak is set.
    """
    if not plan:
        return []
    if not leaks.says_what_it_saw(plan):
        return ["the weights do not say what they were trained on: test cases may be among it"]
    if not items.test or not leaks.voxels_known(plan):
        return []

    # Each rank reads its share of the test images, which no one prepares.
    own = list(range(ranks.rank, len(items.test), ranks.world))
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        read = pool.map(leaks.hashes_in_files, [items.test[n] for n in own])
        bar = tqdm(
            read,
            "comparing test images",
            len(own),
            disable=not ranks.is_main or not sys.stderr.isatty(),
            leave=False,
        )
        of_rank = dict(zip(own, bar))
    hashes: dict[int, tuple[str, ...]] = {}
    for other in gather_objects(of_rank):
        hashes |= other
    in_order = [hashes[n] for n in range(len(items.test))]
    return leaks.check_tested(items.test, in_order, plan, allow_leak=config.allow_leak)


def loss_of(
    config: SegConfig, regions: tuple[Region, ...], classes: dict[int, str], ranks: Ranks
) -> Callable[[Tensor, Tensor], Tensor]:
    """--loss of classes, or of regions: logits (b, k, d, h, w), label (b, d, h, w) int64 -> ()."""
    if not regions:
        return LOSSES[config.loss]
    has_label = torch.from_numpy(membership(regions, list(classes))).to(ranks.device)
    return partial(loss_of_regions, config.loss, membership=has_label)


def flips_for(
    items: DataList,
    classes: dict[int, str],
    resumed: Mapping[str, Any] | None,
    config: SegConfig,
) -> Flips:
    """Which axes are flipped: by the names of the classes, and the `swap` of the list."""
    turned = config.rotate > 0 and config.crop[0] == config.crop[1]
    flips = choose_flips(
        classes,
        items.swap,
        chance=config.flip,
        turned=turned,
        regions=[region.name for region in items.regions],
    )
    if not resumed:
        return flips
    before = flips_of(resumed["plan"], resumed["config"])
    return continued(flips, before, Path(config.out) / "last.pt")


def steps_of(
    items: DataList, resumed: Mapping[str, Any] | None, config: SegConfig, ranks: Ranks
) -> int:
    """--steps, or the steps of --epochs. A resumed run is as long as it was when it started."""
    if config.steps:
        return config.steps
    if resumed and (resumed["config"]["epochs"] == config.epochs or not was_set(config, "epochs")):
        steps: int = resumed["config"]["steps"]
        return steps
    samples = config.epochs * len(items.training)
    return math.ceil(samples / (config.batch_size * config.accumulate * ranks.world))


def crops_of(
    items: DataList,
    classes: dict[int, str],
    flips: Flips,
    recipe: Recipe,
    config: SegConfig,
    ranks: Ranks,
) -> tuple[LabelledCrops, list[Cached]]:
    """Crops to train on, and whole volumes to validate on.

    Raises InputError, naming a volume that cannot be used.
    """
    used = (*items.training, *items.validation)
    volumes = prepare_volumes(used, recipe, config, ranks)
    for item, volume in zip(used, volumes):
        unknown = set(volume.labels) - {*classes, items.ignore}
        if unknown:
            raise InputError(
                f"{item.label}: label {min(unknown)} is not among the classes "
                f"that {config.data} names"
            )
    n = len(items.training)
    if not config.allow_trained:
        leaks.check_voxels(used, [volume.content for volume in volumes], trained=n)

    crops = LabelledCrops(
        volumes[:n],
        list(classes),
        config.crop,
        seed=config.seed,
        global_batch=config.batch_size * config.accumulate * ranks.world,
        positive=config.positive,
        chances=config,
        flips=flips,
        ignore=items.ignore,
    )
    return crops, volumes[n:]


def build(
    config: SegConfig, channels: int, classes: int, weights: Weights | None
) -> tuple[nn.Module, Report | None]:
    """The network of the flags, with the weights that --transfer names; none with --from-scratch.

    Raises InputError, naming the flags, where they contradict each other or the weights.
    """
    network: nn.Module = build_backbone(config, channels, classes)
    choice: str = config.transfer
    if config.schedule == "probe":
        network = Probe(network, channels, classes)
        choice = transfer_to_probe(config)
    if weights is None or config.from_scratch:
        return network, None

    path = Path(config.pretrained)
    parts = parts_to_transfer(choice, weights.tensors, path)
    report = transfer(
        network,
        weights.tensors,
        parts,
        path,
        extra=weights.extra,
        notes=weights.notes,
        may_be_equal=weights.plan.get("method") == "scratch",
    )
    return network, report


def transfer_to_probe(config: SegConfig) -> str:
    """What a probe takes of the weights. Raises InputError where --transfer names a decoder."""
    if was_set(config, "transfer") and config.transfer != "encoder":
        raise InputError(
            f"--transfer {config.transfer}: --schedule probe has no decoder; leave --transfer out"
        )
    return "encoder"


def plan_of(
    config: SegConfig, items: DataList, crops: LabelledCrops, classes: dict[int, str]
) -> dict[str, Any]:
    """What a user of the weights needs to know to feed them."""
    plan = plan_of_network(
        config,
        items,
        channels=crops.volumes[0].shape[0],
        out_channels=len(items.regions) or len(classes),
        classes={str(label): name for label, name in classes.items()},
    )
    if config.schedule == "probe":
        plan["probe"] = True
    return {
        **plan,
        **to_plan(items.regions),
        "foreground_crop": config.foreground_crop,
        "flip_axes": list(crops.flips.axes),
        "swap": [list(pair) for pair in crops.flips.swap],
        "swap_axes": list(crops.flips.swap_axes),
        "flips": crops.flips.reason,
        "method": "segmentation",
        "recon": "plain",
    }


# --- what the loop calls by name


def say_start(run: Run) -> None:
    """The first event of the log, and what the user should know about the run."""
    config = run.config
    step = run.state["step"]
    volumes = len(run.crops.volumes)
    weights: Any = f"of step {step}" if step else "from scratch"
    if run.report:
        weights = vars(run.report)
    log_start(
        run.log,
        config,
        run.ranks,
        step=step,
        global_batch=run.crops.global_batch,
        dtype=run.dtype,
        volumes=volumes,
        validation_volumes=len(run.held_out),
        classes=run.metadata["plan"]["classes"],
        weights=weights,
        notes=run.notes,
    )
    for note in run.notes:
        run.log.say(note)

    begins = "with weights drawn anew"
    if step:
        begins = f"goes on from step {step}"
    elif run.report:
        begins = f"weights of {config.pretrained}\n{run.report}"
    faster = advice(config.amp, run.dtype, run.ranks.device, compiled=config.compile)
    scored = f"{len(run.classes) - 1} classes"
    if run.regions:
        scored = counted(len(run.regions), "region")
    run.log.say(
        f"{scored} on {volumes} volumes, {config.steps} steps of "
        f"{run.crops.global_batch}{faster}; {begins}"
    )
    run.log.say(str(run.crops.flips))


def validate(run: Run, signal: StopSignal) -> dict[str, Any]:
    """Dice over whole held-out volumes, and figures/overlay.png.

    Nothing where a stop signal has come before its end.
    """
    run.network.eval()
    try:
        validation, pictures = dice_of_volumes(
            lambda x: predict(run, x, signal),
            run.held_out,
            run.classes,
            window=run.config.crop,
            overlap=run.config.overlap,
            ranks=run.ranks,
            ignore=run.crops.ignore,
            regions=run.regions,
        )
    except Stopped:
        return {}
    set_mode(run.network, run.config)
    if run.ranks.is_main:
        overlay_sheet(run.out / "figures" / "overlay.png", pictures)
    return validation


def set_mode(network: nn.Module, config: SegConfig) -> None:
    """For training; an encoder that never moves is as in prediction, its dropout and norms too."""
    network.train()
    if config.schedule in FROZEN:
        encoder: Any = network.encoder
        encoder.eval()


def predict(run: Run, x: Tensor, signal: StopSignal) -> Tensor:
    """Windows (b, c, d, h, w) -> logits (b, classes, d, h, w). Raises Stopped."""
    signal.check()
    with autocast(run.dtype, run.ranks.device):
        logits: Tensor = run.network(x)
    return logits


def in_words(validation: Mapping[str, Any]) -> str:
    """A validation in one line."""
    if not validation:
        return "nothing left to do"
    volumes = "1 volume" if validation["cases"] == 1 else f"{validation['cases']} volumes"
    by_name = [f"{name} {dice:.3f}" for name, dice in validation["dice_by_class"].items()]
    return f"validation Dice {validation['dice']:.4f} over {volumes}; {', '.join(by_name)}"


def draw_losses(run: Run) -> None:
    """figures/loss.png, from the log so far."""
    if run.ranks.is_main:
        seg_curve(run.out / "figures" / "loss.png", read_log(run.out / "log.jsonl"))


def save(run: Run, name: str) -> None:
    """All of the run in one file of its folder."""
    if not run.ranks.is_main:
        return
    content = {**run.state, **run.metadata, "model": run.network.state_dict()}
    save_checkpoint(run.out / name, content, run.optimizer, run.scaler)


def keep_best(run: Run, validation: Mapping[str, Any]) -> None:
    """best.pt: the highest mean Dice. nan, where no volume holds any class, counts as 0."""
    dice = validation["dice"]
    if not math.isfinite(dice):
        dice = 0.0
    if dice > run.state["best"]:
        run.state["best"] = dice
        save(run, "best.pt")


if __name__ == "__main__":
    run_or_explain(lambda: main(CONFIG), "train_seg.py", needs_less=NEEDS_LESS)
