"""The rows of what is done with volumes: sliding window, scores, crops to train on."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import network
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dae.config.segment import AugmentConfig
from dae.data.augment import augment
from dae.data.batches import LabelledBatch, LabelledCrops, collate_labelled
from dae.data.cache import Cached
from dae.data.sides import Flips
from dae.evaluation.metrics import score_labels
from dae.evaluation.windows import likeliest, sliding_window
from dae.training.precision import autocast

Run = Callable[[], object]
Candidates = dict[str, Run]

SPACING = (1.5, 1.5, 2.0)  # mm


# --- sliding window


def window(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """A label map of a whole volume: windows that overlap, Gaussian weights."""
    volume = np.random.default_rng(0).standard_normal([1, *[options.volume] * 3], dtype=np.float32)
    size = (options.crop, options.crop, options.crop)

    def predictor(net: nn.Module) -> Callable[[Tensor], Tensor]:
        net = net.to(device).eval()

        def predict(x: Tensor) -> Tensor:
            with autocast(dtype, device):
                return net(x)  # type: ignore[no-any-return]

        return predict

    our_network = predictor(network.ours(options, options.classes, device))

    @torch.no_grad()
    def ours() -> Tensor:
        slabs = sliding_window(
            volume,
            our_network,
            window=size,
            classes=options.classes,
            overlap=options.overlap,
            batch=options.batch_size,
            device=device,
            background=[0.0],
        )
        return torch.cat([likeliest(slab).to(torch.uint8).cpu() for slab in slabs])

    candidates: Candidates = {"ours": ours}
    if options.no_monai:
        return candidates

    from monai.inferers import sliding_window_inference

    their_network = predictor(network.monai(options, options.classes))
    x = torch.from_numpy(volume)[None]

    @torch.no_grad()
    def theirs() -> Tensor:
        y = sliding_window_inference(
            x,
            size,
            options.batch_size,
            their_network,
            overlap=options.overlap,
            mode="gaussian",
            sw_device=device,
            device=torch.device("cpu"),
        )
        return y[0].argmax(dim=0).to(torch.uint8)  # type: ignore[no-any-return,union-attr,index]

    return {**candidates, "MONAI": theirs}


# --- scores


def scores(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """Dice, HD, HD95 and MSD of every class of two label maps."""
    truth, prediction = label_maps(options.volume, options.classes)
    classes = range(1, options.classes)
    candidates: Candidates = {"ours": lambda: score_labels(prediction, truth, SPACING, classes)}
    if options.no_monai:
        return candidates

    from monai import metrics

    one_hot = [
        torch.from_numpy(np.stack([labels == c for c in range(options.classes)]))[None]
        for labels in (prediction, truth)
    ]

    def theirs() -> None:
        metrics.compute_dice(*one_hot, include_background=False)
        for percentile in (None, 95):
            metrics.compute_hausdorff_distance(*one_hot, percentile=percentile, spacing=SPACING)
        metrics.compute_average_surface_distance(*one_hot, symmetric=True, spacing=SPACING)

    candidates["MONAI"] = theirs
    try:
        import surface_distance as deepmind
    except ImportError:
        return candidates

    def by_surface_distance() -> None:
        for label in classes:
            pair = (truth == label, prediction == label)
            deepmind.compute_dice_coefficient(*pair)
            distances = deepmind.compute_surface_distances(*pair, SPACING)
            for percent in (100, 95):
                deepmind.compute_robust_hausdorff(distances, percent)
            deepmind.compute_average_surface_distance(distances)

    return {**candidates, "surface-distance": by_surface_distance}


def label_maps(side: int, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two maps (d, h, w) of one ball a class, in one of which the balls are a little elsewhere."""
    rng = np.random.default_rng(0)
    axes = np.ogrid[:side, :side, :side]
    truth = np.zeros([side] * 3, dtype=np.uint8)
    prediction = truth.copy()
    for label in range(1, classes):
        centre = rng.uniform(0.2, 0.8, 3) * side
        radius = rng.uniform(0.06, 0.15) * side
        moved = centre + rng.normal(0, 0.01 * side, 3)
        for labels, at in ((truth, centre), (prediction, moved)):
            squares = [(axis - x) ** 2 for axis, x in zip(axes, at)]
            labels[sum(squares) < radius**2] = label
    return prediction, truth


# --- crops


def crops(options: Any, device: torch.device, dtype: torch.dtype | None) -> Candidates:
    """A batch to fine-tune on, with its labels and augmentations.

    Ours comes from a memory-mapped float16 file, theirs from a float32 tensor. A worker cuts ours,
    flips and turns it, and `device` does the rest. All of theirs is done in a worker.
    """
    truth, _ = label_maps(options.volume, options.classes)
    image = np.random.default_rng(0).random((1, *truth.shape), dtype=np.float32)
    size = (options.crop, options.crop, options.crop)

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)
    np.save(path / "image.npy", image.astype(np.float16))
    np.save(path / "label.npy", truth)
    np.save(path / "foreground.npy", np.argwhere(truth).astype(np.int32)[::50])
    dataset = LabelledCrops(
        [Cached(path, image.shape, (0.0,), SPACING)],
        range(options.classes),
        size,
        seed=0,
        global_batch=options.batch_size,
        positive=0.5,
        chances=AugmentConfig(),
        flips=Flips((0, 1, 2), (), (), ""),
    )
    step = 0

    def worker() -> LabelledBatch:
        nonlocal step
        assert folder.name  # the files are there as long as this function
        batch = collate_labelled([dataset[step, j] for j in range(options.batch_size)])
        step += 1
        return batch

    def ours() -> object:
        batch = worker().to(device)
        return augment(batch.x, batch.label, batch.drawn)

    candidates: Candidates = {"ours": ours, "ours, a worker's part": worker}
    if options.no_monai:
        return candidates

    transform = their_augmentation(size)
    sample = {"image": torch.from_numpy(image), "label": torch.from_numpy(truth)[None]}

    def theirs() -> None:
        for _ in range(options.batch_size):
            transform(dict(sample))

    return {**candidates, "MONAI": theirs}


def their_augmentation(size: tuple[int, int, int]) -> Callable[[Any], Any]:
    """What AugmentConfig has at its defaults, of MONAI's transforms."""
    try:
        from monai import transforms as t
    except ImportError:
        sys.exit("MONAI is not installed: --no-monai, or pip install monai in another environment")

    both = ["image", "label"]
    flips = [t.RandFlipd(both, prob=0.2, spatial_axis=axis) for axis in range(3)]
    return t.Compose(  # type: ignore[no-any-return]
        [
            t.RandCropByPosNegLabeld(both, label_key="label", spatial_size=size, num_samples=1),
            *flips,
            t.RandRotate90d(both, prob=0.2, max_k=3, spatial_axes=(0, 1)),
            t.RandZoomd(both, prob=0.2, min_zoom=0.9, max_zoom=1.1, mode=["trilinear", "nearest"]),
            t.RandScaleIntensityd("image", prob=0.1, factors=0.1),
            t.RandShiftIntensityd("image", prob=0.1, offsets=0.1),
            t.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5)),
            t.RandGaussianNoised("image", prob=0.1, std=0.1),
        ]
    )
