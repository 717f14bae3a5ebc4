"""A frozen dataclass in, a command line out: every knob is one line with its type, its default and its reason.

No import of torch here, so that `--help` and a mistyped flag answer at once. The names of methods and backbones stand
as literals for the same reason; a test compares them with the dictionaries that hold the functions and classes.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Size3 = tuple[int, int, int]
Presets = dict[str, dict[str, Any]]
METHOD_NAMES = ("dae", "noise", "downsample", "local_mask", "mae")
BACKBONE_NAMES = ("swin_unetr", "unet", "vit_unetr")


class InputError(Exception):
    """What the user gave cannot be used. One line: the file or flag, and what to do."""


def opt(
    default: Any, help: str, *, choices: Sequence[str] = (), low: float | None = None, high: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class PretextConfig:
    """disruption and losses"""

    method: str = opt("dae", "row of Tables 4 and 5; dae: noise, downsampling, local masking", choices=METHOD_NAMES)
    noise_mean: float = opt(0.0, "mu of eq. 1")
    noise_std: float = opt(0.1, "sigma of eq. 1, a standard deviation; sec. 3.2 (App. G calls it a variance)", low=0)
    downsample_factor: float = opt(4.0, "epsilon of eq. 2; sec. 3.2", low=1)
    downsample_mode: str = opt("trilinear", "interpolation D of eq. 2, both ways; the authors' code: nearest",
                               choices=("trilinear", "nearest", "area"))  # fmt: skip
    order: str = opt("chain", "chain: noise, then down and up; sum: D(x) + noise (sec. 2, 'add the two')",
                     choices=("chain", "sum"))  # fmt: skip
    mask_ratio: tuple[float, ...] = opt((0.6,), "r, share of channels (mae: of tokens) masked; two numbers: drawn "
                                        "between them; sec. 3.2 (App. G.3: 0.4 alone)", low=0, high=0.99)  # fmt: skip
    mask_scope: str = opt("sample", "local masking draws a set of channels per sample, per batch or per token",
                          choices=("sample", "batch", "token"))  # fmt: skip
    mask_along: str = opt("channels", "what local masking zeroes, sec. 2; planes: what the authors' layout bug zeroes",
                          choices=("channels", "planes"))  # fmt: skip
    mask_block: int = opt(16, "side of mae's masked blocks, in voxels", low=1)
    recon: str = opt("plain", "x_rec is the output as it is (sec. 2); rescaled by x_hat's mean and std, which also "
                     "standardise the input (scaled) or do not (output); or added to x_hat (residual)",
                     choices=("plain", "scaled", "output", "residual"))  # fmt: skip
    skip: str = opt("auto", "what the skip at full resolution sees; auto: x_hat, or zeros where x_hat is the target",
                    choices=("auto", "input", "zeros"))  # fmt: skip
    l1_units: str = opt("auto", "L1 trains in raw intensities or in units of the crop's std; auto: raw for plain",
                        choices=("auto", "raw", "crop"))  # fmt: skip
    alpha: float = opt(0.05, "weight of CMCL, eq. 4; 0 turns it off; sec. 2", low=0)
    cmcl: str = opt("bce", "binary cross-entropy on the label matrix (eq. 3-4), softmax over positives, or class ranks "
                    "as columns (the authors' code)", choices=("bce", "softmax", "ranks"))  # fmt: skip
    temperature: float = opt(0.07, "t of eq. 3: similarities times exp(t); for softmax divided by t; sec. 2")
    z: str = opt("pooled", "feature of eq. 3: bottleneck, mean over space, L2-normalised; flat: the authors' code",
                 choices=("pooled", "flat"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """network"""

    backbone: str = opt("swin_unetr", f"{', '.join(BACKBONE_NAMES)}, or your own as module:Class from the folder where "
                        "the command runs (docs/porting.md); sec. 2, 'Network and Training'")  # fmt: skip
    feature_size: int = opt(48, "channels of a token; vit: of the decoder at full resolution", low=1)
    depths: tuple[int, ...] = opt((2, 2, 2, 2), "blocks of each stage; 2 to 4 stages, unet: 2 to 7", low=1)
    heads: tuple[int, ...] = opt((3, 6, 12, 24), "attention heads of each stage", low=1)
    window: Size3 = opt((7, 7, 7), "tokens of an attention window along d h w", low=1)
    stem: str = opt("patch", "2x2x2 patches, or the authors' two 3x3x3 convolutions", choices=("patch", "conv"))
    merge_order: str = opt("all", "octants that patch merging reads", choices=("all", "monai", "legacy"))
    clipped_bias: str = opt("rebuilt", "position bias of a window that the grid clips", choices=("rebuilt", "sliced"))
    normalize_hidden: bool = opt(True, "layer norm on the states that go to the decoder")
    stage_conv: bool = opt(False, "a residual convolution before each stage (SwinUNETR-V2)")
    vit_channels: int = opt(768, "vit: channels of a token; a multiple of 6 and of the heads", low=1)
    vit_depth: int = opt(12, "vit: blocks of the transformer", low=1)
    vit_heads: int = opt(12, "vit: attention heads of each block", low=1)
    vit_patch: int = opt(16, "vit: voxels of a patch along each axis, 8 or 16", low=1)
    checkpointing: bool = opt(False, "recompute the blocks in the backward pass: less memory, more time")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """data"""

    data: str = opt("", "data list (JSON), or an nnU-Net raw folder")
    data_root: str = opt("", "folder that the list's paths start from; else the list's own")
    modality: str = opt("", "modality of the items that do not name one, as ct or t1")
    fold: int = opt(0, "held-out fold, where the list has folds and no validation", low=0)
    split_seed: int = opt(0, "seed of the 5 %% of subjects held out, where the list has neither folds nor validation",
                          low=0)  # fmt: skip
    allow_trained: bool = opt(False, "validate on images or subjects that are trained on too: to see whether a network "
                              "learns them by heart")  # fmt: skip
    crop: Size3 = opt((96, 96, 96), "voxels of a crop along d h w; sec. 3.2", low=1)
    spacing: tuple[float, ...] = opt((), "resample to these mm along d h w; none: as the files are")
    ct_window: tuple[float, ...] = opt((-1000.0, 1000.0), "HU that become 0 and 1")
    mr_intensity: str = opt("zscore", "MR: z-score by the nonzero voxels; nonzero: zeros stay 0, as in the authors' "
                            "code; percentile: 0.05 and 99.95 to [0, 1]",
                            choices=("zscore", "nonzero", "percentile"))  # fmt: skip
    cache_dir: str = opt("", "where prepared volumes are kept, shared by all ranks and runs; else ~/.cache/dae")
    workers: int = opt(2, "processes that read ahead, per rank", low=0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """optimisation"""

    steps: int = opt(20_000, "optimiser steps; sec. 3.2", low=1)
    batch_size: int = opt(2, "samples per rank and micro-batch; sec. 3.2", low=1)
    accumulate: int = opt(1, "micro-batches per step; CMCL sees one micro-batch over all ranks", low=1)
    lr: float = opt(4e-4, "peak learning rate of AdamW; sec. 3.2", low=0)
    lr_min: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    weight_decay: float = opt(1e-5, "of matrices and kernels, not of norms, biases and bias tables; sec. 3.2", low=0)
    warmup: int = opt(500, "steps of linear warm-up; sec. 3.2; at most a tenth of --steps", low=0)
    clip: float = opt(1.0, "largest norm of the gradient; 0 turns it off", low=0)
    amp: str = opt("auto", "autocast; auto: bf16 where the device is fast at it, else off",
                   choices=("auto", "bf16", "fp16", "off"))  # fmt: skip
    tf32: bool = opt(False, "float32 products on a GPU with 10 bits of mantissa, for --amp off: faster")
    seed: int = opt(0, "seed of the weights and of every sample", low=0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """run"""

    preset: str = opt("", "paper: the text; official: the authors' code; demo: phantoms on a CPU, in minutes")
    out: str = opt("runs/pretrain", "run folder: config.json, log.jsonl, last.pt, best.pt, figures/")
    resume: bool = opt(False, "continue the run in --out, or start it where there is none yet")
    stop_after: int = opt(
        0, "save and stop after this step; --resume without this flag goes on; 0: run to --steps", low=0
    )
    log_every: int = opt(10, "steps between train events in log.jsonl", low=1)
    validate_every: int = opt(0, "steps between validations; 0: a tenth of --steps", low=0)
    save_every: int = opt(0, "steps between checkpoints; 0: a tenth of --steps, at most 500", low=0)
    keep_every: int = opt(0, "also keep step-N.pt every so many steps; 0: none", low=0)
    device: str = opt("auto", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))
    compile: bool = opt(False, "torch.compile the network: minutes at the start, faster steps")
    dry_run: bool = opt(False, "print the resolved configuration and stop")
    # Names that a preset or a flag has set: what was not asked for may come from a checkpoint. No flag of its own.
    given: tuple[str, ...] = field(default=(), compare=False, repr=False)


# What may differ between a run and its resumption: what no weight depends on, but for its last bits.
# The product of --batch-size, --accumulate and ranks may not change: checkpoint.check_same_batch.
FREE_ON_RESUME = frozenset({
    "out", "resume", "stop_after", "log_every", "validate_every", "save_every", "keep_every", "workers", "cache_dir",
    "dry_run", "data", "data_root", "preset", "allow_trained", "batch_size", "accumulate", "checkpointing", "compile",
    "device", "validate_crops",
})  # fmt: skip

PAPER: dict[str, Any] = {}  # the defaults are the text's

OFFICIAL: dict[str, Any] = {
    "noise_std": 0.1**0.5, "mask_ratio": (28 / 48,), "downsample_mode": "nearest", "mask_scope": "batch",
    "mask_along": "planes", "mr_intensity": "nonzero",
    "skip": "input", "alpha": 0.03, "temperature": 0.5, "cmcl": "ranks", "z": "flat",
    "stem": "conv", "merge_order": "legacy", "clipped_bias": "sliced", "normalize_hidden": False,
    "steps": 595_000, "lr": 1e-4, "lr_min": 1e-5, "weight_decay": 0.05, "warmup": 2_380, "amp": "off",
}  # fmt: skip

DEMO: dict[str, Any] = {
    "out": "runs/demo", "crop": (48, 48, 48), "feature_size": 16, "depths": (2, 2, 2), "heads": (2, 4, 8),
    "window": (4, 4, 4), "recon": "residual", "foreground": 0.5, "ct_window": (-300.0, 500.0), "steps": 250,
    "warmup": 20, "lr": 3e-3, "amp": "off", "validate_every": 50, "workers": 1, "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig, OptimConfig, NetworkConfig, PretextConfig, DataConfig):
    """pre-training"""

    init: str = opt("", "start from these weights (continued pre-training): any that dae.weights reads, whole")
    foreground: float = opt(0.0, "share of the crops that are centred on foreground; else anywhere", low=0, high=1)
    validate_crops: int = opt(16, "fixed crops to validate on, spread over the held-out volumes", low=1)
    channels: str = opt("together", "all of an image are seen at once, or each apart, as a volume of its own",
                        choices=("together", "apart"))  # fmt: skip

    presets: ClassVar[Presets] = {"paper": PAPER, "official": OFFICIAL, "demo": DEMO}


C = TypeVar("C", bound="DataclassInstance")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parse(cls: type[C], argv: Sequence[str], *, prog: str, description: str) -> C:
    """Command line -> configuration: the defaults, then the preset's values, then the flags. Raises InputError."""
    presets: Presets = getattr(cls, "presets", {})
    parser = _Parser(
        prog=prog, usage=f"{prog} [flag ...]", description=description,
        formatter_class=_Help, allow_abbrev=False,
    )  # fmt: skip
    hints = get_type_hints(cls)
    own_fields, known = {f.name: f for f in fields(cls)}, set[str]()
    for base in reversed(cls.__mro__[:-1]):
        # A class may give a field of an earlier one another default; the field stays in the group it came from.
        names = [name for name in vars(base).get("__annotations__", ()) if name in own_fields]
        group = parser.add_argument_group(base.__doc__) if set(names) - known else None
        for own in (own_fields[name] for name in names if name not in known and own_fields[name].metadata):
            choices = tuple(presets) if own.name == "preset" else own.metadata["choices"]
            _add_flag(group, own, hints[own.name], choices)
        known |= set(names)
    given = vars(parser.parse_args(argv))
    chosen = {**presets.get(given.get("preset", ""), {}), **given}
    config = cls(**chosen, **({"given": tuple(chosen)} if "given" in own_fields else {}))
    check_values(config)
    return config


def _add_flag(group: Any, f: Field[Any], hint: Any, choices: Sequence[str]) -> None:
    keys: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(f)}
    hint = str if get_origin(hint) is Literal else hint  # its values stand in choices as well
    hint = next((part for part in get_args(hint) if type(None) in get_args(hint)), hint)  # int | None -> int
    if hint is bool:
        keys["action"] = argparse.BooleanOptionalAction
    elif get_origin(hint) is tuple:
        parts = get_args(hint)
        fixed = Ellipsis not in parts
        keys |= {"type": parts[0], "nargs": len(parts) if fixed else "+", "action": _Tuple}
        keys["metavar"] = ("D", "H", "W") if fixed else "N"
    else:
        keys |= {"type": os.path.expanduser if hint is str else hint, "metavar": f.name.upper() if hint is str else "N"}
    if choices:
        keys |= {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
    group.add_argument("--" + f.name.replace("_", "-"), **keys)


class _Tuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _help(f: Field[Any]) -> str:
    default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    return f"{f.metadata['help']} (default: {default if default not in ('', None) else 'none'})"


def check_values(config: "DataclassInstance") -> None:
    """Every number finite and within the range its field declares; raises InputError with the flag's name."""
    backbone = getattr(config, "backbone", "")
    if backbone and backbone not in BACKBONE_NAMES and not re.fullmatch(r"\w+(\.\w+)*:\w+", backbone):
        raise InputError(f"--backbone {backbone}: take {', '.join(BACKBONE_NAMES)}, or your own as module:Class")
    if isinstance(config, OptimConfig) and config.lr_min > config.lr:
        raise InputError(f"--lr-min {config.lr_min:g}: above --lr {config.lr:g}, so the rate would climb")
    for f in (f for f in fields(config) if f.metadata):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"--{f.name.replace('_', '-')} {number}: must be a number")
            if (low is not None and number < low) or (high is not None and number > high):
                bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                raise InputError(f"--{f.name.replace('_', '-')} {number:g}: must be {bounds}")


def to_json(config: "DataclassInstance") -> dict[str, Any]:
    values = {name: value for name, value in asdict(config).items() if name != "given"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def asked_for(config: "DataclassInstance", name: str) -> bool:
    """Whether a preset, a flag or the code that made the configuration has set this; else nobody minds its default."""
    default = next(f.default for f in fields(config) if f.name == name)
    return name in getattr(config, "given", ()) or getattr(config, name) != default


def if_asked_for(config: "DataclassInstance", name: str) -> Any:
    """The value, or None where nobody has set it: for flags that are refused where they can do nothing."""
    return getattr(config, name) if asked_for(config, name) else None


def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
    """The inverse of `to_json`. Raises InputError on a name that the configuration does not have."""
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise InputError(f"configuration has unknown entries: {', '.join(sorted(unknown))}")
    return cls(**with_tuples(values))


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where a configuration, and a network's constructor, have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def differences(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Flags whose value is not the saved one, of those that a resumed run may not change.

    A flag that the run of an older version did not know yet was at its default.
    """
    now, usual = (json.loads(json.dumps(to_json(each))) for each in (config, type(config)()))
    return [name for name in now if name not in FREE_ON_RESUME and now[name] != saved.get(name, usual[name])]


def from_command_line(cls: type[C], *, prog: str, description: str, arguments: Sequence[str] | None = None) -> C:
    """`parse` of this process's arguments; answers --dry-run, and a mistake with one line and exit code 2."""
    configs: list[C] = []
    given = sys.argv[1:] if arguments is None else arguments
    run_or_explain(lambda: configs.append(parse(cls, given, prog=prog, description=description)), prog)
    if getattr(configs[0], "dry_run", False):
        print(json.dumps(to_json(configs[0]), indent=1))
        sys.exit(0)
    return configs[0]


def run_or_explain(main: Callable[[], object], prog: str) -> None:
    """Call `main`; an InputError, or a file that can't be read or written, becomes one line on stderr and exit code 2.

    DAE_DEBUG=1 shows the traceback.
    """
    try:
        main()
    except (InputError, OSError) as error:
        if os.environ.get("DAE_DEBUG") == "1":
            raise
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
