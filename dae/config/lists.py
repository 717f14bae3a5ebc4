"""Command line of dae.data.make_list."""

from dataclasses import dataclass
from typing import Literal

from dae.config.command_line import DATA_ROOT, opt

DataSetName = Literal[
    "brats21", "luna16", "covid19", "hnscc", "colon", "lidc", "btcv", "feta"
]  # the first six: Table 1
Part = Literal["training", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class MakeListConfig:
    """which files, and what they are"""

    dataset: DataSetName = opt(
        "", "a data set of sec. 3.1: its patterns, modality, classes; none: your own"
    )
    pattern: tuple[str, ...] = opt(
        (),
        "paths of images below FOLDER, as {subject}/{subject}_{modality}.nii.gz; of several the "
        "first that fits; none: the data set's",
    )
    label: str = opt("", "path of an image's label, with the words of --pattern")
    modality: str = opt("", "of all images, where no pattern has {modality}")
    subjects: str = opt(
        "", "CSV that says whose each {subject} is: name,subject, or a metadata.csv of TCIA"
    )
    patients: str = opt(
        "",
        "word before the name of each subject: folders with one word share their patients; "
        "none: the data set's",
    )
    part: Part = opt("training", "of the list")
    out: str = opt("", "the list to write")
    data_root: str = opt("", DATA_ROOT)
    add: bool = opt(False, "add to the list --out, which this command wrote")
