"""Write synthetic bodies in which brightness alone does not tell one organ from another.

python -m dae.demo FOLDER --subjects 40 --validation 8 --test 40 --unlabelled 80 --heads 30
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from dae.config.command_line import Size3, from_command_line, opt, run_or_explain
from dae.errors import InputError

PROG = "python -m dae.demo"


@dataclass(frozen=True, kw_only=True)
class HardPhantomsConfig:
    """hard phantoms: torsos in CT with labels, heads in four MR contrasts for pre-training"""

    subjects: int = opt(40, "torsos to train on", low=1)
    validation: int = opt(8, "torsos to validate on", low=0)
    test: int = opt(40, "torsos to test on", low=0)
    unlabelled: int = opt(80, "torsos for pre-training alone", low=0)
    heads: int = opt(30, "heads for pre-training, in four contrasts each", low=0)
    size: Size3 = opt((56, 56, 56), "voxels along d h w, of 1.5 mm", low=16)
    seed: int = opt(0, "of all bodies", low=0)


def read_command() -> tuple[Path, HardPhantomsConfig]:
    """The folder and the flags of this process."""
    arguments = sys.argv[1:]
    folder = ""
    if arguments and not arguments[0].startswith("-"):
        folder = arguments.pop(0)

    config = from_command_line(
        HardPhantomsConfig, prog=f"{PROG} FOLDER", description=__doc__, arguments=arguments
    )
    if not folder:
        raise InputError("FOLDER: name a folder to write the phantoms to")
    return Path(folder), config


if __name__ == "__main__":
    FOLDER, CONFIG = run_or_explain(read_command, PROG)

from dae.demo.hard import write_hard_phantoms


def main(folder: Path, config: HardPhantomsConfig) -> None:
    """The volumes, and the two lists that name them."""
    d, h, w = config.size
    lists = write_hard_phantoms(
        folder,
        subjects=config.subjects,
        validation=config.validation,
        test=config.test,
        unlabelled=config.unlabelled,
        heads=config.heads,
        size=(d, h, w),
        seed=config.seed,
    )
    for path in lists:
        print(path)


if __name__ == "__main__":
    run_or_explain(lambda: main(FOLDER, CONFIG), PROG)
