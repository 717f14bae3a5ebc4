"""Other people's checkpoints in, MONAI's layout out: two tables of names, read in either direction.

The tensors are the same on both sides but for one: MONAI stores with every block the index of its relative position
bias, which is a function of the window and is made again where it is needed.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from dae.model.swin import Size3, offsets

# Where a tensor stands in the network: ours, MONAI's.
PLACES = (
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


def from_monai(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MONAI's `SwinUNETR` state dict -> ours, for a strict `SwinUNETR(..., **MONAI).load_state_dict`.

    A network built without the options in `dae.model.MONAI` (and `merge_order="legacy"` for weights made before
    MONAI 1.5) loads the same tensors and computes something else. Raises ValueError on a name that MONAI has not.
    """
    places, parts = _turned(PLACES), _turned(PARTS)
    return {_rename(key, places, parts): value for key, value in state_dict.items() if not key.endswith(INDEX)}


def to_monai(state_dict: Mapping[str, Tensor], window: Size3 | None = None) -> dict[str, Tensor]:
    """Our state dict of a `SwinUNETR` with patch stem and four stages -> MONAI's: the inverse of `from_monai`.

    window: of the network, where it is not a cube. Raises ValueError on another network's tensors.
    """
    if "up_blocks.3.up.weight" not in state_dict:
        raise ValueError("not a Swin UNETR of four stages; MONAI's has no other number")
    theirs: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _rename(key, PLACES, PARTS)
        theirs[name] = value
        if name.endswith("relative_position_bias_table"):
            size = window or _cube(len(value))
            theirs[name.replace("_bias_table", "_index")] = offsets(size, size).clone()
    return theirs


def _cube(rows: int) -> Size3:
    """The cubic window whose (2 w - 1)^3 offsets have so many rows."""
    w = (round(rows ** (1 / 3)) + 1) // 2
    if (2 * w - 1) ** 3 != rows:
        raise ValueError(f"a bias table of {rows} rows is not of a cubic window; name the window")
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
