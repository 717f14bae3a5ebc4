"""What pre-training and fine-tuning do alike around their loops: start, resume, read, save."""

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from dae.config.command_line import to_json
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data.batches import addresses, collate, loader
from dae.data.cache import Cached, default_folder, prepare_all
from dae.data.datalist import DataList, Item
from dae.data.preprocess import Recipe
from dae.demo import prepare_demo
from dae.errors import InputError, one_line
from dae.files import write_bytes
from dae.model import arguments_of, backbone_named, check_backbone
from dae.training import resume
from dae.training.distributed import Ranks, gather_objects, on_main_first
from dae.training.kernels import adopt_layout
from dae.training.log import Log, versions
from dae.training.precision import may_skip
from dae.weights import checkpoint, foreign
from dae.weights.foreign import Weights

Config = PretrainConfig | SegConfig
C = TypeVar("C", PretrainConfig, SegConfig)


# --- setup: how to start


def how_to_start(
    config: Config, *, path: str, script: str
) -> tuple[dict[str, Any] | None, Weights | None]:
    """What to start from: the checkpoint of a run that is resumed, or the weights in a file.

    (checkpoint, None), (None, weights), or (None, None) to start from scratch. path: of the
    weights, or nothing. script: the one that runs, whose checkpoint it must be. Raises InputError,
    also where a file in --out would be replaced.
    """
    out = Path(config.out)
    demo_out = config.presets["demo"]["out"]
    resume.check_out_folder(
        out,
        resume=config.resume,
        may_replace=is_demo(config) and config.out == demo_out,  # it may be run again and again
        inputs=(path, config.data),
    )

    resume.check_free(out)
    resumed = resume.saved_run(out, resume=config.resume, script=script)
    steps = gather_objects(resumed["step"] if resumed else 0)
    if len(set(steps)) > 1:  # as on nodes that do not share --out
        raise InputError(
            f"--out {out}: the ranks find it at steps {steps}; it must be one folder that all share"
        )

    if resumed:
        return resumed, None
    if path:
        return None, foreign.read_weights(Path(path), foreign.quirks_set(config))
    return None, None


def is_demo(config: Config) -> bool:
    """Whether the run is on phantoms."""
    return config.preset == "demo" and not config.data


def with_phantoms(config: C, ranks: Ranks, phantoms: Path) -> C:
    """For the demo, the configuration with its data in the folder `phantoms`, made if missing.

    An earlier run of the demo in --out is removed. Any other run has its data already.
    """
    if not is_demo(config):
        return config

    out = Path(config.out)
    start_over = ranks.is_main and not config.resume
    lists = on_main_first(ranks, lambda: prepare_demo(phantoms, out, start_over=start_over))
    data = lists.ct_seg if isinstance(config, SegConfig) else lists.pretrain
    return replace(config, data=str(data), cache_dir=config.cache_dir or str(out / "cache"))


# --- setup: data and network


def prepare_volumes(
    items: Sequence[Item], recipe: Recipe, config: Config, ranks: Ranks
) -> list[Cached]:
    """Every volume read, normalised and kept in --cache-dir; the ranks share the work."""
    folder = Path(config.cache_dir or default_folder())
    return prepare_all(
        items,
        recipe,
        folder.expanduser(),
        rank=ranks.rank,
        world=ranks.world,
        threads=max(1, config.workers),
        quiet=not ranks.is_main,
    )


def build_backbone(config: Config, in_channels: int, out_channels: int) -> Any:
    """The network of the flags. Raises InputError where they contradict each other or the crop."""
    try:
        backbone = backbone_named(config.backbone)
        network: Any = backbone(in_channels, out_channels, **arguments_of(backbone, config))
        check_backbone(network, config.backbone, config.crop)
    except ValueError as error:
        raise InputError(str(error)) from error
    return network


def plan_of_network(
    config: Config, items: DataList, *, channels: int, out_channels: int, classes: dict[str, str]
) -> dict[str, Any]:
    """How the network is built and fed: what a user of its weights needs to know."""
    arguments = arguments_of(backbone_named(config.backbone), config)
    return {
        "backbone": config.backbone,
        "arguments": json.loads(json.dumps(arguments)),  # lists in place of tuples
        "in_channels": channels,
        "out_channels": out_channels,
        "classes": classes,
        "crop": list(config.crop),
        "spacing": list(config.spacing),
        "modalities": items.modalities(),
        "intensity": {item.modality_name: list(item.intensity) for item in items.training},
        "ct_window": list(config.ct_window),
        "mr_intensity": config.mr_intensity,
    }


# --- setup: a run and its resumption


def metadata_of(
    config: Config, *, plan: dict[str, Any], data: str, global_batch: int
) -> dict[str, Any]:
    """What every checkpoint holds beside tensors. `data` is the fingerprint of the volumes."""
    return {
        "config": to_json(config),
        "plan": plan,
        "data": data,
        "global_batch": global_batch,
        "threads": torch.get_num_threads(),
    }


def restore(
    path: Path,
    resumed: Mapping[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Weights, optimiser, scaler and random state as they were saved at `path`.

    Raises InputError where they are not those of this run.
    """
    checkpoint.load_weights(network, resumed["model"], path)
    try:
        checkpoint.restore_rng(resumed["rng"])
        optimizer.load_state_dict(resumed["optimizer"])
        adopt_layout(optimizer)
        scaler.load_state_dict(resumed["scaler"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{path}: the state of its optimiser is not that of a run ({one_line(error)}); "
            "name another --out"
        ) from error


def open_log(config: Config, ranks: Ranks, step: int) -> Log:
    """Make the run folder, hold it, write config.json, open log.jsonl. Raises InputError."""
    out = Path(config.out)
    held = None
    if ranks.is_main:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        held = resume.hold(out)
        content = json.dumps(to_json(config), indent=1) + "\n"
        write_bytes(out / "config.json", content.encode())
    return Log(out / "log.jsonl", steps=config.steps, start=step, main=ranks.is_main, held=held)


def log_start(
    log: Log,
    config: Config,
    ranks: Ranks,
    *,
    step: int,
    global_batch: int,
    dtype: torch.dtype | None,
    **more: Any,
) -> None:
    """The first event: what is trained, and what it runs on. `more` is what one script adds."""
    if not ranks.is_main:
        return
    log.event(
        "resume" if step else "start",
        step=step,
        world=ranks.world,
        global_batch=global_batch,
        device=str(ranks.device),
        autocast=str(dtype),
        **more,
        **versions(),
        config=to_json(config),
    )


# --- what the loops call


def read_ahead(
    crops: Dataset[Any],
    config: Config,
    ranks: Ranks,
    *,
    step: int,
    gather: Callable[[Any], Any] = collate,
) -> Generator[Any, None, None]:
    """This rank's micro-batches from `step` to the end of the run."""
    own = addresses(
        step,
        config.steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        rank=ranks.rank,
        world=ranks.world,
    )
    on_gpu = ranks.device.type == "cuda"
    return loader(crops, own, workers=config.workers, pin=on_gpu, gather=gather)


def check_finite(
    log: Log, step: int, loss: float, grad_norm: float, scaler: torch.amp.GradScaler
) -> None:
    """Raises InputError on a loss or gradient that is not finite, and logs the end of the run.

    All ranks stop together, since they compare the same numbers. In fp16 the scaler skips a step
    with an infinite gradient; that is no error.
    """
    if math.isfinite(loss) and (math.isfinite(grad_norm) or may_skip(scaler)):
        return

    log.event("end", step=step, reason="not finite", loss=loss, grad_norm=grad_norm)
    saved = log.path.with_name("last.pt")
    remains = "no checkpoint had been saved yet"
    if saved.exists():
        remains = f"{saved} is from before it"
    raise InputError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped before the step, "
        f"{remains}; try --amp off or a lower --lr"
    )


def save_checkpoint(
    path: Path,
    content: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """A script's own content, and what `restore` needs beside the weights."""
    checkpoint.save(
        path,
        {
            **content,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": checkpoint.rng_state(),
        },
    )


def stopped_in_words(config: Config, step: int) -> str:
    """The last line of a run that has not come to its end."""
    stopped = f"stopped after step {step} of {config.steps}"
    if 0 < config.stop_after <= step:
        return f"{stopped}, as --stop-after {config.stop_after} says; --resume without it goes on"
    return f"{stopped}; the same command with --resume goes on"
