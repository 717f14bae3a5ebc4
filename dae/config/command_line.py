"""A frozen dataclass in, a command line out.

    @dataclass(frozen=True, kw_only=True)
    class RunConfig:
        \"\"\"run\"\"\"

        steps: int = opt(20_000, "optimiser steps; sec. 3.2", low=1)
        amp: Literal["auto", "off"] = opt("auto", "autocast")

becomes --steps N and --amp {auto,off}, in a group called "run". A class that inherits from several
others has the flags of all of them.
"""

import argparse
import inspect
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

from dae.errors import InputError, one_line, printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
T = TypeVar("T")

Size3 = tuple[int, int, int]  # along d h w
Presets = dict[str, dict[str, Any]]  # name -> the values that it sets


INTERRUPTED = 130  # exit code of a process that Ctrl-C ends, as shells have it

# What the paths of a data list may lead to; one sentence for every command that reads lists.
DATA_ROOT = (
    "folder that the list's paths start from, and that none of them may leave; "
    "/: from the list's own folder to any; none: the list's own"
)


# What errors of torch say that have no type of their own: of a CPU, and of what works on a GPU
# beside torch's own memory.
NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def opt(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with a flag. Its type says what the flag takes; `low` and `high` bound a number."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


# --- from the command line to a configuration


def from_command_line(
    cls: type[C], *, prog: str, description: str, arguments: Sequence[str] | None = None
) -> C:
    """The configuration of this process's arguments. A mistake becomes one line and exit code 2.

    With --dry-run the configuration is printed and the process ends.
    """
    argv = sys.argv[1:] if arguments is None else arguments
    config = run_or_explain(lambda: parse(cls, argv, prog=prog, description=description), prog)
    if getattr(config, "dry_run", False):
        print(json.dumps(to_json(config), indent=1))
        sys.exit(0)
    return config


def run_or_explain(main: Callable[[], T], prog: str, *, needs_less: str = "") -> T:
    """What `main` returns. A mistake of the user becomes one line on stderr and exit code 2.

    A mistake is an InputError, a file that cannot be read or written, or work that does not fit
    into memory. needs_less: the flags with which it needs less. Ctrl-C is one line too, and exit
    code 130. DAE_DEBUG=1 shows the traceback of each.
    """
    try:
        return main()
    except KeyboardInterrupt:
        if os.environ.get("DAE_DEBUG") == "1":  # where does it hang?
            raise
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        mistake = isinstance(error, (InputError, OSError))
        if os.environ.get("DAE_DEBUG") == "1" or not (mistake or is_out_of_memory(error)):
            raise
        text = " ".join(str(error).split())
        if not mistake:
            needs_less = needs_less or "it needs a machine with more"
            text = f"out of memory ({one_line(error)}); {needs_less}"
        print(f"{prog}: {printable(text)}", file=sys.stderr)
        sys.exit(2)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, of a CPU by torch, or by NumPy. torch is not imported to ask for its error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(text in str(error) for text in NO_MEMORY)


def parse(cls: type[C], argv: Sequence[str], *, prog: str, description: str) -> C:
    """The defaults, then the preset's values, then the flags. Raises InputError."""
    presets: Presets = getattr(cls, "presets", {})
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [flag ...]",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,  # the next flag could change what an abbreviation means
    )
    _add_flags(parser, cls, presets)
    flags = vars(parser.parse_args(argv))

    of_preset = dict(presets.get(flags.get("preset", ""), {}))
    for flag, other in getattr(cls, "in_place_of", {}).items():
        if flag in flags:
            of_preset.pop(other, None)
    values = {**of_preset, **flags}
    if any(f.name == "set_flags" for f in fields(cls)):
        values["set_flags"] = tuple(flags)
    config = cls(**values)
    check_values(config)
    return config


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


class _Tuple(argparse.Action):
    """argparse collects several values in a list; a configuration is frozen and holds tuples."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _add_flags(parser: _Parser, cls: type, presets: Presets) -> None:
    """A group of flags for each class that `cls` inherits from, and for `cls` itself."""
    types = get_type_hints(cls)
    own = {f.name: f for f in fields(cls)}
    seen = set[str]()
    for base in reversed(cls.__mro__[:-1]):
        # A class may give an inherited field another default. The flag stays in the group where
        # the field comes from, and says the new default.
        names = [name for name in inspect.get_annotations(base) if name in own and name not in seen]
        seen.update(names)
        if not names:
            continue

        group = parser.add_argument_group(base.__doc__)
        for name in names:
            if name == "preset":
                _add_flag(group, own[name], Literal[*presets])
            elif own[name].metadata:
                _add_flag(group, own[name], types[name])


def _add_flag(group: Any, f: Field[Any], hint: Any) -> None:
    """Tell argparse what a field of this type takes."""
    # A flag that is not given must not appear in the result: the preset's value would be lost.
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(f)}

    parts = get_args(hint)
    if type(None) in parts:  # int | None, None until it is given
        hint = parts[0]

    if get_origin(hint) is Literal:
        options |= {"choices": parts, "metavar": "{" + ",".join(parts) + "}"}
    elif get_origin(hint) is tuple and Ellipsis in parts:
        metavar = "TEXT" if parts[0] is str else "N"
        options |= {"type": parts[0], "nargs": "+", "metavar": metavar, "action": _Tuple}
    elif get_origin(hint) is tuple:
        options |= {"type": parts[0], "nargs": 3, "metavar": ("D", "H", "W"), "action": _Tuple}
    elif hint is bool:
        options |= {"action": argparse.BooleanOptionalAction}
    elif hint is str:
        options |= {"type": os.path.expanduser, "metavar": f.name.upper()}
    else:
        options |= {"type": hint, "metavar": "N"}

    group.add_argument(_flag(f), **options)


def _flag(f: Field[Any]) -> str:
    return "--" + f.name.replace("_", "-")


def _help(f: Field[Any]) -> str:
    default = f.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default in ("", None):
        default = "none"
    return f"{f.metadata['help']} (default: {default})"


def check_values(config: "DataclassInstance") -> None:
    """Raises InputError, with the flag's name, where a value cannot be used.

    Every number must be finite and within the range of its field, and the `check` of every class
    must pass.
    """
    # In the order in which --help shows the groups.
    for base in reversed(type(config).__mro__):
        if "check" in vars(base):
            vars(base)["check"](config)

    for f in fields(config):
        if not f.metadata:
            continue
        value = getattr(config, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None:
                _check_number(f, number)


def _check_number(f: Field[Any], number: Any) -> None:
    low, high = f.metadata["low"], f.metadata["high"]
    if isinstance(number, float) and not math.isfinite(number):
        raise InputError(f"{_flag(f)} {number}: must be a number")

    too_low = low is not None and number < low
    too_high = high is not None and number > high
    if too_low or too_high:
        bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise InputError(f"{_flag(f)} {number:g}: must be {bounds}")


# --- what others ask of a configuration


def to_json(config: "DataclassInstance") -> dict[str, Any]:
    """Names and values as JSON has them: lists in place of tuples."""
    values = asdict(config)
    values.pop("set_flags", None)
    for name, value in values.items():
        if isinstance(value, tuple):
            values[name] = list(value)
    return values


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where a configuration, and a network's constructor, have tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def was_set(config: "DataclassInstance", name: str) -> bool:
    """Whether a preset or a flag has set this, or its value is not the default.

    What nobody has set may come from a checkpoint instead.
    """
    default = next(f.default for f in fields(config) if f.name == name)
    is_flag = name in getattr(config, "set_flags", ())
    return is_flag or name in of_preset(config) or getattr(config, name) != default


def of_preset(config: "DataclassInstance") -> dict[str, Any]:
    """What the preset of the configuration sets, by name."""
    presets: Presets = getattr(config, "presets", {})
    return presets.get(getattr(config, "preset", ""), {})


def value_if_set(config: "DataclassInstance", name: str) -> Any:
    """The value, or None where nobody has set it: for flags that may be without any effect."""
    return getattr(config, name) if was_set(config, name) else None
