"""Say what a file of weights is, or write it in another layout.

python -m dae.weights inspect FILE
python -m dae.weights convert FILE --to dae|monai --out FILE
"""

import sys
from dataclasses import dataclass

from dae.config.command_line import from_command_line, opt, run_or_explain
from dae.errors import InputError

PROG = "python -m dae.weights"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """how the file is read"""

    merge_order: str = opt(
        "",
        "octants that its patch merging read; none: as its layout or its weights tell",
        choices=("all", "monai", "legacy"),
    )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(InspectConfig):
    """what is written"""

    to: str = opt(
        "dae",
        "dae: for --pretrained and --init; monai: a state dict for MONAI's SwinUNETR",
        choices=("dae", "monai"),
    )
    out: str = opt("", "the file to write")


CONFIGS: dict[str, type[InspectConfig]] = {"inspect": InspectConfig, "convert": ConvertConfig}


def read_command() -> tuple[str, str, InspectConfig]:
    """The command, the file and the flags of this process; without torch."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0)
    if command not in CONFIGS:
        raise InputError(f"{command}: not a command; take one of {', '.join(CONFIGS)}")
    file = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    config = from_command_line(
        CONFIGS[command], prog=f"{PROG} {command}", description=__doc__, arguments=rest
    )
    if not file:
        raise InputError(f"{command}: name a file, as in {PROG} {command} FILE")
    return command, file, config


if __name__ == "__main__":
    COMMAND: list[tuple[str, str, InspectConfig]] = []
    run_or_explain(lambda: COMMAND.append(read_command()), PROG)

from pathlib import Path
from typing import Any

from dae.weights import checkpoint
from dae.weights.foreign import Weights, for_monai, read
from dae.weights.transfer import PARTS, part_of

FED = ("crop", "spacing", "modalities", "ct_window", "mr_intensity", "classes")


def inspect(path: Path, config: InspectConfig) -> Weights:
    """Print what a file is."""
    weights = read(path, {"merge_order": config.merge_order} if config.merge_order else {})
    plan, arguments = weights.plan, weights.plan["arguments"]
    counts = [
        f"{sum(part_of(name) == part for name in weights.tensors)} of the {part}" for part in PARTS
    ]
    left = dict.fromkeys(
        "position indices" if name.endswith("position_index") else name for name in weights.extra
    )
    lines = {
        "network": [
            f"{plan['backbone']}, {plan['in_channels']} -> {plan['out_channels']} channels"
        ],
        "options": [f"{name} {in_words(value)}" for name, value in arguments.items()],
        "tensors": [f"{len(weights.tensors)} map: {counts[0]}", *counts[1:]],
        "left out": list(left) or ["none"],
        "fed with": [f"{name} {in_words(plan[name])}" for name in FED if plan.get(name)]
        or ["not known"],
    }
    print(f"{path}: {weights.notes[0]}")
    for name, facts in lines.items():
        print(f"  {name:9} {', '.join(facts)}")
    for note in weights.notes[1:]:
        print(f"  {note}")
    return weights


def in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def convert(path: Path, config: ConvertConfig) -> None:
    """Write a file's weights and plan for this package, or its weights for MONAI."""
    if not config.out or Path(config.out).absolute() == path.absolute():
        raise InputError("--out: name the file to write, another than the one that is read")
    if Path(config.out).exists():
        raise InputError(
            f"--out {config.out}: is there already; name another file, or move it away"
        )
    weights, notes = inspect(path, config), list[str]()
    if config.to == "dae":
        checkpoint.save(Path(config.out), {"model": weights.tensors, "plan": weights.plan})
    else:
        try:
            state, notes = for_monai(weights)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        checkpoint.write(Path(config.out), state, sealed=False)
    print("\n".join([f"written to {config.out} for {config.to}", *(f"  {note}" for note in notes)]))


COMMANDS: dict[str, Any] = {"inspect": inspect, "convert": convert}

if __name__ == "__main__":
    run_or_explain(
        lambda: COMMANDS[COMMAND[0][0]](Path(COMMAND[0][1]), COMMAND[0][2]),
        f"{PROG} {COMMAND[0][0]}",
    )
