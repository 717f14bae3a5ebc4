"""The data sets of sec. 3.1: those of Table 1, which are pre-trained on, and BTCV and FeTA.

What is known of each before a file is read. Words are those of the data list and of the flags:
modalities, ct_window in HU, mr_intensity, spacing in mm along d h w. docs/datasets.md says where
they are had and how they become NIfTI.
"""

from typing import Literal, NamedTuple

from dae.config.lists import DataSetName

# What the part {subject} of a file's name tells apart.
NamedBy = Literal["patient", "series"]


class DataSet(NamedTuple):
    """One data set. The counts are of each modality: Table 1, or the five folds of sec. 3.1."""

    title: str
    region: str
    source: str  # the page where it is had
    modalities: tuple[str, ...]
    training: int
    validation: int

    # How its files are named: `{subject}`, `{modality}` and any other word in braces stand for
    # text (patterns.py). Of several patterns the first that fits a file holds.
    patterns: tuple[str, ...]
    label: str = ""

    # Data sets with one word here share their patients; see LUNA16.
    patients: str = ""
    named_by: NamedBy = "patient"

    # How it is prepared: the defaults of pre-training, or the preset of fine-tuning.
    ct_window: tuple[float, ...] = (-1000.0, 1000.0)  # HU
    mr_intensity: str = "zscore"
    spacing: tuple[float, ...] = ()  # mm; empty: as the files are

    # The name of label 0, of label 1, and so on.
    labels: tuple[str, ...] = ()
    swap: tuple[tuple[int, int], ...] = ()  # left and right of a pair
    tolerance_mm: tuple[tuple[str, float], ...] = ()  # of NSD; 1 mm for the others

    @property
    def volumes(self) -> int:
        """All volumes, of all modalities."""
        return (self.training + self.validation) * len(self.modalities)


# As `dcm2niix -f %i/%j` names them: a folder for each patient, a file for each series.
DICOM = ("{subject}/{series}.nii.gz",)

BTCV_LABELS = (
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)

# Those of the FLARE22 challenge for the same organs, in mm. It has none for the portal and splenic
# veins, and BTCV itself scores no NSD.
FLARE22_MM = (
    ("spleen", 3.0),
    ("right kidney", 3.0),
    ("left kidney", 3.0),
    ("gallbladder", 2.0),
    ("esophagus", 3.0),
    ("liver", 5.0),
    ("stomach", 5.0),
    ("aorta", 2.0),
    ("inferior vena cava", 2.0),
    ("pancreas", 5.0),
    ("right adrenal gland", 2.0),
    ("left adrenal gland", 2.0),
)

FETA_LABELS = (
    "background",
    "external cerebrospinal fluid",
    "grey matter",
    "white matter",
    "ventricles",
    "cerebellum",
    "deep grey matter",
    "brainstem",
)

DATASETS: dict[DataSetName, DataSet] = {
    "brats21": DataSet(
        "BraTS21",
        "brain",
        source="https://www.synapse.org",
        modalities=("t1", "t2", "t1ce", "flair"),
        training=1188,
        validation=63,
        # As distributed in 2021; then as since 2023, with the number of a patient and of a visit.
        patterns=(
            "{subject}/{subject}_{modality}.nii.gz",
            "BraTS-GLI-{subject}-{visit}/BraTS-GLI-{subject}-{visit}-{modality}.nii.gz",
        ),
        patients="brats21",
    ),
    "luna16": DataSet(
        "LUNA16",
        "chest",
        source="https://luna16.grand-challenge.org/Data/",
        modalities=("ct",),
        training=844,
        validation=44,
        patterns=("subset{number}/{subject}.nii.gz",),
        patients="lidc",  # its 888 scans are scans of LIDC-IDRI,
        named_by="series",  # by the UID of their series
    ),
    "covid19": DataSet(
        "TCIA Covid19",
        "chest",
        source="https://doi.org/10.7937/tcia.2020.gqry-nc81",
        modalities=("ct",),
        training=723,
        validation=38,
        # A patient has several scans: A-0721_day008, A-0318_1.
        patterns=(
            "volume-covid19-A-{subject}_{scan}.nii.gz",
            "volume-covid19-A-{subject}.nii.gz",
        ),
        patients="covid19",
    ),
    "hnscc": DataSet(
        "HNSCC",
        "head and neck",
        source="https://www.cancerimagingarchive.net/collection/hnscc/",
        modalities=("ct",),
        training=1223,
        validation=64,
        patterns=DICOM,
        patients="hnscc",
    ),
    "colon": DataSet(
        "TCIA Colon",
        "abdomen and pelvis",
        source="https://www.cancerimagingarchive.net/collection/ct-colonography/",
        modalities=("ct",),
        training=1520,
        validation=79,
        patterns=DICOM,
        patients="colon",
    ),
    "lidc": DataSet(
        "LIDC",
        "chest",
        source="https://www.cancerimagingarchive.net/collection/lidc-idri/",
        modalities=("ct",),
        training=451,
        validation=24,
        patterns=DICOM,
        patients="lidc",
    ),
    "btcv": DataSet(
        "BTCV",
        "abdomen",
        source="https://www.synapse.org/#!Synapse:syn3193805/wiki/89480",
        modalities=("ct",),
        training=24,
        validation=6,
        patterns=("img/img{subject}.nii.gz",),
        label="label/label{subject}.nii.gz",
        patients="btcv",
        ct_window=(-175.0, 250.0),
        spacing=(1.5, 1.5, 2.0),
        labels=BTCV_LABELS,
        swap=((2, 3), (12, 13)),
        tolerance_mm=FLARE22_MM,
    ),
    "feta": DataSet(
        "FeTA",
        "fetal brain",
        source="https://feta.grand-challenge.org/feta-2022",
        modalities=("t2",),
        training=96,
        validation=24,
        patterns=("{subject}/anat/{subject}_{reconstruction}_T2w.nii.gz",),
        label="{subject}/anat/{subject}_{reconstruction}_dseg.nii.gz",
        patients="feta",
        mr_intensity="percentile",
        labels=FETA_LABELS,
    ),
}

TABLE_1: tuple[DataSetName, ...] = ("brats21", "luna16", "covid19", "hnscc", "colon", "lidc")
