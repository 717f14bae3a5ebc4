"""Images of several channels, as in BraTS: pre-trained one by one, then used all together."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import NETWORK, events, refusal

from dae.config.evaluate import PredictConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data import datalist
from dae.data.preprocess import Recipe, prepare
from dae.weights import checkpoint
from train_pretrain import main as pretrain
from train_seg import main

evaluate = importlib.import_module("eval")
MODALITIES = ["flair", "t1", "t1ce", "t2"]


def brats(folder: Path, n: int = 3) -> Path:
    """A list of 4D files with labels, as the Decathlon's brain tumours are stored."""
    rng = np.random.default_rng(0)
    entries = []
    for k in range(n):
        label = np.zeros((18, 20, 16), dtype=np.uint8)
        label[4:12, 5 + k : 14, 4:12] = 1
        channels = [100 + 50 * c + 80 * label + rng.normal(0, 5, label.shape) for c in range(4)]
        image = np.stack(channels, axis=-1).astype(np.float32)

        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"s{k}.nii")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"s{k}_label.nii")
        entries.append({"image": f"s{k}.nii", "label": f"s{k}_label.nii", "subject": f"s{k}"})
    content: dict[str, Any] = {
        "training": entries[:-1],
        "validation": entries[-1:],
        "modality": dict(enumerate(MODALITIES)),
        "labels": {"0": "background", "1": "tumour"},
    }
    (folder / "list.json").write_text(json.dumps(content))
    return folder / "list.json"


def test_split_channels_are_items_of_one_subject_and_their_own_modality(tmp_path: Path) -> None:
    items = datalist.load(str(brats(tmp_path)))
    split = datalist.split_channels(items)
    assert [item.modality_name for item in split.training] == MODALITIES * 2
    assert [item.subject for item in split.training] == ["s0"] * 4 + ["s1"] * 4
    assert [item.channel for item in split.training[:4]] == [(0, 4), (1, 4), (2, 4), (3, 4)]

    whole = prepare(items.validation[0], Recipe()).data
    for n, item in enumerate(split.validation):
        assert np.array_equal(prepare(item, Recipe()).data[0], whole[n])


def test_files_of_one_channel_are_split_by_file(tmp_path: Path) -> None:
    entry = {"image": ["a.nii", "b.nii"], "modality": ["t1", "t2"], "subject": "s"}
    (tmp_path / "list.json").write_text(
        json.dumps({"training": [entry, {"image": "c.nii", "modality": "ct"}]})
    )
    split = datalist.split_channels(datalist.load(str(tmp_path / "list.json"))).training
    assert [(item.image[0].name, item.modality_name, item.channel) for item in split] == [
        ("a.nii", "t1", (0, 1)),
        ("b.nii", "t2", (0, 1)),
        ("c.nii", "ct", (0, 1)),
    ]


@pytest.mark.parametrize("modalities", [["mr"], MODALITIES[:2], [*MODALITIES, "pd"]])
def test_a_file_of_more_or_fewer_channels_than_modalities_is_not_split(
    modalities: list[str], tmp_path: Path
) -> None:
    path = brats(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "modality": modalities}))
    split = datalist.split_channels(datalist.load(str(path)))
    line = refusal(prepare, split.training[0], Recipe())
    assert f"s0.nii: 4 channels, {len(modalities)} modalities; the list must name each" in line


def test_single_channels_are_pretrained_and_four_fine_tuned_and_predicted(
    tmp_path: Path, tiny_seg: Callable[..., SegConfig]
) -> None:
    path = brats(tmp_path)
    pretrain(
        PretrainConfig(
            data=str(path),
            channels="apart",
            out=str(tmp_path / "pre"),
            cache_dir=str(tmp_path / "cache"),
            crop=(16, 16, 16),
            **NETWORK,
            steps=2,
            workers=0,
            device="cpu",
            amp="off",
            validate_crops=2,
        )
    )
    first = checkpoint.load(tmp_path / "pre/best.pt")
    assert first["plan"]["in_channels"] == 1
    assert first["plan"]["modalities"] == ["t1", "t1ce", "t2", "flair"]

    config = tiny_seg(
        data=str(path),
        pretrained=str(tmp_path / "pre/best.pt"),
        cache_dir=str(tmp_path / "cache"),
        lr=0.0,
    )
    main(config)
    report = events(config, "start")[0]["weights"]
    assert {"encoder.stem.proj.weight", "image_block.conv1.weight"} <= set(report["adapted"])

    kernel = first["model"]["encoder.stem.proj.weight"]
    tuned = checkpoint.load(Path(config.out) / "best.pt")["model"]["encoder.stem.proj.weight"]
    assert torch.equal(tuned, kernel.expand(-1, 4, -1, -1, -1) / 4)

    written = evaluate.predict(
        PredictConfig(
            checkpoint=(f"{config.out}/best.pt",),
            data=str(path),
            out=str(tmp_path / "predictions"),
            device="cpu",
        )
    )
    assert nib.load(written[0]).shape == (18, 20, 16)
