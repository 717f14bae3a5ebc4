"""Fine-tune a pre-trained backbone for segmentation (section 3.2), or train it from scratch for comparison.

phantoms, after the demo of pre-training:  python train_seg.py --preset demo
one fold of your labelled volumes:         python train_seg.py --data list.json --pretrained runs/a/last.pt --fold 0
the same without the weights:              python train_seg.py ... --from-scratch --out runs/scratch
"""

from dae.config.command_line import from_command_line, run_or_explain
from dae.config.segment import SegConfig

if __name__ == "__main__":
    CONFIG = from_command_line(
        SegConfig, prog="train_seg.py", description=__doc__
    )  # before torch's seconds

import json
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dae.config.command_line import to_json, value_if_set
from dae.data import datalist, holdout, leaks
from dae.data.batches import LabelledCrops, addresses, loader
from dae.data.cache import Cached, default_folder, prepare_all
from dae.data.datalist import DataList
from dae.data.preprocess import Recipe
from dae.data.sides import Flips, choose_flips, continued, flips_of
from dae.demo.phantom import write_phantoms
from dae.errors import InputError
from dae.evaluation.validation import dice_of_volumes
from dae.figures import overlay_sheet, seg_curve
from dae.model import arguments_of, backbone_named, check_backbone
from dae.training.distributed import (
    Ranks,
    StopSignal,
    gather_objects,
    joined,
    mean_over_ranks,
    on_main_first,
    parallel,
)
from dae.training.kernels import adopt_layout, advice, choose_kernels, lay_out
from dae.training.log import Log, dice_in_words, read, stopped, time_left, versions
from dae.training.losses import LOSSES
from dae.training.optim import adamw_in_parts, due, fine_tuning_factors, warmup_steps
from dae.training.precision import autocast, autocast_type, grad_scaler, may_skip
from dae.weights import checkpoint
from dae.weights import foreign as files
from dae.weights.foreign import Weights
from dae.weights.plan import with_plan
from dae.weights.transfer import Report, parts_to_transfer, transfer


@dataclass
class Run:
    """What the loop works with. `state` is all of it that changes beside weights and optimiser."""

    config: SegConfig  # with --steps worked out
    ranks: Ranks
    out: Path
    classes: dict[int, str]  # label value -> name, background first; a class is its place here
    crops: LabelledCrops
    held_out: list[Cached]
    network: nn.Module
    net: nn.Module  # the same, compiled and behind DDP where asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast
    facts: dict[
        str, Any
    ]  # saved with every checkpoint: configuration, plan of the weights, fingerprint of the data
    taken: Report | None  # what became of the pre-trained weights
    notes: list[str] = field(default_factory=list)  # what was decided, for the user
    data_by_size: str = ""  # fingerprint of the data as older versions wrote it
    state: dict[str, Any] = field(
        default_factory=lambda: {"step": 0, "best": -1.0}
    )  # done steps, highest mean Dice


def main(config: SegConfig) -> dict[str, Any]:
    """One run. Returns the facts of its last validation. Raises InputError on anything that the user can mend."""
    with joined(config.device) as ranks:
        run = setup(
            config, ranks
        )  # a signal ends this at once: prepared volumes are whole or not there
        with StopSignal() as signal, closing(read_ahead(run)) as batches:
            return loop(run, batches, signal)


def loop(run: Run, batches: Iterator[Any], signal: StopSignal) -> dict[str, Any]:
    """Train, validate, save; one turn more than steps, so that the last validation and save are as any other."""
    config, ranks, state = run.config, run.ranks, run.state
    first, validation, loss_of, stop = state["step"], dict[str, Any](), LOSSES[config.loss], False
    record = begin(run)
    since, waited, logged = time.perf_counter(), 0.0, first
    for step in range(first, config.steps + 1):
        state["step"] = step
        done = step == config.steps
        stop = stop or step >= config.stop_after > 0

        paused = time.perf_counter()
        if (step > first or done) and due(step, config.validate_every, config.steps):
            validation = validate(run)
            record.event("validation", step=step, **validation)
            record.say(f"step {step}: {dice_in_words(validation)}")
            draw_losses(run)
            if (dice := validation["dice"] if math.isfinite(validation["dice"]) else 0.0) > state[
                "best"
            ]:
                state["best"] = dice
                save(run, "best.pt")
        if step > first and (due(step, config.save_every, config.steps, most=500) or stop):
            save(run, "last.pt")
        if step > first and config.keep_every and step % config.keep_every == 0:
            save(run, f"step-{step}.pt")
        if done or stop:
            break
        since += time.perf_counter() - paused

        factors = fine_tuning_factors(config.schedule, step, config.steps, warmup_steps(config))
        for group in run.optimizer.param_groups:
            group["lr"] = config.lr * factors[0 if group["part"] == "encoder" else 1]
        total = torch.zeros((), device=ranks.device)
        for micro in range(config.accumulate):
            waiting = time.perf_counter()
            x, label = (t.to(ranks.device, non_blocking=True) for t in next(batches))
            waited += time.perf_counter() - waiting
            alone = ranks.world == 1 or micro == config.accumulate - 1
            with nullcontext() if alone else run.net.no_sync():  # type: ignore[operator]  # gradients meet at the last
                with autocast(run.dtype, ranks.device):
                    logits = run.net(x)
                loss = loss_of(logits, label) / config.accumulate
                run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()

        run.scaler.unscale_(run.optimizer)
        if factors[0] == 0:
            drop_gradients(
                run.optimizer, "encoder"
            )  # they move nothing, and would count in the clipping
        norm = nn.utils.clip_grad_norm_(run.network.parameters(), config.clip or math.inf)
        asked = torch.tensor(float(signal.asked), device=ranks.device)
        numbers = mean_over_ranks(
            torch.stack([total, norm.float(), asked])
        )  # the one wait of a step
        if not math.isfinite(numbers[0]) or not (math.isfinite(numbers[1]) or may_skip(run.scaler)):
            record.stop_before_the_step(step, numbers[0], numbers[1])
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        stop = numbers[2] > 0

        if due(step + 1, config.log_every, config.steps):
            seconds, turns, logged = time.perf_counter() - since, step + 1 - logged, step + 1
            rate = turns * run.crops.global_batch / seconds
            record.event(
                "train",
                step=step + 1,
                loss=numbers[0],
                grad_norm=numbers[1],
                lr_encoder=config.lr * factors[0],
                lr=config.lr * factors[1],
                samples_per_s=rate,
                data_wait=waited / seconds,
            )
            left = time_left((config.steps - step - 1) * seconds / turns)
            record.progress(step + 1, f"loss {numbers[0]:.4f}, {rate:.1f} samples/s, {left} left")
            since, waited = time.perf_counter(), 0.0

    record.event(
        "end", step=state["step"], reason="finished" if done else "stopped", best=state["best"]
    )
    record.close()
    result = f"{dice_in_words(validation)}; weights in {run.out / 'best.pt'}"
    record.say(result if done else stopped(config, state["step"], config.steps))
    return validation


# --- setup: data, network, optimiser, start state


def setup(config: SegConfig, ranks: Ranks) -> Run:
    """Everything before the first step. What needs no data is tried before any data is touched."""
    out = Path(config.out)
    demo = config.preset == "demo" and not config.data
    checkpoint.check_out_folder(
        out,
        resume=config.resume,
        free=demo and config.out == "runs/demo_seg",
        inputs=(config.pretrained, config.data),
    )
    # Three ways to start: where the run in --out was left, from given weights, or from nothing.
    left = checkpoint.left_in(out, resume=config.resume, script="train_seg.py")
    given = (
        files.read(Path(config.pretrained), files.asked_quirks(config))
        if config.pretrained and not left
        else None
    )
    if not (left or given or config.from_scratch):
        raise InputError("--pretrained: give a file of weights, or --from-scratch")
    if plan := left["plan"] if left else given.plan if given else None:
        config = with_plan(config, plan, out / "last.pt" if left else Path(config.pretrained))
    if left:
        checkpoint.check_same_batch(out / "last.pt", left, config, world=ranks.world)
    elif config.lr_min:
        raise InputError("--lr-min: the rates of fine-tuning end at 0 (--schedule); leave it out")
    dtype = autocast_type(config.amp, ranks.device)
    recipe = Recipe.of(config, foreground_crop=config.foreground_crop)
    fill(build(config, 1, 2, torch.device("meta")), config, given)  # a rehearsal without values
    config = with_phantoms(config, ranks) if demo else config
    items = split(config)
    classes = dict(sorted(items.labels.items()))
    if left and not config.steps and config.epochs == left["config"]["epochs"]:
        config = replace(config, steps=left["config"]["steps"])  # as long as it was begun
    flips = flips_for(config, items, classes, left)
    crops, held_out, config = crops_of(config, recipe, items, classes, flips, ranks)
    trained, validated = (
        [volume.content for volume in volumes] for volumes in (crops.volumes, held_out)
    )
    if left:
        checkpoint.check_same_flags(out / "last.pt", left, config)

    torch.manual_seed(config.seed)
    network = build(config, crops.volumes[0].shape[0], len(classes))
    taken = fill(network, config, given)
    choose_kernels(ranks.device, tf32=config.tf32)
    network = network.to(ranks.device)
    lay_out(network, ranks.device, compiled=config.compile)
    if config.schedule == "frozen-encoder":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith("encoder."))
    optimizer, scaler = (
        adamw_in_parts(network.named_parameters(), config),
        grad_scaler(dtype, ranks.device),
    )
    # Weights that were fine-tuned before know whom they were trained on then.
    before = (
        left["plan"].get("seen") if left else given.plan.get("seen") if given and taken else None
    )
    seen = leaks.seen_by(
        items, trained, fold=config.fold, split_seed=config.split_seed, before=before
    )
    facts = {
        "config": to_json(config),
        "plan": {**plan_of(config, items, crops, classes), "seen": seen},
        "data": items.fingerprint(trained, validated, labels=True),
        "global_batch": crops.global_batch,
        "threads": torch.get_num_threads(),
    }
    notes = [*items.notes, *leaks.known_before(items, validated, before)]
    notes += notes_on(given) if given and taken else []
    run = Run(
        config,
        ranks,
        out,
        classes,
        crops,
        held_out,
        network,
        network,
        optimizer,
        scaler,
        dtype,
        facts,
        taken,
        notes,
        items.fingerprint_by_size(labels=True) if left else "",
    )
    resume(run, left)
    compiled: Any = torch.compile(network) if config.compile else network
    run.net = parallel(compiled, ranks)
    return run


def with_phantoms(config: SegConfig, ranks: Ranks) -> SegConfig:
    """The demo's data, made where it is not there yet, and its old results out of the way."""
    out, folder = Path(config.out), Path(config.pretrained).parent / "phantoms"
    if ranks.is_main and not config.resume:
        checkpoint.start_over(out)
    on_main_first(ranks, lambda: write_phantoms(folder))
    return replace(
        config, data=str(folder / "ct_seg.json"), cache_dir=config.cache_dir or str(out / "cache")
    )


def split(config: SegConfig) -> DataList:
    """Training and validation items with labels: the list's own split, its folds, or one of five seeded ones."""
    items = datalist.load(config.data, root=config.data_root, modality=config.modality)
    return holdout.for_segmentation(
        items,
        config.data,
        fold=value_if_set(config, "fold"),
        split_seed=value_if_set(config, "split_seed"),
        label_fraction=config.label_fraction,
        allow_trained=config.allow_trained,
    )


def flips_for(
    config: SegConfig, items: DataList, classes: dict[int, str], left: dict[str, Any] | None
) -> Flips:
    """Which axes are flipped, by the names of the classes and the list's `swap`. Raises InputError."""
    turned = config.rotate > 0 and config.crop[0] == config.crop[1]
    flips = choose_flips(classes, items.swap, chance=config.flip, turned=turned)
    return (
        continued(flips, flips_of(left["plan"], left["config"]), Path(config.out) / "last.pt")
        if left
        else flips
    )


def crops_of(
    config: SegConfig,
    recipe: Recipe,
    items: DataList,
    classes: dict[int, str],
    flips: Flips,
    ranks: Ranks,
) -> tuple[LabelledCrops, list[Cached], SegConfig]:
    """Training crops, whole validation volumes, and the configuration with its number of steps."""
    everything = (*items.training, *items.validation)
    volumes = prepare_all(
        everything,
        recipe,
        Path(config.cache_dir or default_folder()).expanduser(),
        rank=ranks.rank,
        world=ranks.world,
        threads=max(1, config.workers),
        quiet=not ranks.is_main,
    )
    for item, volume in zip(everything, volumes):
        if strange := set(volume.labels) - {*classes, items.ignore}:
            raise InputError(
                f"{item.label}: label {min(strange)} is not among the classes that {config.data} names"
            )
    n, global_batch = len(items.training), config.batch_size * config.accumulate * ranks.world
    if not config.allow_trained:
        leaks.check_voxels(everything, [volume.content for volume in volumes], trained=n)
    config = replace(config, steps=config.steps or math.ceil(config.epochs * n / global_batch))
    crops = LabelledCrops(
        volumes[:n],
        list(classes),
        config.crop,
        seed=config.seed,
        global_batch=global_batch,
        positive=config.positive,
        chances=config,
        flips=flips,
        ignore=items.ignore,
    )
    return crops, volumes[n:], config


def build(
    config: SegConfig, channels: int, classes: int, device: torch.device | None = None
) -> nn.Module:
    """The network of the flags, which those of given weights are among, with a head of `classes`. Raises InputError."""
    try:
        backbone = backbone_named(config.backbone)
        with device or nullcontext():
            network: Any = backbone(channels, classes, **arguments_of(backbone, config))
            check_backbone(network, config.backbone, config.crop)
            return network  # type: ignore[no-any-return]
    except ValueError as error:
        raise InputError(str(error)) from error


def fill(network: nn.Module, config: SegConfig, given: Weights | None) -> Report | None:
    """The given weights into the network, as --transfer says; none with --from-scratch."""
    if given is None or config.from_scratch:
        return None
    path = Path(config.pretrained)
    parts = parts_to_transfer(config.transfer, given.tensors, path)
    return transfer(network, given.tensors, parts, path, extra=given.extra, notes=given.notes)


def plan_of(
    config: SegConfig, items: DataList, crops: LabelledCrops, classes: dict[int, str]
) -> dict[str, Any]:
    """What a user of the weights needs to know to feed them."""
    return {
        "backbone": config.backbone,
        "arguments": json.loads(json.dumps(arguments_of(backbone_named(config.backbone), config))),
        "in_channels": crops.volumes[0].shape[0],
        "out_channels": len(classes),
        "classes": {str(label): name for label, name in classes.items()},
        "crop": list(config.crop),
        "spacing": list(config.spacing),
        "modalities": items.modalities(),
        "intensity": {item.modality_name: list(item.intensity) for item in items.training},
        "ct_window": list(config.ct_window),
        "mr_intensity": config.mr_intensity,
        "foreground_crop": config.foreground_crop,
        "flip_axes": list(crops.flips.axes),
        "swap": [list(pair) for pair in crops.flips.swap],
        "swap_axes": list(crops.flips.swap_axes),
        "flips": crops.flips.reason,
        "method": "segmentation",
        "recon": "plain",
    }


def resume(run: Run, left: dict[str, Any] | None) -> None:
    """Put everything where the run in --out was left. Raises InputError if the samples would be others."""
    steps = gather_objects(left["step"] if left else 0)
    if len(set(steps)) > 1:
        raise InputError(
            f"--out {run.out}: the ranks find it at steps {steps}; it must be one folder that all share"
        )
    if left is None:
        return
    checkpoint.check_same_samples(
        run.out / "last.pt", left, run.facts, data_by_size=run.data_by_size
    )
    checkpoint.load_weights(run.network, left["model"], run.out / "last.pt")
    run.optimizer.load_state_dict(left["optimizer"])
    adopt_layout(run.optimizer)
    run.scaler.load_state_dict(left["scaler"])
    checkpoint.restore_rng(left["rng"])
    run.state = {key: left[key] for key in run.state}
    run.notes += checkpoint.what_differs(left, run.config, world=run.ranks.world)


def notes_on(given: Weights) -> list[str]:
    """What a run that starts from these weights should say about them."""
    if given.plan.get("recon") != "scaled":
        return []
    told = (
        "warning: the weights were pre-trained with --recon scaled, on crops at mean 0 and std 1; "
        "fine-tuning feeds the intensities as prepared, which they have not seen"
    )
    return [told]


def drop_gradients(optimizer: torch.optim.Optimizer, part: str) -> None:
    for group in optimizer.param_groups:
        if group["part"] == part:
            for parameter in group["params"]:
                parameter.grad = None


# --- what the loop calls by name


def begin(run: Run) -> Log:
    """Run folder, configuration, and the first event of the log."""
    config, ranks, step = run.config, run.ranks, run.state["step"]
    if ranks.is_main:
        (run.out / "figures").mkdir(parents=True, exist_ok=True)
        (run.out / "config.json").write_text(json.dumps(to_json(config), indent=1) + "\n")
    record = Log(run.out / "log.jsonl", steps=config.steps, start=step, main=ranks.is_main)
    facts = {
        "step": step,
        "world": ranks.world,
        "global_batch": run.crops.global_batch,
        "device": str(ranks.device),
        "autocast": str(run.dtype),
        "volumes": len(run.crops.volumes),
        "validation_volumes": len(run.held_out),
        "classes": run.facts["plan"]["classes"],
        "weights": vars(run.taken) if run.taken else f"of step {step}" if step else "from scratch",
        "notes": run.notes,
    }
    record.event(
        "resume" if step else "start",
        **facts,
        **(versions() if ranks.is_main else {}),
        config=to_json(config),
    )
    begins = f"goes on from step {step}" if step else "with weights drawn anew"
    begins = f"weights of {config.pretrained}\n{run.taken}" if run.taken and not step else begins
    faster = advice(config.amp, run.dtype, ranks.device, compiled=config.compile)
    for note in run.notes:
        record.say(note)
    record.say(
        f"{len(run.classes) - 1} classes on {facts['volumes']} volumes, {config.steps} steps of "
        f"{facts['global_batch']}{faster}; {begins}"
    )
    record.say(str(run.crops.flips))
    return record


def read_ahead(run: Run) -> Generator[Any, None, None]:
    config, ranks = run.config, run.ranks
    places = addresses(
        run.state["step"],
        config.steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        rank=ranks.rank,
        world=ranks.world,
    )
    pin = ranks.device.type == "cuda"
    return loader(run.crops, places, workers=config.workers, pin=pin, gather=default_collate)


def validate(run: Run) -> dict[str, Any]:
    """Dice over whole held-out volumes, and figures/overlay.png."""

    def predict(x: Tensor) -> Tensor:
        with autocast(run.dtype, run.ranks.device):
            return run.network(x)  # type: ignore[no-any-return]

    run.network.eval()
    facts, pictures = dice_of_volumes(
        predict,
        run.held_out,
        run.classes,
        window=run.config.crop,
        overlap=run.config.overlap,
        ranks=run.ranks,
        ignore=run.crops.ignore,
    )
    run.network.train()
    if run.ranks.is_main:
        overlay_sheet(run.out / "figures" / "overlay.png", pictures)
    return facts


def draw_losses(run: Run) -> None:
    if run.ranks.is_main:
        seg_curve(run.out / "figures" / "loss.png", read(run.out / "log.jsonl"))


def save(run: Run, name: str) -> None:
    if run.ranks.is_main:
        checkpoint.save(
            run.out / name,
            {
                **run.state,
                **run.facts,
                "model": run.network.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "scaler": run.scaler.state_dict(),
                "rng": checkpoint.rng_state(),
            },
        )


if __name__ == "__main__":
    run_or_explain(lambda: main(CONFIG), "train_seg.py")
