"""Names of tensors in other people's Swin UNETR files, and what each kind of file was trained with.

All these files are of one network. Two tables translate MONAI's names into ours and back. The other
layouts are MONAI's with another prefix, another level of nesting, or more tensors. The values are
the same everywhere. MONAI stores one tensor more for each block: the relative position index, which
follows from the window.

    ours     encoder.stages.0.blocks.0.mlp.fc1.weight
    MONAI    swinViT.layers1.0.blocks.0.mlp.linear1.weight
    authors  encoder.layers1.0.0.blocks.0.mlp.fc1.weight  (pre-training; fine-tuning as MONAI)
    swinvit  layers1.0.blocks.0.mlp.fc1.weight            (no decoder)
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
Names = tuple[tuple[str, str], ...]

# How the name of a tensor begins: ours, MONAI's. The first row that fits counts.
PREFIXES: Names = (
    ("encoder.stem.conv1.", "swinViT.patch_embed.proj.conv1.conv."),  # the authors' stem
    ("encoder.stem.conv2.", "swinViT.patch_embed.proj.conv2.conv."),
    ("encoder.stem.norm1.", "swinViT.patch_embed.proj.norm1."),
    ("encoder.stem.norm2.", "swinViT.patch_embed.proj.norm2."),
    ("encoder.stem.proj.", "swinViT.patch_embed.proj."),
    ("encoder.stages.0.conv.", "swinViT.layers1c.0.layer."),
    ("encoder.stages.1.conv.", "swinViT.layers2c.0.layer."),
    ("encoder.stages.2.conv.", "swinViT.layers3c.0.layer."),
    ("encoder.stages.3.conv.", "swinViT.layers4c.0.layer."),
    ("encoder.stages.0.blocks.", "swinViT.layers1.0.blocks."),
    ("encoder.stages.1.blocks.", "swinViT.layers2.0.blocks."),
    ("encoder.stages.2.blocks.", "swinViT.layers3.0.blocks."),
    ("encoder.stages.3.blocks.", "swinViT.layers4.0.blocks."),
    ("encoder.stages.0.merge.", "swinViT.layers1.0.downsample."),
    ("encoder.stages.1.merge.", "swinViT.layers2.0.downsample."),
    ("encoder.stages.2.merge.", "swinViT.layers3.0.downsample."),
    ("encoder.stages.3.merge.", "swinViT.layers4.0.downsample."),
    ("image_block.", "encoder1.layer."),
    ("skip_blocks.0.", "encoder2.layer."),
    ("skip_blocks.1.", "encoder3.layer."),
    ("skip_blocks.2.", "encoder4.layer."),
    ("bottleneck.", "encoder10.layer."),
    ("up_blocks.0.", "decoder5."),
    ("up_blocks.1.", "decoder4."),
    ("up_blocks.2.", "decoder3."),
    ("up_blocks.3.", "decoder2."),
    ("image_up.", "decoder1."),
    ("head.", "out.conv.conv."),
)

# What stands in the rest of the name: ours, MONAI's. Every row that fits counts.
REST: Names = (
    ("bias_table", "relative_position_bias_table"),
    ("fc1.", "linear1."),
    ("fc2.", "linear2."),
    ("conv1.", "conv1.conv."),
    ("conv2.", "conv2.conv."),
    ("shortcut.", "conv3.conv."),
    ("up.", "transp_conv.conv."),
    ("block.", "conv_block."),
)

POSITION_INDEX = "attn.relative_position_index"


# --- kinds of file


class Layout(NamedTuple):
    """One kind of file."""

    what: str  # in words
    options: Mapping[str, Any]  # of the network, that the weights were trained with
    depths: tuple[int, ...] = ()  # of all files ever released; (): any
    plan: Mapping[str, Any] = {}  # the data options that the weights were trained with
    warning: str = ""


SLICED = {"clipped_bias": "sliced"}  # MONAI and the authors, in all versions
LEGACY = {**SLICED, "merge_order": "legacy"}
DATA = {"crop": [96, 96, 96], "spacing": [], "ct_window": [-1000.0, 1000.0]}
SCRAMBLED = (
    "the authors' network ran with its axes scrambled (docs/paper-vs-code.md); on straight axes "
    "these weights do not reconstruct, and how well they transfer is for a comparison with "
    "--from-scratch to say"
)
TWOS = (2, 2, 2, 2)
LAYOUTS = {
    "ours": Layout("a Swin UNETR of this package, without a plan", {}),
    "monai": Layout("MONAI's SwinUNETR", SLICED),
    "swinvit": Layout(
        "the encoder of Swin UNETR pre-training (model_swinvit.pt)", LEGACY, TWOS, DATA
    ),
    "ssl": Layout(
        "encoder and decoder pre-trained as in DAE (ssl_pretrained_weights.pth)",
        {**LEGACY, "normalize_hidden": False},
        TWOS,
        {**DATA, "mr_intensity": "nonzero"},
        SCRAMBLED,
    ),
    "official": Layout(
        "the authors' DAE pre-training (ckpt_best.pth)",
        {**LEGACY, "normalize_hidden": False},
        TWOS,
        {**DATA, "mr_intensity": "nonzero"},
        SCRAMBLED,
    ),
    "official-seg": Layout(
        "the authors' DAE fine-tuning", LEGACY, TWOS, {"crop": DATA["crop"]}, SCRAMBLED
    ),
}

# Tensors that no network here has: heads of other tasks, a norm that is never used, and the 1x1x1
# convolutions that MONAI 0.8 made in every block and used only where the channels change.
EXTRA = re.compile(
    r"(encoder\.|swinViT\.|swin_vit\.)?(mask_token$|norm\.)"
    r"|convTrans3d\.|rotation_head\.|contrastive_head\.|conv\.\d"
    r"|encoder(2|3|4|10)\.layer\.conv3\."
    r"|.*relative_position_index$"
)

# A tensor of a Swin UNETR, in any spelling.
NETWORK = re.compile(r"(encoder|decoder)\d+\.|out\.|layers\d|patch_embed\.")

# The first kernel of the encoder. Its name tells the layout: group 1 is the prefix of a wrapper
# (DDP, Lightning), group 2 that of the encoder, and group 3 is there if the stem is the authors'.
STEM = re.compile(
    r"(.*?)(swinViT\.|swin_vit\.|encoder\.|)patch_embed\.proj\.(conv1\.conv\.)?weight$"
)
OWN_STEM = re.compile(r"(.*?)encoder\.stem\.(proj|conv1)\.weight$")


# --- to MONAI and back


def from_monai(state_dict: Tensors) -> dict[str, Tensor]:
    """MONAI's `SwinUNETR` state dict -> ours, for a strict load into `SwinUNETR(..., **MONAI)`.

    A network built without the options in `dae.model.MONAI` (and `merge_order="legacy"` for weights
    from before MONAI 1.5) loads the same tensors and computes something else.

    Raises ValueError on a name that MONAI does not have.
    """
    ours = {}
    for name, value in state_dict.items():
        if not name.endswith(POSITION_INDEX):
            ours[our_name(name)] = value
    return ours


def to_monai(state_dict: Tensors, window: Size3 | None = None) -> dict[str, Tensor]:
    """Our state dict of a `SwinUNETR` with patch stem and four stages -> MONAI's.

    window: of the network, where it is not a cube.
    Raises ValueError on another network's tensors.
    """
    if "up_blocks.3.up.weight" not in state_dict or "encoder.stem.proj.weight" not in state_dict:
        raise ValueError("not a Swin UNETR of four stages with a patch stem; MONAI has no other")

    theirs: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        monai = translate(name, PREFIXES, REST)
        theirs[monai] = value
        if monai.endswith("relative_position_bias_table"):
            size = window or cube(len(value))
            theirs[monai.replace("_bias_table", "_index")] = relative_position_index(size, size)
    return theirs


def our_name(monai: str) -> str:
    return translate(monai, backwards(PREFIXES), backwards(REST))


def translate(name: str, prefixes: Names, rest: Names) -> str:
    """The name of a tensor in another layout. Raises ValueError where no prefix fits."""
    for prefix, new_prefix in prefixes:
        if name.startswith(prefix):
            ending = name.removeprefix(prefix)
            for old, new in rest:
                ending = ending.replace(old, new)
            return new_prefix + ending
    raise ValueError(f"{name}: not a tensor of a Swin UNETR with patch stem and four stages")


def backwards(pairs: Names) -> Names:
    return tuple((b, a) for a, b in pairs)


def reorder(state_dict: Tensors, old: MergeOrder, new: MergeOrder) -> dict[str, Tensor]:
    """The same network, for patch merging that reads the octants in another order.

    Takes our names, and goes both ways between `all` and `monai`. Raises ValueError for `legacy`.
    """
    if old != new and "legacy" in (old, new):
        raise ValueError(
            f"merge order {old} cannot be written as {new}: "
            "legacy reads two octants twice, two never"
        )
    columns = [MERGE_ORDER[old].index(octant) for octant in MERGE_ORDER[new]]

    reordered = {}
    for name, value in state_dict.items():
        # The norm and the reduction of patch merging: their last axis is (octants c).
        if re.match(r"encoder\.stages\.\d\.merge\.", name):
            value = rearrange(value, "... (octants c) -> ... octants c", octants=8)
            value = value[..., columns, :]
            value = rearrange(value, "... octants c -> ... (octants c)")
        reordered[name] = value
    return reordered


# --- which layout a file has


class Recognised(NamedTuple):
    """A file's tensors, sorted."""

    layout: str
    tensors: dict[str, Tensor]  # by our names
    extra: list[str]  # known, and of no use here
    unknown: list[str]
    window: Size3


def recognise(state_dict: Tensors) -> Recognised:
    """The layout of a file, and its tensors by our names.

    Raises ValueError where there is no Swin encoder.
    """
    own_stem = first_match(OWN_STEM, state_dict)
    if own_stem:
        tensors, extra = unwrap(state_dict, own_stem[1])
        return Recognised("ours", tensors, extra, [], window_of(tensors, None))

    stem = first_match(STEM, state_dict)
    if stem is None:
        raise ValueError(
            f"no layout of a Swin UNETR has tensors of such names as {next(iter(state_dict))}"
        )
    wrapper, encoder, authors = stem.groups()
    tensors, outside = unwrap(state_dict, wrapper)

    ours: dict[str, Tensor] = {}
    extra = list(outside)
    unknown = []
    index = None
    for name, value in tensors.items():
        if index is None and name.endswith(POSITION_INDEX):
            index = value
        if EXTRA.match(name):
            extra.append(name)
            continue
        if name in outside:
            continue  # the same name inside and outside the wrapper: neither is of the network
        try:
            ours[our_name(monai_name(name, encoder))] = value
        except ValueError:
            unknown.append(name)

    layout = layout_of(encoder, authors_stem=bool(authors))
    return Recognised(layout, ours, extra, unknown, window_of(ours, index))


def layout_of(encoder: str, *, authors_stem: bool) -> str:
    """The layout, from the prefix of the encoder's tensors and from the kind of its stem."""
    if encoder == "":
        return "swinvit"
    if encoder == "encoder.":
        return "official" if authors_stem else "ssl"
    return "official-seg" if authors_stem else "monai"


def first_match(pattern: re.Pattern[str], names: Iterable[str]) -> re.Match[str] | None:
    for name in names:
        match = pattern.match(name)
        if match:
            return match
    return None


def unwrap(state_dict: Tensors, wrapper: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the prefix of a wrapper (DDP, Lightning), and the names of all others.

    Raises ValueError on a doubled prefix, and on a part of the network without the prefix.
    """
    levels = wrapper.split(".")
    doubled = any(a == b for a, b in pairwise(levels))
    if doubled or not {"swinViT", "swin_vit", "encoder"}.isdisjoint(levels):
        raise ValueError(
            f"names begin with {wrapper!r}, a prefix that stands there twice; take one away"
        )

    inside = {}
    outside = []
    for name, value in state_dict.items():
        if name.startswith(wrapper):
            inside[name.removeprefix(wrapper)] = value
        else:
            outside.append(name)

    for name in outside:
        if NETWORK.match(name):
            raise ValueError(f"{name} stands outside the prefix {wrapper!r} that other names have")
    return inside, outside


def monai_name(name: str, encoder: str) -> str:
    """MONAI's name of a tensor, in a layout where `encoder` is the prefix of the encoder's."""
    if not re.match(rf"{re.escape(encoder)}(patch_embed\.|layers\dc?\.)", name):
        return name  # the decoder's names are the same in all layouts

    name = "swinViT." + name.removeprefix(encoder)
    name = re.sub(r"(layers\d)\.0\.0\.", r"\1.0.", name)
    return re.sub(r"\.fc([12])\.", r".linear\1.", name)


# --- what the tensors tell of their network


def reads_twice(state_dict: Tensors) -> bool:
    """Whether the weights show that patch merging read two octants twice, as `legacy` does.

    Columns that read the same voxels get almost the same gradient, so training makes them alike.
    Legacy merging has two such pairs among the 28 pairs of octants. By chance these two are the
    most alike in both of the deepest stages once in 378 squared. Weights that were hardly trained
    show nothing, and those that were tuned on in another order still show the first one. Takes our
    names.
    """
    merges = sorted(name for name in state_dict if name.endswith("merge.reduction.weight"))
    if not merges:
        return False
    return all(twins_are_alike(state_dict[name]) for name in merges[-2:])


def twins_are_alike(reduction: Tensor) -> bool:
    """Whether the two pairs of octants that legacy merging reads twice are the most similar.

    reduction: the kernel (mixed, octants c) of patch merging.
    """
    if reduction.ndim != 2 or reduction.shape[1] % 8:
        return False  # not such a kernel; check_complete in foreign.py refuses the file by its name

    columns = rearrange(reduction.double(), "mixed (octants c) -> octants (mixed c)", octants=8)
    first, second = torch.triu_indices(8, 8, 1)
    similarity = torch.corrcoef(columns)[first, second]

    twins = ((first == 2) & (second == 5)) | ((first == 3) & (second == 6))
    return bool(similarity[twins].min() > similarity[~twins].max())


def options_of(recognised: Recognised) -> dict[str, Any]:
    """Constructor arguments, from shapes and names. Raises ValueError where a part is missing."""
    tensors = recognised.tensors
    patch = tensors.get("encoder.stem.proj.weight")
    stem = tensors.get("encoder.stem.conv1.weight") if patch is None else patch
    depths = depths_of(tensors)
    heads = heads_of(tensors, stages=len(depths))
    if stem is None or stem.ndim != 5 or not depths or heads is None:
        raise ValueError(
            "its stem, or the position bias of a stage's first block, "
            "is missing or has another shape"
        )

    wanted = LAYOUTS[recognised.layout].depths
    if not wanted:
        # Any depths are possible, but all networks other than ours have four stages.
        wanted = depths if recognised.layout == "ours" or len(depths) == 4 else TWOS
    if depths != wanted:
        raise ValueError(
            f"has stages of {depths} blocks, and such files have {wanted}: a part of it is missing"
        )

    return {
        "feature_size": stem.shape[0],
        "depths": depths,
        "window": recognised.window,
        "heads": heads,
        "stem": "conv" if patch is None else "patch",
        "stage_conv": any(name.startswith("encoder.stages.0.conv.") for name in tensors),
    }


def depths_of(tensors: Tensors) -> tuple[int, ...]:
    """The number of blocks of each stage that have a tensor, up to the last such stage."""
    blocks = set()
    for name in tensors:
        match = re.match(r"encoder\.stages\.(\d)\.blocks\.(\d+)\.", name)
        if match:
            blocks.add((int(match[1]), int(match[2])))

    stages = 1 + max((stage for stage, _ in blocks), default=-1)
    depths = [0] * stages
    for stage, _ in blocks:
        depths[stage] += 1
    return tuple(depths)


def heads_of(tensors: Tensors, stages: int) -> tuple[int, ...] | None:
    """Attention heads of each stage, from its first bias table (rows, heads); None without one."""
    heads = []
    for n in range(stages):
        table = tensors.get(f"encoder.stages.{n}.blocks.0.attn.bias_table")
        if table is None or table.ndim != 2:
            return None
        heads.append(table.shape[1])
    return tuple(heads)


# --- the window, from the rows of a bias table


def window_of(tensors: Tensors, index: Tensor | None) -> Size3:
    """The window whose relative positions are as many as the bias tables have rows.

    Several windows may have the same number. `index`, MONAI's position index, tells which it is.
    Without an index the window is a cube. Takes our names. Raises ValueError.
    """
    rows = bias_rows(tensors)
    if index is None and rows:
        return cube(rows)

    for window in windows_with(rows):
        if index is None or is_index_of(index, window):
            return window
    raise ValueError(f"a bias table of {rows} rows and its position index are of no window")


def bias_rows(tensors: Tensors) -> int:
    """Rows of the first bias table; 0 where there is none."""
    for name, value in tensors.items():
        if name.endswith("bias_table") and value.ndim:
            return len(value)
    return 0


def windows_with(rows: int) -> list[Size3]:
    """Every window (d, h, w) with (2d - 1)(2h - 1)(2w - 1) = rows."""
    odd = [n for n in range(1, rows + 1, 2) if rows % n == 0]  # 2d - 1, 2h - 1 or 2w - 1
    windows = []
    for a in odd:
        for b in odd:
            if rows % (a * b) == 0:
                c = rows // (a * b)
                windows.append(((a + 1) // 2, (b + 1) // 2, (c + 1) // 2))
    return windows


def is_index_of(index: Tensor, window: Size3) -> bool:
    if prod(window) != len(index):
        return False
    return torch.equal(relative_position_index(window, window), index)


def cube(rows: int) -> Size3:
    """The cubic window with (2w - 1)^3 = rows. Raises ValueError where there is none."""
    w = (round(rows ** (1 / 3)) + 1) // 2
    if (2 * w - 1) ** 3 != rows:
        raise ValueError(
            f"a bias table of {rows} rows is not of a cubic window, and nothing says which it is of"
        )
    return w, w, w
