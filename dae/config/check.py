"""Command line of dae.data.check."""

from dataclasses import dataclass
from typing import Literal

from dae.config.command_line import DATA_ROOT, opt


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """what is read, and how"""

    out: str = opt("runs/check", "folder for check.json and check.html")
    data_root: str = opt("", DATA_ROOT)
    modality: str = opt("", "modality of the items that do not name one, as ct or t1")
    ct_window: tuple[float, ...] = opt(
        (-1000.0, 1000.0), "HU at whose ends voxels are counted, and by which a CT is judged"
    )
    mr_intensity: Literal["zscore", "nonzero", "percentile"] = opt(
        "zscore", "how MR will be normalised, by which it is judged"
    )
    cache_dir: str = opt("", "where a run will keep prepared volumes; else ~/.cache/dae")
    workers: int = opt(2, "processes that read; each holds one volume in memory", low=1)
    pictures: int = opt(
        60, "volumes of which the page shows slices, those with errors first", low=0
    )
