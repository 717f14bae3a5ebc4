"""Images of several channels: pre-trained one by one, fine-tuned and predicted all together, as BraTS asks for."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import NETWORK, events

from dae.config.evaluate import PredictConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data import datalist, holdout
from dae.data.preprocess import Recipe, prepare
from dae.errors import InputError
from dae.weights import checkpoint
from train_pretrain import main as pretrain
from train_seg import main

evaluate = importlib.import_module("eval")
KINDS = ["flair", "t1", "t1ce", "t2"]


def brats(folder: Path, n: int = 3) -> Path:
    """A list of 4D files with labels, as the Decathlon's brain tumours are stored."""
    rng, entries = np.random.default_rng(0), []
    for k in range(n):
        label = np.zeros((18, 20, 16), dtype=np.uint8)
        label[4:12, 5 + k : 14, 4:12] = 1
        image = np.stack(
            [100 + 50 * c + 80 * label + rng.normal(0, 5, label.shape) for c in range(4)], axis=-1
        )
        for name, data in ((f"s{k}", image.astype(np.float32)), (f"s{k}_label", label)):
            nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"{name}.nii")
        entries.append({"image": f"s{k}.nii", "label": f"s{k}_label.nii", "subject": f"s{k}"})
    content: dict[str, Any] = {
        "training": entries[:-1],
        "validation": entries[-1:],
        "modality": dict(enumerate(KINDS)),
    }
    (folder / "list.json").write_text(
        json.dumps({**content, "labels": {"0": "background", "1": "tumour"}})
    )
    return folder / "list.json"


def test_channels_apart_are_items_of_their_own_subject_and_modality(tmp_path: Path) -> None:
    together = datalist.load(str(brats(tmp_path)))
    apart = datalist.split_channels(together)
    assert [item.modality_name for item in apart.training] == KINDS * 2
    assert [(item.subject, item.channel) for item in apart.training[:5]] == [
        *(("s0", (n, 4)) for n in range(4)),
        ("s1", (0, 4)),
    ]
    for n, item in enumerate(apart.validation):
        whole = prepare(together.validation[0], Recipe()).data
        assert np.array_equal(prepare(item, Recipe()).data[0], whole[n])


def test_files_of_one_channel_each_come_apart_by_file(tmp_path: Path) -> None:
    entry = {"image": ["a.nii", "b.nii"], "modality": ["t1", "t2"], "subject": "s"}
    (tmp_path / "list.json").write_text(
        json.dumps({"training": [entry, {"image": "c.nii", "modality": "ct"}]})
    )
    apart = datalist.split_channels(datalist.load(str(tmp_path / "list.json"))).training
    assert [(item.image[0].name, item.modality_name, item.channel) for item in apart] == [
        ("a.nii", "t1", (0, 1)),
        ("b.nii", "t2", (0, 1)),
        ("c.nii", "ct", (0, 1)),
    ]


@pytest.mark.parametrize("kinds", [["mr"], KINDS[:2], [*KINDS, "pd"]])
def test_a_file_of_more_or_fewer_channels_than_modalities_does_not_come_apart(
    kinds: list[str], tmp_path: Path
) -> None:
    path = brats(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "modality": kinds}))
    with pytest.raises(
        InputError, match=rf"s0\.nii: 4 channels, {len(kinds)} modalities; the list must name each"
    ):
        prepare(datalist.split_channels(datalist.load(str(path))).training[0], Recipe())


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
    assert first["plan"]["in_channels"] == 1 and first["plan"]["modalities"] == [
        "t1",
        "t1ce",
        "t2",
        "flair",
    ]
    config = tiny_seg(
        data=str(path),
        pretrained=str(tmp_path / "pre/best.pt"),
        cache_dir=str(tmp_path / "cache"),
        lr=0.0,
    )
    main(config)
    report = events(config, "start")[0]["weights"]
    assert {"encoder.stem.proj.weight", "image_block.conv1.weight"} <= set(report["adapted"])
    tuned = checkpoint.load(Path(config.out) / "best.pt")
    kernel = first["model"]["encoder.stem.proj.weight"]
    assert torch.equal(
        tuned["model"]["encoder.stem.proj.weight"], kernel.expand(-1, 4, -1, -1, -1) / 4
    )
    written = evaluate.predict(
        PredictConfig(
            checkpoint=(f"{config.out}/best.pt",),
            data=str(path),
            out=str(tmp_path / "predictions"),
            device="cpu",
        )
    )
    assert nib.load(written[0]).shape == (18, 20, 16)
