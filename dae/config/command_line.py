"""A frozen dataclass in, a command line out."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, field, fields
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from dae.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


Size3 = tuple[int, int, int]

Presets = dict[str, dict[str, Any]]


def opt(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    return field(
        default=default, metadata={"help": help, "choices": choices, "low": low, "high": high}
    )


C = TypeVar("C", bound="DataclassInstance")
T = TypeVar("T")


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
        prog=prog,
        usage=f"{prog} [flag ...]",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    hints = get_type_hints(cls)
    own_fields, known = {f.name: f for f in fields(cls)}, set[str]()
    for base in reversed(cls.__mro__[:-1]):
        # A class may give a field of an earlier one another default; the field stays in the group it came from.
        names = [name for name in vars(base).get("__annotations__", ()) if name in own_fields]
        group = parser.add_argument_group(base.__doc__) if set(names) - known else None
        for own in (
            own_fields[name] for name in names if name not in known and own_fields[name].metadata
        ):
            choices = tuple(presets) if own.name == "preset" else own.metadata["choices"]
            _add_flag(group, own, hints[own.name], choices)
        known |= set(names)
    given = vars(parser.parse_args(argv))
    chosen = {**presets.get(given.get("preset", ""), {}), **given}
    config = cls(**chosen, **({"set_flags": tuple(chosen)} if "set_flags" in own_fields else {}))
    check_values(config)
    return config


def _add_flag(group: Any, f: Field[Any], hint: Any, choices: Sequence[str]) -> None:
    keys: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(f)}
    hint = str if get_origin(hint) is Literal else hint  # its values stand in choices as well
    hint = next(
        (part for part in get_args(hint) if type(None) in get_args(hint)), hint
    )  # int | None -> int
    if hint is bool:
        keys["action"] = argparse.BooleanOptionalAction
    elif get_origin(hint) is tuple:
        parts = get_args(hint)
        fixed = Ellipsis not in parts
        keys |= {"type": parts[0], "nargs": len(parts) if fixed else "+", "action": _Tuple}
        keys["metavar"] = ("D", "H", "W") if fixed else "N"
    else:
        keys |= {
            "type": os.path.expanduser if hint is str else hint,
            "metavar": f.name.upper() if hint is str else "N",
        }
    if choices:
        keys |= {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
    group.add_argument("--" + f.name.replace("_", "-"), **keys)


class _Tuple(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _help(f: Field[Any]) -> str:
    default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
    return f"{f.metadata['help']} (default: {default if default not in ('', None) else 'none'})"


def check_values(config: "DataclassInstance") -> None:
    """Every number finite and within the range its field declares; raises InputError with the flag's name."""
    for group in type(config).__mro__:
        if "check" in vars(group):
            vars(group)["check"](config)
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
    values = {name: value for name, value in asdict(config).items() if name != "set_flags"}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def was_set(config: "DataclassInstance", name: str) -> bool:
    """Whether a preset, a flag or the code that made the configuration has set this; else nobody minds its default."""
    default = next(f.default for f in fields(config) if f.name == name)
    return name in getattr(config, "set_flags", ()) or getattr(config, name) != default


def value_if_set(config: "DataclassInstance", name: str) -> Any:
    """The value, or None where nobody has set it: for flags that are refused where they can do nothing."""
    return getattr(config, name) if was_set(config, name) else None


def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
    """The inverse of `to_json`. Raises InputError on a name that the configuration does not have."""
    known = {f.name for f in fields(cls)}
    if unknown := set(values) - known:
        raise InputError(f"configuration has unknown entries: {', '.join(sorted(unknown))}")
    return cls(**with_tuples(values))


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where a configuration, and a network's constructor, have tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def from_command_line(
    cls: type[C], *, prog: str, description: str, arguments: Sequence[str] | None = None
) -> C:
    """`parse` of this process's arguments; answers --dry-run, and a mistake with one line and exit code 2."""
    argv = sys.argv[1:] if arguments is None else arguments
    config = run_or_explain(lambda: parse(cls, argv, prog=prog, description=description), prog)
    if getattr(config, "dry_run", False):
        print(json.dumps(to_json(config), indent=1))
        sys.exit(0)
    return config


def run_or_explain(main: Callable[[], T], prog: str) -> T:
    """Call `main`; an InputError, or a file that can't be read or written, becomes one line on stderr and exit code 2.

    DAE_DEBUG=1 shows the traceback.
    """
    try:
        return main()
    except (InputError, OSError) as error:
        if os.environ.get("DAE_DEBUG") == "1":
            raise
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
