"""Pre-train a backbone on CT and MR volumes as a disruptive autoencoder.

phantoms, on a CPU, in minutes:  python train_pretrain.py --preset demo
your volumes, one process:       python train_pretrain.py --data list.json --out runs/a
eight GPUs, or going on:         torchrun --nproc_per_node=8 train_pretrain.py --data list.json --out runs/a --resume
"""

from dae.config.command_line import from_command_line, run_or_explain
from dae.config.pretrain import PretrainConfig

if __name__ == "__main__":
    CONFIG = from_command_line(
        PretrainConfig, prog="train_pretrain.py", description=__doc__
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

from dae.config.command_line import to_json, value_if_set
from dae.data import datalist, holdout, leaks
from dae.data.batches import Batch, Crops, addresses, loader, spread
from dae.data.cache import default_folder, prepare_all
from dae.data.datalist import DataList
from dae.data.preprocess import Recipe
from dae.demo.phantom import write_phantoms
from dae.errors import InputError
from dae.figures import loss_curve, reconstruction_sheet
from dae.model import arguments_of, backbone_named, check_backbone
from dae.pretext.methods import Pretext
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
from dae.training.log import (
    Log,
    greeting,
    in_words,
    last_words,
    not_beating_its_input,
    nothing_to_contrast,
    read,
    time_left,
    versions,
)
from dae.training.optim import Schedule, adamw, due, warmup_steps
from dae.training.precision import autocast, autocast_type, grad_scaler, may_skip
from dae.training.reconstruction import by_modality, errors, reconstruct
from dae.weights import checkpoint
from dae.weights import foreign as files
from dae.weights.foreign import Weights
from dae.weights.plan import check_same_network
from dae.weights.transfer import Report, parts_that_fit, transfer


@dataclass
class Run:
    """What the loop works with. `state` is all of it that changes beside weights and optimiser."""

    config: PretrainConfig
    ranks: Ranks
    out: Path
    modalities: list[str]  # modalities of the list; a sample's is its place here
    crops: Crops
    fixed: Crops  # to validate on
    pretext: Pretext
    net: nn.Module  # the same, compiled and behind DDP where asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast
    facts: dict[
        str, Any
    ]  # saved with every checkpoint: configuration, plan of the weights, fingerprint of the data
    # Done steps, lowest validation L1, validations in a row above L1(x_hat, x), and whether that was said.
    state: dict[str, Any] = field(
        default_factory=lambda: {"step": 0, "best": math.inf, "behind": 0, "warned": False}
    )
    note: str = ""  # what a resumed run has to say
    notes: list[str] = field(default_factory=list)  # what was decided about the data, for the user
    data_by_size: str = ""  # fingerprint of the data as older versions wrote it


def main(config: PretrainConfig) -> dict[str, Any]:
    """One run. Returns the facts of its last validation. Raises InputError on anything that the user can mend."""
    with joined(config.device) as ranks:
        run = setup(
            config, ranks
        )  # a signal ends this at once: prepared volumes are whole or not there
        with StopSignal() as signal, closing(read_ahead(run)) as batches:
            return loop(run, batches, signal)


def loop(run: Run, batches: Iterator[Batch], signal: StopSignal) -> dict[str, Any]:
    """Train, validate, save; one turn more than steps, so that the last validation and save are as any other."""
    config, ranks, state = run.config, run.ranks, run.state
    first, validation, seen = state["step"], dict[str, Any](), list[Tensor]()
    schedule, stop = Schedule(config), False
    record = begin(run)
    since, waited, logged = time.perf_counter(), 0.0, first
    for step in range(first, config.steps + 1):
        state["step"] = step
        done = step == config.steps
        stop = stop or step >= config.stop_after > 0

        paused = time.perf_counter()
        if (step > first or step == 0 or done) and due(step, config.validate_every, config.steps):
            validation = validate(run)
            record.event("validation", step=step, **validation)
            record.say(f"step {step}: {in_words(validation)}")
            draw_losses(run)
            if step > first:
                keep_best(run, validation)
            advise(run, record, validation, done=done)
        if step > first and (due(step, config.save_every, config.steps, most=500) or stop):
            save(run, "last.pt")
        if step > first and config.keep_every and step % config.keep_every == 0:
            save(run, f"step-{step}.pt")
        if done or stop:
            break
        since += time.perf_counter() - paused

        for group in run.optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        sums = torch.zeros(3, device=ranks.device)
        for micro in range(config.accumulate):
            waiting = time.perf_counter()
            batch = next(batches).to(ranks.device)
            waited += time.perf_counter() - waiting
            alone = ranks.world == 1 or micro == config.accumulate - 1
            with nullcontext() if alone else run.net.no_sync():  # type: ignore[operator]  # gradients meet at the last
                drawn = run.pretext.draw(batch.x, batch.seeds)
                with autocast(run.dtype, ranks.device):
                    # disrupt, tokenize, local_mask, encode, decode, losses: methods.py
                    result = run.net(batch.x, batch.modality, drawn)
                run.scaler.scale(result.loss / config.accumulate).backward()
            sums += torch.stack([result.loss.detach(), result.l1, result.cmcl]) / config.accumulate
            seen.append(errors(batch, result))

        run.scaler.unscale_(run.optimizer)
        norm = nn.utils.clip_grad_norm_(run.pretext.parameters(), config.clip or math.inf)
        asked = torch.tensor([float(signal.asked)], device=ranks.device)
        numbers = mean_over_ranks(
            torch.cat([sums, norm.reshape(1).float(), asked])
        )  # the one wait of a step
        loss, l1, cmcl, grad_norm, stop = *numbers[:4], numbers[4] > 0
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_skip(run.scaler)):
            record.stop_before_the_step(step, loss, grad_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)

        if due(step + 1, config.log_every, config.steps):
            seconds, turns, logged = time.perf_counter() - since, step + 1 - logged, step + 1
            rate = turns * run.crops.global_batch / seconds
            rows = [row for part in gather_objects(torch.cat(seen).tolist()) for row in part]
            raw = by_modality(rows, run.modalities)
            record.event(
                "train",
                step=step + 1,
                loss=loss,
                l1=l1,
                cmcl=cmcl,
                lr=schedule.lr_at(step),
                grad_norm=grad_norm,
                samples_per_s=rate,
                data_wait=waited / seconds,
                l1_raw=raw.pop("l1"),
                **raw,
            )
            left = time_left((config.steps - step - 1) * seconds / turns)
            record.progress(
                step + 1,
                f"loss {loss:.4f}, lr {schedule.lr_at(step):.1e}, {rate:.1f} samples/s, {left} left",
            )
            seen, since, waited = [], time.perf_counter(), 0.0

    record.event(
        "end", step=state["step"], reason="finished" if done else "stopped", best=state["best"]
    )
    record.close()
    record.say(last_words(validation, config, step=state["step"]))
    return validation


# --- setup: data, network, optimiser, start state


def setup(config: PretrainConfig, ranks: Ranks) -> Run:
    """Everything before the first step. What needs no data is tried before any data is touched."""
    out = Path(config.out)
    demo = config.preset == "demo" and not config.data
    checkpoint.check_out_folder(
        out,
        resume=config.resume,
        free=demo and config.out == "runs/demo",
        inputs=(config.init, config.data),
    )
    # Three ways to start: where the run in --out was left, from given weights, or from nothing.
    left = checkpoint.left_in(out, resume=config.resume, script="train_pretrain.py")
    if left:
        checkpoint.check_same_flags(out / "last.pt", left, config)
        checkpoint.check_same_batch(out / "last.pt", left, config, world=ranks.world)
    given = (
        files.read(Path(config.init), files.asked_quirks(config))
        if config.init and not left
        else None
    )
    dtype, recipe = autocast_type(config.amp, ranks.device), Recipe.of(config)
    fill(
        build(config, channels=1, device=torch.device("meta")), config, given
    )  # a rehearsal without values
    config = with_phantoms(config, ranks) if demo else config
    items = datalist.load(config.data, root=config.data_root, modality=config.modality)
    items = datalist.split_channels(items) if config.channels == "apart" else items
    items = holdout.for_pretraining(
        items,
        fold=value_if_set(config, "fold"),
        split_seed=value_if_set(config, "split_seed"),
        allow_trained=config.allow_trained,
    )
    crops, fixed = crops_of(config, recipe, items, ranks)

    torch.manual_seed(config.seed)
    channels = crops.volumes[0].shape[0]
    choose_kernels(ranks.device, tf32=config.tf32)
    pretext = build(config, channels).to(ranks.device)
    lay_out(pretext, ranks.device, compiled=config.compile)
    taken = fill(pretext, config, given)
    optimizer, scaler = adamw(pretext.named_parameters(), config), grad_scaler(dtype, ranks.device)
    facts = {
        "config": to_json(config),
        "plan": plan_of(config, items, channels),
        "data": items.fingerprint([volume.content for volume in crops.volumes]),
        "global_batch": crops.global_batch,
        "threads": torch.get_num_threads(),
        "drawn_on": ranks.device.type,
    }
    run = Run(
        config,
        ranks,
        out,
        items.modalities(),
        crops,
        fixed,
        pretext,
        pretext,
        optimizer,
        scaler,
        dtype,
        facts,
    )
    run.notes = list(items.notes)
    run.data_by_size = items.fingerprint_by_size() if left else ""
    run.note = f"; weights of {config.init}\n{taken}" if taken else ""
    resume(run, left)
    compiled: Any = torch.compile(pretext) if config.compile else pretext
    run.net = parallel(compiled, ranks)
    return run


def with_phantoms(config: PretrainConfig, ranks: Ranks) -> PretrainConfig:
    """The demo's data, made where it is not there yet, and its old results out of the way."""
    out = Path(config.out)
    if ranks.is_main and not config.resume:
        checkpoint.start_over(out)
    on_main_first(ranks, lambda: write_phantoms(out / "phantoms"))
    return replace(
        config,
        data=str(out / "phantoms" / "pretrain.json"),
        cache_dir=config.cache_dir or str(out / "cache"),
    )


def crops_of(
    config: PretrainConfig, recipe: Recipe, items: DataList, ranks: Ranks
) -> tuple[Crops, Crops]:
    """Training crops and validation crops over prepared volumes. Raises InputError naming a volume it cannot use."""
    held_out = [items.modalities().index(item.modality_name) for item in items.validation]
    # Of hundreds that are held out, those that are validated on are prepared, and no others.
    validation = [items.validation[n] for n in spread(held_out, config.validate_crops)]
    everything = [
        replace(item, label=None) for item in (*items.training, *validation)
    ]  # labels are not for here
    volumes = prepare_all(
        everything,
        recipe,
        Path(config.cache_dir or default_folder()).expanduser(),
        rank=ranks.rank,
        world=ranks.world,
        threads=max(1, config.workers),
        quiet=not ranks.is_main,
    )
    modalities, n = (
        [items.modalities().index(item.modality_name) for item in everything],
        len(items.training),
    )
    if not config.allow_trained:
        leaks.check_voxels(everything, [volume.content for volume in volumes], trained=n)
    global_batch = config.batch_size * config.accumulate * ranks.world
    train = Crops(
        volumes[:n],
        modalities[:n],
        config.crop,
        seed=config.seed,
        global_batch=global_batch,
        foreground=config.foreground,
    )
    fixed = Crops(volumes[n:], modalities[n:], config.crop, seed=0, global_batch=1)
    return train, fixed


def build(config: PretrainConfig, channels: int, device: torch.device | None = None) -> Pretext:
    """Backbone and method as the flags say. Raises InputError where they contradict each other or the crop."""
    try:
        backbone = backbone_named(config.backbone)
        with device or nullcontext():
            network: Any = backbone(channels, channels, **arguments_of(backbone, config))
            check_backbone(network, config.backbone, config.crop)
            return Pretext(network, config.method, config)
    except ValueError as error:
        raise InputError(str(error)) from error


def fill(pretext: Pretext, config: PretrainConfig, given: Weights | None) -> Report | None:
    """The weights of --init into a network built as theirs. Raises InputError, naming the flags, if it is another."""
    if given is None:
        return None
    check_same_network(given.plan, config, Path(config.init))
    parts = parts_that_fit(pretext.backbone, given.tensors)
    return transfer(
        pretext.backbone,
        given.tensors,
        parts,
        Path(config.init),
        extra=given.extra,
        notes=given.notes,
    )


def plan_of(config: PretrainConfig, items: DataList, channels: int) -> dict[str, Any]:
    """What a user of the weights needs to know to feed them."""
    arguments = arguments_of(backbone_named(config.backbone), config)
    intensity = {item.modality_name: list(item.intensity) for item in items.training}
    return {
        "backbone": config.backbone,
        "arguments": json.loads(json.dumps(arguments)),
        "in_channels": channels,
        "out_channels": channels,
        "classes": {},
        "crop": list(config.crop),
        "spacing": list(config.spacing),
        "modalities": items.modalities(),
        "intensity": intensity,
        "ct_window": list(config.ct_window),
        "mr_intensity": config.mr_intensity,
        "method": config.method,
        "recon": config.recon,
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
    checkpoint.load_weights(run.pretext.backbone, left["model"], run.out / "last.pt")
    run.pretext.load_own_state(left["pretext"])
    run.optimizer.load_state_dict(left["optimizer"])
    adopt_layout(run.optimizer)
    run.scaler.load_state_dict(left["scaler"])
    checkpoint.restore_rng(left["rng"])
    run.state = {key: left[key] for key in run.state}
    notes = checkpoint.what_differs(left, run.config, world=run.ranks.world)
    then = replace(
        run.config, **{name: left["config"][name] for name in ("batch_size", "accumulate")}
    )
    was = contrasted(then, left["global_batch"] // (then.batch_size * then.accumulate))
    if run.config.alpha and was != (now := contrasted(run.config, run.ranks.world)):
        notes.append(f"CMCL compared {was} samples with each other before, {now} now")
    if run.config.mask_scope == "batch" and then.batch_size != run.config.batch_size:
        notes.append(
            "--mask-scope batch draws a mask for each micro-batch, which has other samples now"
        )
    drawn_on = run.facts["drawn_on"]
    if left.get("drawn_on", drawn_on) != drawn_on:
        notes.append(
            f"noise and masks were drawn on {left['drawn_on']} and are on {drawn_on} now: others"
        )
    if (
        left["config"]["validate_crops"] != run.config.validate_crops
        and left["step"] < run.config.steps
    ):
        run.state["best"] = math.inf
        notes.append("validation is on other crops, so best.pt is chosen anew")
    run.note = "".join(f"; {note}" for note in notes)


def contrasted(config: PretrainConfig, world: int) -> int:
    """How many samples CMCL compares with each other: a micro-batch, over all ranks.

    In the authors' form (--cmcl ranks), that of one rank.
    """
    return config.batch_size * (1 if config.cmcl == "ranks" else world)


# --- what the loop calls by name


def begin(run: Run) -> Log:
    """Run folder, configuration, and the first event of the log."""
    config, ranks = run.config, run.ranks
    if ranks.is_main:
        (run.out / "figures").mkdir(parents=True, exist_ok=True)
        (run.out / "config.json").write_text(json.dumps(to_json(config), indent=1) + "\n")
    record = Log(
        run.out / "log.jsonl", steps=config.steps, start=run.state["step"], main=ranks.is_main
    )
    facts = {
        "step": run.state["step"],
        "world": ranks.world,
        "global_batch": run.crops.global_batch,
        "device": str(ranks.device),
        "autocast": str(run.dtype),
        "volumes": len(run.crops.volumes),
        "validation_volumes": len(run.fixed.volumes),
        "modalities": run.modalities,
        "warmup": warmup_steps(config),
        "parameters": sum(p.numel() for p in run.pretext.parameters()),
    }
    kind, ran_on = "resume" if run.state["step"] else "start", versions() if ranks.is_main else {}
    record.event(kind, **facts, **ran_on, config=to_json(config), note=run.note, notes=run.notes)
    for note in run.notes:
        record.say(note)
    faster = advice(config.amp, run.dtype, ranks.device, compiled=config.compile)
    record.say(greeting(config, facts) + faster + run.note)
    modalities = {run.modalities[kind] for kind in run.crops.modalities}
    if text := nothing_to_contrast(config, contrasted(config, ranks.world), modalities):
        record.warn(run.state["step"], text)
    return record


def read_ahead(run: Run) -> Generator[Batch, None, None]:
    config, ranks = run.config, run.ranks
    places = addresses(
        run.state["step"],
        config.steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        rank=ranks.rank,
        world=ranks.world,
    )
    return loader(run.crops, places, workers=config.workers, pin=ranks.device.type == "cuda")


def validate(run: Run) -> dict[str, Any]:
    """Mean L1 over the fixed crops, that of doing nothing beside it, and figures/reconstruction.png."""
    facts, pictures = reconstruct(
        run.pretext,
        run.fixed,
        run.modalities,
        count=run.config.validate_crops,
        dtype=run.dtype,
        ranks=run.ranks,
    )
    if run.ranks.is_main:
        reconstruction_sheet(run.out / "figures" / "reconstruction.png", pictures)
    return facts


def draw_losses(run: Run) -> None:
    if run.ranks.is_main:
        loss_curve(run.out / "figures" / "loss.png", read(run.out / "log.jsonl"))


def save(run: Run, name: str) -> None:
    if run.ranks.is_main:
        checkpoint.save(
            run.out / name,
            {
                **run.state,
                **run.facts,
                "model": run.pretext.backbone.state_dict(),
                "pretext": run.pretext.own_state(),
                "optimizer": run.optimizer.state_dict(),
                "scaler": run.scaler.state_dict(),
                "rng": checkpoint.rng_state(),
            },
        )


def keep_best(run: Run, validation: dict[str, Any]) -> None:
    """The lowest validation L1 after the first step; before it, the weights are random."""
    if run.state["step"] > 0 and validation["l1"] < run.state["best"]:
        run.state["best"] = validation["l1"]
        save(run, "best.pt")


def advise(run: Run, record: Log, validation: dict[str, Any], *, done: bool) -> None:
    """Say once, at the third validation in a row or at the end, that the network does not beat its own input."""
    state = run.state
    behind = validation["l1"] > validation["l1_input"] > 0 and state["step"] > 0
    state["behind"] = state["behind"] + 1 if behind else 0
    if behind and not state["warned"] and (state["behind"] == 3 or done):
        state["warned"] = True
        record.warn(state["step"], not_beating_its_input(validation, run.config))


if __name__ == "__main__":
    run_or_explain(lambda: main(CONFIG), "train_pretrain.py")
