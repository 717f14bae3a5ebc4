"""Names of tensors in other people's Swin UNETR files, and what each kind of file was trained with.

All of them descend from one network, so two tables lead from MONAI's names to ours and back. The other kinds differ
from MONAI's in a prefix, in a level of nesting, and in what they carry along. The numbers are the same but for one:
MONAI stores with every block the index of its relative position bias, which is a function of the window.

    ours     encoder.stages.0.blocks.0.mlp.fc1.weight
    MONAI    swinViT.layers1.0.blocks.0.mlp.linear1.weight
    authors  encoder.layers1.0.0.blocks.0.mlp.fc1.weight     (pre-training; fine-tuned files have MONAI's names)
    swinvit  layers1.0.blocks.0.mlp.fc1.weight               (no decoder)
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dae.model.swin import MERGE_ORDER, MergeOrder, Size3, relative_position_index

Tensors = Mapping[str, Tensor]

# Where a tensor stands in the network: ours, MONAI's.
PLACES = (
    *(
        (f"encoder.stem.conv{n}.", f"swinViT.patch_embed.proj.conv{n}.conv.") for n in (1, 2)
    ),  # the authors' stem
    *((f"encoder.stem.norm{n}.", f"swinViT.patch_embed.proj.norm{n}.") for n in (1, 2)),
    ("encoder.stem.proj.", "swinViT.patch_embed.proj."),
    *((f"encoder.stages.{n}.conv.", f"swinViT.layers{n + 1}c.0.layer.") for n in range(4)),
    *((f"encoder.stages.{n}.blocks.", f"swinViT.layers{n + 1}.0.blocks.") for n in range(4)),
    *((f"encoder.stages.{n}.merge.", f"swinViT.layers{n + 1}.0.downsample.") for n in range(4)),
    ("image_block.", "encoder1.layer."),
    *((f"skip_blocks.{n}.", f"encoder{n + 2}.layer.") for n in range(3)),
    ("bottleneck.", "encoder10.layer."),
    *((f"up_blocks.{n}.", f"decoder{5 - n}.") for n in range(4)),
    ("image_up.", "decoder1."),
    ("head.", "out.conv.conv."),
)
# What it is called there.
PARTS = (
    ("bias_table", "relative_position_bias_table"),
    ("fc1.", "linear1."),
    ("fc2.", "linear2."),
    ("conv1.", "conv1.conv."),
    ("conv2.", "conv2.conv."),
    ("shortcut.", "conv3.conv."),
    ("up.", "transp_conv.conv."),
    ("block.", "conv_block."),
)
INDEX = "attn.relative_position_index"


class Layout(NamedTuple):
    """One kind of file. `options` are those that the weights were trained with, `plan` what they were fed with."""

    what: str
    options: Mapping[str, Any]
    depths: tuple[int, ...] = ()  # of all that were ever released; of others what the file has
    plan: Mapping[str, Any] = {}
    warning: str = ""


SLICED = {"clipped_bias": "sliced"}  # MONAI and the authors, in all versions
LEGACY = {**SLICED, "merge_order": "legacy"}
CROP = {"crop": [96, 96, 96], "spacing": [], "ct_window": [-1000.0, 1000.0]}
SCRAMBLED = (
    "the authors' network ran with its axes scrambled (docs/paper-vs-code.md); on straight axes these weights "
    "do not reconstruct, and how well they transfer is for a comparison with --from-scratch to say"
)
TWOS = (2, 2, 2, 2)
LAYOUTS = {
    "ours": Layout("a Swin UNETR of this package, without a plan", {}),
    "monai": Layout("MONAI's SwinUNETR", SLICED),
    "swinvit": Layout(
        "the encoder of Swin UNETR pre-training (model_swinvit.pt)", LEGACY, TWOS, CROP
    ),
    "ssl": Layout(
        "encoder and decoder pre-trained as in DAE (ssl_pretrained_weights.pth)",
        {**LEGACY, "normalize_hidden": False},
        TWOS,
        {**CROP, "mr_intensity": "nonzero"},
        SCRAMBLED,
    ),
    "official": Layout(
        "the authors' DAE pre-training (ckpt_best.pth)",
        {**LEGACY, "normalize_hidden": False},
        TWOS,
        {**CROP, "mr_intensity": "nonzero"},
        SCRAMBLED,
    ),
    "official-seg": Layout(
        "the authors' DAE fine-tuning", LEGACY, TWOS, {"crop": CROP["crop"]}, SCRAMBLED
    ),
}

# What files carry along that no network here has: heads of other tasks, a norm nothing reads, and the 1x1x1
# convolutions that MONAI 0.8 made in every block and used only where the channels change.
EXTRA = re.compile(
    r"(encoder\.|swinViT\.|swin_vit\.)?(mask_token$|norm\.)|convTrans3d\.|rotation_head\.|contrastive_head\.|conv\.\d"
    r"|encoder(2|3|4|10)\.layer\.conv3\.|.*relative_position_index$"
)
NETWORK = re.compile(
    r"(encoder|decoder)\d+\.|out\.|layers\d|patch_embed\."
)  # of a Swin UNETR by any spelling
STEM = re.compile(
    r"(.*?)(swinViT\.|swin_vit\.|encoder\.|)patch_embed\.proj\.(conv1\.conv\.)?weight$"
)
OWN_STEM = re.compile(r"(.*?)encoder\.stem\.(proj|conv1)\.weight$")


def from_monai(state_dict: Tensors) -> dict[str, Tensor]:
    """MONAI's `SwinUNETR` state dict -> ours, for a strict `SwinUNETR(..., **MONAI).load_state_dict`.

    A network built without the options in `dae.model.MONAI` (and `merge_order="legacy"` for weights made before
    MONAI 1.5) loads the same tensors and computes something else. Raises ValueError on a name that MONAI has not.
    """
    places, parts = _turned(PLACES), _turned(PARTS)
    return {
        _rename(key, places, parts): value
        for key, value in state_dict.items()
        if not key.endswith(INDEX)
    }


def to_monai(state_dict: Tensors, window: Size3 | None = None) -> dict[str, Tensor]:
    """Our state dict of a `SwinUNETR` with patch stem and four stages -> MONAI's: the inverse of `from_monai`.

    window: of the network, where it is not a cube. Raises ValueError on another network's tensors.
    """
    if "up_blocks.3.up.weight" not in state_dict or "encoder.stem.proj.weight" not in state_dict:
        raise ValueError("not a Swin UNETR of four stages with a patch stem; MONAI has no other")
    theirs: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _rename(key, PLACES, PARTS)
        theirs[name] = value
        if name.endswith("relative_position_bias_table"):
            size = window or cube(len(value))
            theirs[name.replace("_bias_table", "_index")] = relative_position_index(size, size)
    return theirs


def reorder(state_dict: Tensors, old: MergeOrder, new: MergeOrder) -> dict[str, Tensor]:
    """The same network for patch merging that reads the octants in another order: its columns change places.

    Ours names, both ways between `all` and `monai`. Raises ValueError for `legacy`, which reads two octants twice.
    """
    if old != new and "legacy" in (old, new):
        raise ValueError(
            f"merge order {old} cannot be written as {new}: legacy reads two octants twice, two never"
        )
    places = [MERGE_ORDER[old].index(octant) for octant in MERGE_ORDER[new]]

    def moved(value: Tensor) -> Tensor:
        eight = rearrange(value, "... (octants c) -> ... octants c", octants=8)
        return rearrange(eight[..., places, :], "... octants c -> ... (octants c)")

    merges = re.compile(r"encoder\.stages\.\d\.merge\.")
    return {key: moved(value) if merges.match(key) else value for key, value in state_dict.items()}


class Recognised(NamedTuple):
    layout: str
    tensors: dict[str, Tensor]  # by our names
    extra: list[str]  # known to be of no use here
    unknown: list[str]
    window: Size3


def recognise(state_dict: Tensors) -> Recognised:
    """Which layout this is, and its tensors by our names. Raises ValueError where no Swin encoder is found."""
    if own := first_match(OWN_STEM, state_dict):
        tensors, extra = unwrapped(state_dict, own[1])
        return Recognised("ours", tensors, extra, [], window_of(tensors, None))
    stem = first_match(STEM, state_dict)
    if stem is None:
        raise ValueError(
            f"no layout of a Swin UNETR has tensors of such names as {next(iter(state_dict))}"
        )
    tensors, extra = unwrapped(state_dict, stem[1])
    layout = {"encoder.": "official" if stem[3] else "ssl", "": "swinvit"}.get(stem[2], "monai")
    layout = "official-seg" if layout == "monai" and stem[3] else layout
    extra += [name for name in tensors if EXTRA.match(name)]
    ours, unknown = dict[str, Tensor](), list[str]()
    places, parts = _turned(PLACES), _turned(PARTS)
    for name in (name for name in tensors if name not in extra):
        try:
            ours[_rename(monai_name(name, stem[2]), places, parts)] = tensors[name]
        except ValueError:
            unknown.append(name)
    index = next((value for name, value in tensors.items() if name.endswith(INDEX)), None)
    return Recognised(layout, ours, extra, unknown, window_of(ours, index))


def first_match(pattern: re.Pattern[str], names: Iterable[str]) -> re.Match[str] | None:
    return next((match for match in map(pattern.match, names) if match), None)


def unwrapped(state_dict: Tensors, wrapper: str) -> tuple[dict[str, Tensor], list[str]]:
    """Without the prefix of DDP, compile, Lightning and the like; and names of what stands outside it.

    Raises ValueError on a prefix that is doubled, and on a part of the network that stands outside.
    """
    levels = wrapper.split(".")
    if any(a == b for a, b in pairwise(levels)) or {"swinViT", "swin_vit", "encoder"} & set(levels):
        raise ValueError(
            f"names begin with {wrapper!r}, a prefix that stands there twice; take one away"
        )
    outside = [name for name in state_dict if not name.startswith(wrapper)]
    if lost := [name for name in outside if NETWORK.match(name)]:
        raise ValueError(f"{lost[0]} stands outside the prefix {wrapper!r} that other names have")
    inside = {
        name.removeprefix(wrapper): t for name, t in state_dict.items() if name.startswith(wrapper)
    }
    return inside, outside


def monai_name(name: str, prefix: str) -> str:
    """A name behind the encoder's `prefix` as MONAI spells it; those of the decoder are the same everywhere."""
    inside = re.match(rf"{re.escape(prefix)}(patch_embed\.|layers\dc?\.)", name)
    if not inside:
        return name
    name = "swinViT." + name.removeprefix(prefix)
    name = re.sub(r"(layers\d)\.0\.0\.", r"\1.0.", name)
    return re.sub(r"\.fc([12])\.", r".linear\1.", name)


def reads_twice(state_dict: Tensors) -> bool:
    """Whether the weights show that patch merging read two octants twice, as `legacy` does. Of tensors by our names.

    Columns that see the same voxels get almost the same gradient, so training makes them alike, whatever they began as.
    Legacy has two such twins among the 28 pairs of octants; that they are the two most alike in both of the deepest
    stages happens by chance once in 378 squared. Weights that were hardly trained show nothing.
    """
    first, second = torch.triu_indices(8, 8, 1)
    twins = ((first == 2) & (second == 5)) | ((first == 3) & (second == 6))
    deepest = sorted(name for name in state_dict if name.endswith("merge.reduction.weight"))[-2:]
    shown = []
    for name in deepest:
        columns = rearrange(
            state_dict[name].double(), "mixed (octants c) -> octants (mixed c)", octants=8
        )
        alike = torch.corrcoef(columns)[first, second]
        shown.append(bool(alike[twins].min() > alike[~twins].max()))
    return bool(shown) and all(shown)


def options_of(found: Recognised) -> dict[str, Any]:
    """Constructor arguments that shapes and names tell. Raises ValueError on a gap."""
    tensors = found.tensors
    stem = tensors.get("encoder.stem.proj.weight", tensors.get("encoder.stem.conv1.weight"))
    blocks = [re.match(r"encoder\.stages\.(\d)\.blocks\.(\d+)\.", name) for name in tensors]
    places = {(int(match[1]), int(match[2])) for match in blocks if match}
    stages = 1 + max((stage for stage, _ in places), default=-1)
    tables = [tensors.get(f"encoder.stages.{n}.blocks.0.attn.bias_table") for n in range(stages)]
    if (
        stem is None
        or stem.ndim != 5
        or not stages
        or any(table is None or table.ndim != 2 for table in tables)
    ):
        raise ValueError(
            "its stem, or the position bias of a stage's first block, is missing or has another shape"
        )
    depths = tuple(sum(s == stage for s, _ in places) for stage in range(stages))
    wanted = LAYOUTS[found.layout].depths or (
        depths if found.layout == "ours" or stages == 4 else TWOS
    )
    if depths != wanted:
        raise ValueError(
            f"has stages of {depths} blocks, and such files have {wanted}: a part of it is missing"
        )
    return {
        "feature_size": stem.shape[0],
        "depths": depths,
        "window": found.window,
        "heads": tuple(table.shape[1] for table in tables if table is not None),
        "stem": "patch" if "encoder.stem.proj.weight" in tensors else "conv",
        "stage_conv": any(name.startswith("encoder.stages.0.conv.") for name in tensors),
    }


def window_of(tensors: Tensors, index: Tensor | None) -> Size3:
    """The window whose offsets have as many rows as the bias tables, of tensors by our names. Raises ValueError.

    Several may have: the one that MONAI's position index, which says where each pair looks, is of; without one a cube.
    """
    rows = next(
        (len(t) for name, t in tensors.items() if name.endswith("bias_table") and t.ndim), 0
    )
    odd = [n for n in range(1, rows + 1, 2) if rows % n == 0]  # 2 w - 1 along an axis
    fitting = [
        ((a + 1) // 2, (b + 1) // 2, (rows // (a * b) + 1) // 2)
        for a in odd
        for b in odd
        if rows % (a * b) == 0
    ]
    if index is not None:
        fitting = [
            w
            for w in fitting
            if prod(w) == len(index) and torch.equal(relative_position_index(w, w), index)
        ]
    elif rows:
        return cube(rows)
    if not fitting:
        raise ValueError(f"a bias table of {rows} rows and its position index are of no window")
    return fitting[0]


def cube(rows: int) -> Size3:
    """The cubic window whose (2 w - 1)^3 offsets have so many rows. Raises ValueError."""
    w = (round(rows ** (1 / 3)) + 1) // 2
    if (2 * w - 1) ** 3 != rows:
        raise ValueError(
            f"a bias table of {rows} rows is not of a cubic window, and nothing says which it is of"
        )
    return w, w, w


def _turned(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((b, a) for a, b in pairs)


def _rename(key: str, places: Iterable[tuple[str, str]], parts: Iterable[tuple[str, str]]) -> str:
    for here, there in places:
        if key.startswith(here):
            rest = key.removeprefix(here)
            for this, that in parts:
                rest = rest.replace(this, that)
            return there + rest
    raise ValueError(f"{key}: not a tensor of a Swin UNETR with patch stem and four stages")
