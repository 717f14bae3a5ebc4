"""Say what a file of weights is, or write it in another layout.

python -m dae.weights inspect FILE
python -m dae.weights convert FILE --to dae|monai --out FILE
"""

import sys
from dataclasses import dataclass
from typing import Literal

from dae.config.command_line import from_command_line, opt, run_or_explain
from dae.errors import InputError

PROG = "python -m dae.weights"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """how the file is read"""

    merge_order: Literal["all", "monai", "legacy"] = opt(
        "", "octants that its patch merging read; none: as its layout or its weights tell"
    )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(InspectConfig):
    """what is written"""

    to: Literal["dae", "monai"] = opt(
        "dae", "dae: for --pretrained and --init; monai: a state dict for MONAI's SwinUNETR"
    )
    out: str = opt("", "the file to write")


CONFIGS: dict[str, type[InspectConfig]] = {"inspect": InspectConfig, "convert": ConvertConfig}


def read_command() -> tuple[str, str, InspectConfig]:
    """The command, the file and the flags of this process."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    if command not in CONFIGS:
        raise InputError(f"{command}: not a command; take one of {', '.join(CONFIGS)}")

    file = ""
    if rest and not rest[0].startswith("-"):
        file, *rest = rest
    config = from_command_line(
        CONFIGS[command], prog=f"{PROG} {command}", description=__doc__, arguments=rest
    )
    if not file:
        raise InputError(f"{command}: name a file, as in {PROG} {command} FILE")
    return command, file, config


# The command line is read before torch is imported: --help, or a mistake, is answered at once.
if __name__ == "__main__":
    COMMAND, FILE, CONFIG = run_or_explain(read_command, PROG)

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dae.weights import checkpoint
from dae.weights.foreign import Weights, for_monai, read_weights
from dae.weights.transfer import PARTS, count_of

# What a plan says about the input of its network.
INPUT = ("crop", "spacing", "modalities", "ct_window", "mr_intensity", "classes", "regions")


def inspect(path: Path, config: InspectConfig) -> Weights:
    """Print what a file is."""
    quirks = {"merge_order": config.merge_order} if config.merge_order else {}
    weights = read_weights(path, quirks)
    what, *notes = weights.notes

    print(f"{path}: {what}")
    print_line("network", [network_in_words(weights.plan)])
    print_line("options", options_in_words(weights.plan["arguments"]))
    print_line("tensors", tensors_in_words(weights))

    print_line("left out", extra_in_words(weights.extra) or ["none"])
    known = {name: weights.plan[name] for name in INPUT if weights.plan.get(name)}
    print_line("fed with", options_in_words(known) or ["not known"])

    for note in notes:
        print(f"  {note}")
    return weights


def print_line(title: str, entries: list[str]) -> None:
    print(f"  {title:9} {', '.join(entries)}")


def network_in_words(plan: dict[str, Any]) -> str:
    return f"{plan['backbone']}, {plan['in_channels']} -> {plan['out_channels']} channels"


def tensors_in_words(weights: Weights) -> list[str]:
    names = list(weights.tensors)
    first, *others = [f"{count_of(part, names)} of the {part}" for part in PARTS]
    return [f"{len(names)} map: {first}", *others]


def extra_in_words(names: Iterable[str]) -> list[str]:
    """The names of tensors that no network here has, with MONAI's position indices as one."""
    entries = []
    for name in names:
        entry = "position indices" if name.endswith("position_index") else name
        if entry not in entries:
            entries.append(entry)
    return entries


def options_in_words(options: dict[str, Any]) -> list[str]:
    """{"window": [7, 7, 7], "stem": "patch"} -> ["window 7 7 7", "stem patch"]."""
    entries = []
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        entries.append(f"{name} {value}")
    return entries


def convert(path: Path, config: ConvertConfig) -> None:
    """Write a file's weights and plan for this package, or its weights for MONAI."""
    out = Path(config.out)
    if not config.out or out.absolute() == path.absolute():
        raise InputError("--out: name the file to write, another than the one that is read")
    if out.exists():
        raise InputError(
            f"--out {config.out}: is there already; name another file, or move it away"
        )

    weights = inspect(path, config)
    notes: list[str] = []
    if config.to == "dae":
        checkpoint.save(out, {"model": weights.tensors, "plan": weights.plan})
    else:
        try:
            state_dict, notes = for_monai(weights)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        checkpoint.write(out, state_dict, sealed=False)

    print(f"written to {config.out} for {config.to}")
    for note in notes:
        print(f"  {note}")


COMMANDS: dict[str, Callable[[Path, Any], object]] = {"inspect": inspect, "convert": convert}

if __name__ == "__main__":
    run_or_explain(lambda: COMMANDS[COMMAND](Path(FILE), CONFIG), f"{PROG} {COMMAND}")
