"""Command line of python -m dae.study."""

from dataclasses import dataclass

from dae.config.command_line import DATA_ROOT, opt


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """study"""

    out: str = opt("", "folder of the study; else runs/studies/NAME, by the plan's name")
    data: tuple[str, ...] = opt(
        (), "data lists in place of the plan's, as pretrain=LIST finetune=LIST test=LIST"
    )
    data_root: str = opt("", DATA_ROOT)
    only: tuple[str, ...] = opt(
        (), "run the cells of these methods alone; the tables have all cells that are finished"
    )
    report: bool = opt(False, "write the tables and the figure of what is there, and stop")
    keep: bool = opt(False, "keep the fine-tuned weights and the predictions of finished cells")
    dry_run: bool = opt(False, "print the cells, their commands and their time, and stop")
