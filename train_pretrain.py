"""Pre-train a backbone on CT and MR volumes as a disruptive autoencoder.

phantoms, on a CPU, in minutes:  python train_pretrain.py --preset demo
your volumes, one process:       python train_pretrain.py --data list.json --out runs/a
eight GPUs, or going on:
    torchrun --nproc_per_node=8 train_pretrain.py --data list.json --out runs/a --resume
"""

import dae.quiet  # noqa: F401 - before torch
from dae.config.command_line import from_command_line, run_or_explain
from dae.config.pretrain import PretrainConfig

# The command line is read before torch is imported, which takes seconds: --help and a wrong flag
# are answered at once. The run itself starts at the end of this file.
if __name__ == "__main__":
    CONFIG = from_command_line(PretrainConfig, prog="train_pretrain.py", description=__doc__)

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dae.config.command_line import was_set
from dae.config.pretrain import PretextConfig
from dae.config.shared import NEEDS_LESS
from dae.data import holdout, leaks
from dae.data.batches import Batch, Crops, spread_over_modalities
from dae.data.datalist import Content, DataList
from dae.data.preprocess import Recipe
from dae.errors import InputError
from dae.figures import loss_curve, reconstruction_sheet, terms_curve, views_sheet
from dae.pretext.baselines import BASELINES, AnyPretext, pretext_of
from dae.pretext.contrast import effective_rank
from dae.pretext.methods import ALL_READ, METHODS, READS, Output
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
from dae.training.optim import adamw, due, learning_rate, warmup_steps
from dae.training.precision import autocast, autocast_type, grad_scaler
from dae.training.reconstruction import by_modality, compare_views, l1_of_samples, reconstruct
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
from dae.weights.plan import check_same_network
from dae.weights.transfer import Report, parts_that_fit, transfer


@dataclass
class Run:
    """What the loop works with. Only weights, optimiser, scaler, clock and `state` change."""

    config: PretrainConfig
    ranks: Ranks
    out: Path
    log: Log
    clock: Clock
    modalities: list[str]  # of the data list; a sample has the index of its own
    crops: Crops
    fixed: Crops  # to validate on
    pretext: AnyPretext
    net: nn.Module  # the same, compiled and wrapped in DDP where that is asked for
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast
    metadata: dict[str, Any]  # in every checkpoint: configuration, plan, fingerprint of the data
    # step: how many are done. best: lowest validation L1, of a baseline lowest loss. behind: how
    # many validations in a row did not beat L1(x_hat, x). warned: whether that was said.
    # unvalidated: whether a stop signal has cut the validation of this step short.
    state: dict[str, Any]
    notes: list[str]  # what was decided about the data, for the user
    note: str  # where the weights come from, and what has changed in a resumed run


def main(config: PretrainConfig) -> dict[str, Any]:
    """One run. Returns its last validation. Raises InputError on what the user can mend."""
    with joined(config.device) as ranks:
        # A signal ends the setup at once, which is safe: prepared volumes are written atomically.
        run = setup(config, ranks)
        with closing(run.log):
            if config.method == "scratch":
                return leave_untrained(run)

            ahead = read_ahead(run.crops, config, ranks, step=run.state["step"])
            with StopSignal(ranks.store) as signal, closing(ahead) as batches:
                return loop(run, batches, signal)


# --------------------------------------------------------------------------------------------------


def loop(run: Run, batches: Iterator[Batch], signal: StopSignal) -> dict[str, Any]:
    """Train, validate, save.

    The body of the loop runs once more than there are steps, so that the last validation and the
    last save are written as all others are.
    """
    config = run.config
    first = run.state["step"]
    validation: dict[str, Any] = {}
    errors: list[Tensor] = []
    features: list[Tensor] = []
    stop = False

    say_start(run)
    run.clock.restart()
    for step in range(first, config.steps + 1):
        run.state["step"] = step
        done = step == config.steps
        if 0 < config.stop_after <= step:
            stop = True

        with run.clock.paused():
            # A resumed run does not repeat the validation after which it was saved, but makes up
            # for one that a signal had cut short.
            is_new = step > first or run.state["unvalidated"]
            run.state["unvalidated"] = False
            if (is_new or step == 0 or done) and due(step, config.validate_every, config.steps):
                validation = validate(run, signal)
                if validation:
                    run.log.event("validation", step=step, **validation)
                    run.log.say(f"step {step}: {in_words(validation)}")
                    draw_losses(run)
                    if is_new:
                        keep_best(run, validation)
                    advise(run, validation, done=done)
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
        errors += result.errors
        features += result.features
        if due(step + 1, config.log_every, config.steps):
            log_training(run, result, errors, features)
            errors, features = [], []
            run.clock.restart()

    step = run.state["step"]
    reason = "finished" if done else "stopped"
    run.log.event("end", step=step, reason=reason, best=run.state["best"])
    run.log.close()
    if done:
        sheet = run.out / "figures" / "reconstruction.png"
        run.log.say(f"{in_words(validation)}; see {sheet}")
    else:
        run.log.say(stopped_in_words(config, step))
    return validation


def leave_untrained(run: Run) -> dict[str, Any]:
    """--method scratch: last.pt holds the weights as the seed draws them, after no step."""
    say_start(run)
    save(run, "last.pt")
    run.log.event("end", step=0, reason="finished", best=run.state["best"])
    run.log.close()
    run.log.say(f"untrained weights of --seed {run.config.seed} are in {run.out / 'last.pt'}")
    return {}


# --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one step gives. Losses are means over its samples, on all ranks."""

    loss: float  # l1 + alpha * cmcl, or the loss of a baseline
    terms: dict[str, float]  # l1 and cmcl, or the terms of a baseline, by name
    grad_norm: float  # before clipping
    lr: float
    stop: bool  # whether any rank was asked to stop
    errors: list[Tensor]  # of each micro-batch, (b, 3), see l1_of_samples; none of a baseline
    features: list[Tensor]  # z of each micro-batch, (b, c), of this rank


def train_step(run: Run, batches: Iterator[Batch], signal: StopSignal) -> Step:
    """One step of the optimiser, over `accumulate` micro-batches on every rank."""
    config = run.config
    device = run.ranks.device

    lr = learning_rate(run.state["step"], config)
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    names = run.pretext.terms
    losses = torch.zeros(1 + len(names), device=device)
    errors: list[Tensor] = []
    features: list[Tensor] = []
    for micro in range(config.accumulate):
        with run.clock.waiting():
            batch = next(batches).to(device)
        drawn = run.pretext.draw(batch.x, batch.seeds)

        with sync_at_last(run.net, last=micro == config.accumulate - 1):
            with autocast(run.dtype, device):
                # disrupt, tokenize, local mask, encode, decode, losses: dae/pretext/methods.py;
                # the other rows of Table 4: dae/pretext/baselines.py
                output = run.net(batch.x, batch.modality, drawn)
            run.scaler.scale(output.loss / config.accumulate).backward()

        terms = [output.terms[name] for name in names]
        losses += torch.stack([output.loss.detach(), *terms]) / config.accumulate
        features.append(output.z)
        if isinstance(output, Output):
            errors.append(l1_of_samples(batch, output))

    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.pretext.parameters(), config.clip or math.inf)

    # One exchange between the ranks, and the only wait of a step. The stop flag goes along with the
    # losses: its mean is above 0 once any rank was asked to stop, so all ranks stop together.
    flag = torch.tensor([float(signal.asked)], device=device)
    means = mean_over_ranks(torch.cat([losses, norm.reshape(1).float(), flag]))
    loss, *of_terms, grad_norm, stop = means
    check_finite(run.log, run.state["step"], loss, grad_norm, run.scaler)

    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)

    # In smit a teacher follows the weights, once a step. After a gradient that is not finite they
    # have not moved: the scaler of fp16 has skipped the step.
    if math.isfinite(grad_norm):
        run.pretext.after_step(run.state["step"] / config.steps)
    return Step(
        loss,
        dict(zip(names, of_terms)),
        grad_norm,
        lr,
        stop=stop > 0,
        errors=errors,
        features=features,
    )


# --------------------------------------------------------------------------------------------------


def log_training(
    run: Run, result: Step, errors: Sequence[Tensor], features: Sequence[Tensor]
) -> None:
    """The train event and the progress line.

    errors, features: of all steps since the last event, see `Step`.
    """
    step = run.state["step"] + 1
    run.clock.read(step)

    # L1 by modality where x_rec is to be x; for a baseline, what guessing would give.
    more: dict[str, Any] = {}
    if errors:
        rows: list[list[float]] = []
        for of_rank in gather_objects(torch.cat(list(errors)).tolist()):
            rows += of_rank
        raw = by_modality(rows, run.modalities)
        more = {
            "l1_raw": raw["l1"],
            "l1_input": raw["l1_input"],
            "l1_by_modality": raw["l1_by_modality"],
            "l1_input_by_modality": raw["l1_input_by_modality"],
        }
    else:
        compared = samples_contrasted(run.config, run.ranks.world)
        more = {"chance": run.pretext.chance(compared)}

    # How many directions the features of all ranks fill: 1 where they have collapsed.
    z = torch.cat(gather_objects(torch.cat(list(features)).cpu()))

    run.log.event(
        "train",
        step=step,
        loss=result.loss,
        **result.terms,
        lr=result.lr,
        grad_norm=result.grad_norm,
        samples_per_s=run.clock.rate,
        data_wait=run.clock.data_wait,
        **more,
        z_rank=effective_rank(z),
        z_samples=len(z),
    )
    speed = f"{run.clock.rate:.1f} samples/s, {run.clock.left} left"
    run.log.progress(step, f"loss {result.loss:.4f}, lr {result.lr:.1e}, {speed}")


# --- setup: how to start, data, network, optimiser, run


def setup(config: PretrainConfig, ranks: Ranks) -> Run:
    """Everything before the first step. What needs no data is tried before any data is touched."""
    # How to start: where the run in --out was stopped, from the weights of --init, or from scratch.
    out = Path(config.out)
    resumed, weights = how_to_start(config, path=config.init, script="train_pretrain.py")
    if resumed:
        resume.check_same_flags(out / "last.pt", resumed, config)
        resume.check_same_batch(out / "last.pt", resumed, config, world=ranks.world)

    # A rehearsal, so that flags and weights that do not fit are refused before any data is read.
    # On the device "meta" tensors have shapes and no values.
    dtype = autocast_type(config.amp, ranks.device)
    recipe = Recipe.of(config)
    with torch.device("meta"):
        build(config, 1, weights)

    # Data.
    config = with_phantoms(config, ranks, out / "phantoms")
    items = holdout.read_for_pretraining(config)
    crops, fixed = crops_of(items, recipe, config, ranks)
    channels = crops.volumes[0].shape[0]

    # Network.
    checkpoint.seed_rng(config.seed)
    choose_kernels(ranks.device, tf32=config.tf32)
    pretext, report = build(config, channels, weights)
    pretext = pretext.to(ranks.device)
    lay_out(pretext, ranks.device, compiled=config.compile)

    # Optimiser.
    optimizer = adamw(pretext.to_optimise(), config)
    scaler = grad_scaler(dtype, ranks.device)

    # Run: from step 0, or from where it was stopped.
    plan = plan_of_network(config, items, channels=channels, out_channels=channels, classes={})
    plan |= plan_of_method(config)
    trained = [volume.content for volume in crops.volumes]
    plan["pretrained_on"] = what_it_sees(items, trained, resumed, weights, config)
    data = items.fingerprint(trained)
    metadata = metadata_of(config, plan=plan, data=data, global_batch=crops.global_batch)
    metadata["drawn_on"] = ranks.device.type  # noise and masks; they are others on another device

    state: dict[str, Any] = {
        "step": 0,
        "best": math.inf,
        "behind": 0,
        "warned": False,
        "unvalidated": False,
    }
    note = f"; weights of {config.init}\n{report}" if report else ""

    if resumed:
        by_size = items.fingerprint_by_size()
        resume.check_same_samples(out / "last.pt", resumed, metadata, data_by_size=by_size)
        restore(out / "last.pt", resumed, pretext.backbone, optimizer, scaler)
        pretext.load_own_state(resumed["pretext"])
        state = {key: resumed.get(key, value) for key, value in state.items()}
        if has_other_crops(resumed, config):
            state["best"] = math.inf  # it is of other crops, and cannot be compared
        changes = what_has_changed(resumed, config, ranks)
        note = "".join(f"; {change}" for change in changes)

    # DDP and the compiler wrap the forward pass. Parameters, optimiser and checkpoints are those of
    # `pretext` itself.
    net: Any = torch.compile(pretext) if config.compile else pretext
    net = parallel(net, ranks)
    return Run(
        config=config,
        ranks=ranks,
        out=out,
        log=open_log(config, ranks, state["step"]),
        clock=Clock(step=state["step"], steps=config.steps, global_batch=crops.global_batch),
        modalities=items.modalities(),
        crops=crops,
        fixed=fixed,
        pretext=pretext,
        net=net,
        optimizer=optimizer,
        scaler=scaler,
        dtype=dtype,
        metadata=metadata,
        state=state,
        notes=list(items.notes),
        note=note,
    )


def crops_of(
    items: DataList, recipe: Recipe, config: PretrainConfig, ranks: Ranks
) -> tuple[Crops, Crops]:
    """Crops to train on and crops to validate on, of prepared volumes.

    Raises InputError, naming a volume that cannot be used.
    """
    names = items.modalities()

    # Hundreds may be held out. Only those that are validated on are prepared.
    held_out = [names.index(item.modality_name) for item in items.validation]
    chosen = spread_over_modalities(held_out, config.validate_crops)
    validated = [items.validation[n] for n in chosen]

    # Pre-training does not look at labels.
    used = [replace(item, label=None) for item in (*items.training, *validated)]
    modalities = [names.index(item.modality_name) for item in used]
    volumes = prepare_volumes(used, recipe, config, ranks)
    n = len(items.training)
    if not config.allow_trained:
        leaks.check_voxels(used, [volume.content for volume in volumes], trained=n)

    crops = Crops(
        volumes[:n],
        modalities[:n],
        config.crop,
        seed=config.seed,
        global_batch=config.batch_size * config.accumulate * ranks.world,
        foreground=config.foreground,
    )
    fixed = Crops(volumes[n:], modalities[n:], config.crop, seed=0, global_batch=1)
    return crops, fixed


def build(
    config: PretrainConfig, channels: int, weights: Weights | None
) -> tuple[AnyPretext, Report | None]:
    """The backbone and the method of the flags, with the weights of --init, whole.

    Raises InputError, naming the flags, where they contradict each other or the weights.
    """
    if config.init and config.method == "scratch":
        raise InputError("--init: --method scratch writes untrained weights; leave one of them out")

    backbone = build_backbone(config, channels, channels)
    try:
        pretext = pretext_of(backbone, config)
        pretext.check_crop(config.crop)
    except ValueError as error:
        raise InputError(str(error)) from error
    if weights is None:
        return pretext, None

    path = Path(config.init)
    check_same_network(weights.plan, config, path)
    parts = parts_that_fit(backbone, weights.tensors)
    if "head" in parts and is_of_another_task(weights.plan, config):
        parts.remove("head")
    report = transfer(
        backbone,
        weights.tensors,
        parts,
        path,
        extra=weights.extra,
        notes=weights.notes,
        may_be_equal=weights.plan.get("method") == "scratch",
    )
    pretext.after_init()
    return pretext, report


def is_of_another_task(plan: Mapping[str, Any], config: PretrainConfig) -> bool:
    """Whether a head gives classes, or x_rec in the form where --recon residual has the change of
    x_hat, or the other way round.
    """
    was_residual = plan.get("recon", "plain") == "residual"
    return bool(plan.get("classes")) or was_residual != (config.recon == "residual")


def what_it_sees(
    items: DataList,
    trained: Sequence[Content],
    resumed: Mapping[str, Any] | None,
    weights: Weights | None,
    config: PretrainConfig,
) -> dict[str, list[str]]:
    """For the checkpoint: what this run trains on, and what the weights that it began with know."""
    before: Mapping[str, Any] = {}
    if resumed:
        before = resumed["plan"]
    elif weights:
        before = weights.plan
    if config.method == "scratch":
        return leaks.pretrained_on(replace(items, training=()), ())
    return leaks.pretrained_on(items, trained, before)


def plan_of_method(config: PretrainConfig) -> dict[str, Any]:
    """What a user of the weights should know of the method that trained them."""
    baseline = BASELINES.get(config.method)
    if baseline is None:
        return {"method": config.method, "recon": config.recon}

    plan = {"method": config.method, "recon": "plain"}
    if "recon" in baseline.uses:
        plan["recon"] = config.recon
    if config.method != "scratch" and not baseline.trains_decoder:
        plan["decoder"] = "untrained"
    return plan


def unused_flags(config: PretrainConfig) -> str:
    """In one line which flags a preset or the user has set that the method does not read."""
    if config.method in BASELINES:
        uses = BASELINES[config.method].uses
    else:
        of_volume, of_tokens = METHODS[config.method]
        if not {of_volume, of_tokens} <= READS.keys():  # a row that somebody has added
            return ""
        uses = (*ALL_READ, *READS[of_volume], *READS[of_tokens])

    unused = []
    for option in fields(PretextConfig):
        needless = option.name != "method" and option.name not in uses
        if needless and was_set(config, option.name):
            unused.append(f"--{option.name.replace('_', '-')}")
    if not unused:
        return ""
    return f"--method {config.method} does not use {', '.join(unused)}"


def what_has_changed(resumed: Mapping[str, Any], config: PretrainConfig, ranks: Ranks) -> list[str]:
    """In words what differs from the run so far, of what may differ, and what follows from it."""
    changes = resume.changes_in_words(resumed, config, world=ranks.world)

    saved = resumed["config"]
    before = replace(config, batch_size=saved["batch_size"], accumulate=saved["accumulate"])
    world_before = resumed["global_batch"] // (before.batch_size * before.accumulate)
    was = samples_contrasted(before, world_before)
    now = samples_contrasted(config, ranks.world)
    contrast = loss_between_samples(config)
    if contrast and was != now:
        changes.append(f"{contrast} compared {was} samples with each other before, {now} now")

    if config.mask_scope == "batch" and before.batch_size != config.batch_size:
        changes.append(
            "--mask-scope batch draws a mask for each micro-batch, which has other samples now"
        )

    drawn_on = ranks.device.type
    drawn_before = resumed.get("drawn_on", drawn_on)
    if drawn_before != drawn_on:
        changes.append(
            f"noise and masks were drawn on {drawn_before} and are on {drawn_on} now: others"
        )

    if has_other_crops(resumed, config):
        changes.append("validation is on other crops, so best.pt is chosen anew")
    return changes


def has_other_crops(resumed: Mapping[str, Any], config: PretrainConfig) -> bool:
    """Whether a run that has steps to go validates on other crops than it did before."""
    same = resumed["config"]["validate_crops"] == config.validate_crops
    return not same and resumed["step"] < config.steps


def loss_between_samples(config: PretrainConfig) -> str:
    """The name of the loss that compares samples with each other; empty where there is none."""
    if config.method in BASELINES:
        return "NT-Xent" if "contrast" in BASELINES[config.method].losses else ""
    return "CMCL" if config.alpha else ""


def samples_contrasted(config: PretrainConfig, world: int) -> int:
    """How many samples CMCL or NT-Xent compares with each other: a micro-batch over all ranks.

    In the authors' form of CMCL (--cmcl ranks), that of one rank.
    """
    if config.cmcl == "ranks" and config.method not in BASELINES:
        return config.batch_size
    return config.batch_size * world


# --- what the loop calls by name


def say_start(run: Run) -> None:
    """The first event of the log, and what the user should know about the run."""
    config = run.config
    step = run.state["step"]
    volumes = len(run.crops.volumes)
    parameters = sum(parameter.numel() for _, parameter in run.pretext.to_optimise())
    warmup = warmup_steps(config)
    log_start(
        run.log,
        config,
        run.ranks,
        step=step,
        global_batch=run.crops.global_batch,
        dtype=run.dtype,
        volumes=volumes,
        validation_volumes=len(run.fixed.volumes),
        modalities=run.modalities,
        warmup=warmup,
        parameters=parameters,
        note=run.note,
        notes=run.notes,
    )
    for note in run.notes:
        run.log.say(note)
    unused = unused_flags(config)
    if unused:
        run.log.say(unused)

    where = str(run.ranks.device)
    if run.ranks.world > 1:
        where = f"{run.ranks.world} x {where}"
    begins = f"from step {step}" if step else "from the start"
    if config.resume and not step:
        begins += " (nothing to resume yet)"
    if warmup < config.warmup:
        begins += f"; --warmup {config.warmup} cut to {warmup}, a tenth of the run"
    faster = advice(config.amp, run.dtype, run.ranks.device, compiled=config.compile)
    run.log.say(
        f"{config.method} on {volumes} volumes ({', '.join(run.modalities)}), "
        f"{parameters / 1e6:.1f} M parameters, batch {run.crops.global_batch} on {where}, "
        f"{begins}{faster}{run.note}"
    )

    trained = {run.modalities[index] for index in run.crops.modalities}
    warning = nothing_to_contrast(config, samples_contrasted(config, run.ranks.world), trained)
    if warning:
        run.log.warn(step, warning)


def nothing_to_contrast(config: PretrainConfig, samples: int, modalities: Collection[str]) -> str:
    """In one line why CMCL or NT-Xent cannot work in this run, or nothing.

    samples: how many it compares with each other. modalities: of the training volumes.
    """
    contrast = loss_between_samples(config)
    if contrast == "NT-Xent" and samples == 1:
        return (
            "warning: NT-Xent has nothing to compare: there is one sample in a micro-batch, so its "
            "loss is 0; take --batch-size 2 or more (--checkpointing saves memory)"
        )
    if contrast != "CMCL":
        return ""
    if samples == 1:
        return (
            "warning: CMCL has nothing to compare: there is one sample in a micro-batch, so its "
            "loss is a constant and its gradient 0; take --batch-size 2 (--checkpointing saves "
            "memory), or --alpha 0 to leave it out"
        )
    if len(modalities) == 1:
        return (
            f"warning: CMCL has nothing to tell apart: every training volume is {min(modalities)}, "
            "so it only pulls all features together; --alpha 0 leaves it out"
        )
    return ""


def validate(run: Run, signal: StopSignal) -> dict[str, Any]:
    """What `validate_whole` returns; nothing where a stop signal has come before its end."""
    try:
        return validate_whole(run, signal)
    except Stopped:
        return {}


def validate_whole(run: Run, signal: StopSignal) -> dict[str, Any]:
    """Mean L1 over the fixed crops, L1(x_hat, x) beside it, and figures/reconstruction.png.

    For a baseline the terms of its loss, and its views in the picture. Raises Stopped.
    """
    sheet = run.out / "figures" / "reconstruction.png"
    if run.config.method in BASELINES:
        validation, views = compare_views(
            run.pretext,
            run.fixed,
            run.modalities,
            count=run.config.validate_crops,
            dtype=run.dtype,
            ranks=run.ranks,
            signal=signal,
        )
        if run.ranks.is_main:
            views_sheet(sheet, views)
        return validation

    validation, pictures = reconstruct(
        run.pretext,
        run.fixed,
        run.modalities,
        count=run.config.validate_crops,
        dtype=run.dtype,
        ranks=run.ranks,
        signal=signal,
    )
    if run.ranks.is_main:
        reconstruction_sheet(sheet, pictures)
    return validation


def in_words(validation: Mapping[str, Any]) -> str:
    """A validation in one line."""
    if not validation:
        return "nothing left to do"
    if "chance" in validation:
        return terms_in_words(validation)

    text = f"validation L1 {validation['l1']:.4f}"
    if validation["l1_input"]:
        share = validation["l1"] / validation["l1_input"]
        text += f", {share:.3f} of doing nothing (L1(x_hat, x) = {validation['l1_input']:.4f})"

    l1_input = validation["l1_input_by_modality"]
    by_name = [
        f"{modality} {l1:.4f}/{l1_input[modality]:.4f}"
        for modality, l1 in validation["l1_by_modality"].items()
    ]
    return f"{text}; {', '.join(by_name)}"


def terms_in_words(validation: Mapping[str, Any]) -> str:
    """A validation of a baseline in one line."""
    words = [f"validation loss {validation['loss']:.4f}"]
    for name, value in validation.items():
        if name in validation["chance"]:
            chance = validation["chance"][name]
            words.append(f"{name.replace('_', ' ')} {value:.3f} (by chance {chance:.3f})")
    return ", ".join(words)


def draw_losses(run: Run) -> None:
    """figures/loss.png, from the log so far."""
    if not run.ranks.is_main:
        return
    path = run.out / "figures" / "loss.png"
    events = read_log(run.out / "log.jsonl")
    if run.config.method in BASELINES:
        terms_curve(path, events, BASELINES[run.config.method].losses)
    else:
        loss_curve(path, events)


def save(run: Run, name: str) -> None:
    """All of the run in one file of its folder."""
    if not run.ranks.is_main:
        return
    content = {
        **run.state,
        **run.metadata,
        "model": run.pretext.backbone.state_dict(),
        "pretext": run.pretext.own_state(),
    }
    save_checkpoint(run.out / name, content, run.optimizer, run.scaler)


def keep_best(run: Run, validation: Mapping[str, Any]) -> None:
    """best.pt: the lowest validation L1; of a baseline, the lowest loss.

    That of step 0 does not count: its weights are random.
    """
    value = validation["loss" if run.config.method in BASELINES else "l1"]
    if value < run.state["best"]:
        run.state["best"] = value
        save(run, "best.pt")


def advise(run: Run, validation: Mapping[str, Any], *, done: bool) -> None:
    """Warn that the network does not beat its own input.

    Once: at the third validation in a row, or at the end.
    """
    state = run.state
    if "l1" not in validation:  # of a baseline that does not restore its input
        return
    is_behind = state["step"] > 0 and validation["l1"] > validation["l1_input"] > 0
    state["behind"] = state["behind"] + 1 if is_behind else 0
    if not is_behind or state["warned"]:
        return
    if state["behind"] == 3 or done:
        state["warned"] = True
        run.log.warn(state["step"], not_beating_its_input(validation, run.config))


def not_beating_its_input(validation: Mapping[str, Any], config: PretrainConfig) -> str:
    remedy = "train longer, or try another --lr"
    if config.recon == "plain":
        remedy = (
            "with --recon plain the decoder's instance norms erase a crop's intensity: "
            "try --recon residual or scaled"
        )
    return (
        "warning: the network does not beat its own input: "
        f"validation L1 {validation['l1']:.4f}, "
        f"doing nothing L1(x_hat, x) {validation['l1_input']:.4f}; {remedy}"
    )


if __name__ == "__main__":
    run_or_explain(lambda: main(CONFIG), "train_pretrain.py", needs_less=NEEDS_LESS)
