"""Anatomies as data: a torso and a head as tables of ellipsoids, and each tissue in CT and MR.

Shapes are in a cube of [-1, 1] per axis, whatever its size in voxels. The axes are those of a NIfTI
file in RAS order: axis 0 points to the patient's right, axis 1 to the front, axis 2 to the head.
Hardly a structure is thinner than a tenth of a unit, five voxels of 96: a fourfold reduction erases
thinner ones, and no model could be asked for them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = tuple[float, float, float]
Tissues = dict[str, tuple[float, ...]]

INF = float("inf")
SIDES = (-1, 1)  # left, right


class Shape(NamedTuple):
    """Where |x/a|^power + |y/b|^power + |z/c|^power < 1.

    One infinite radius makes a cylinder, two make a slab.
    """

    tissue: str
    centre: Vector
    radii: Vector
    power: float = 2.0  # 2 is an ellipsoid, 4 nearly a box
    slope: float = 0.0  # how far it sinks per unit towards the front
    over: str | None = None  # the one tissue it may cover; None is any
    depth: float = 0.0  # how far below the surface of that tissue it begins


def both_sides(shape: Shape) -> list[Shape]:
    """The mirror image of a shape on the patient's right, then the shape."""
    x, y, z = shape.centre
    return [shape._replace(centre=(x * side, y, z)) for side in SIDES]


def one_above_another(shape: Shape, heights: NDArray[np.float64]) -> list[Shape]:
    """The shape at each of these heights."""
    x, y, _ = shape.centre
    return [shape._replace(centre=(x, y, z)) for z in heights]


# The tables below are to be read by columns.
# fmt: off

# --- the torso ------------------------------------------------------------------------------------

CT_LABELS = {
    0: "background",
    1: "spleen", 2: "right kidney", 3: "left kidney", 4: "liver", 5: "stomach", 6: "aorta",
    7: "inferior vena cava",
}

CT_TISSUES: Tissues = {
    # label, HU; vessels and kidneys are full of contrast agent, some bowel of a barium meal
    "air": (0, -1000),
    "table": (0, -350),
    "fat": (0, -110),
    "muscle": (0, 60),
    "rib": (0, 800),
    "bone": (0, 500),
    "disc": (0, 90),
    "cord": (0, 30),
    "cavity": (0, -90),
    "lung": (0, -820),
    "heart": (0, 200),
    "bowel": (0, 40),
    "gas": (0, -950),
    "meal": (0, 350),
    "bladder": (0, 5),
    "pancreas": (0, 100),
    "renal fat": (0, -80),
    "spleen": (1, 140),
    "right kidney": (2, 240),
    "left kidney": (3, 240),
    "liver": (4, 110),
    "stomach": (5, 25),
    "stomach gas": (5, -950),
    "aorta": (6, 300),
    "inferior vena cava": (7, 180),
}

TABLE = [Shape("table", (0, -0.80, 0), (0.80, 0.10, INF), power=8)]

RIB = Shape("rib", (0, 0, 0), (INF, INF, 0.065), slope=0.7, over="muscle")
VERTEBRA = Shape("bone", (0, -0.25, 0), (0.17, 0.16, 0.10), power=4)

TORSO = [
    Shape("fat", (0, 0.08, 0), (0.92, 0.76, INF), power=2.5),
    Shape("muscle", (0, 0.08, 0), (0.80, 0.64, INF), power=2.5),
    *one_above_another(RIB, np.arange(-0.15, 1.6, 0.27)),
    Shape("cavity", (0, 0.08, 0), (0.68, 0.52, INF), power=2.5),
    *both_sides(Shape("bone", (0.46, -0.05, -0.95), (0.12, 0.42, 0.42))),
    Shape("bone", (0, -0.46, 0), (0.14, 0.13, INF)),
    Shape("disc", (0, -0.25, 0), (0.15, 0.14, INF)),
    *one_above_another(VERTEBRA, np.arange(-0.96, 1.1, 0.32)),
    Shape("cord", (0, -0.44, 0), (0.06, 0.06, INF)),
]

ORGANS = [
    *both_sides(Shape("lung", (0.37, 0.06, 0.95), (0.32, 0.52, 0.62), power=2.5)),
    Shape("heart", (-0.10, 0.25, 0.86), (0.30, 0.26, 0.28)),
    *both_sides(Shape("muscle", (0.27, -0.26, -0.65), (0.11, 0.12, 0.60))),
    Shape("bladder", (0, 0.12, -0.98), (0.24, 0.24, 0.24)),
    Shape("spleen", (-0.53, -0.14, 0.30), (0.15, 0.24, 0.25)),
    Shape("liver", (0.36, 0.08, 0.30), (0.35, 0.42, 0.36)),
    Shape("liver", (0.02, 0.32, 0.30), (0.36, 0.22, 0.20)),
    Shape("stomach", (-0.33, 0.22, 0.34), (0.22, 0.26, 0.24)),
    Shape("stomach", (-0.15, 0.30, 0.10), (0.26, 0.17, 0.13)),
    Shape("stomach gas", (-0.33, 0.45, 0.34), (0.26, 0.17, 0.24), over="stomach"),
    Shape("pancreas", (-0.08, 0.06, 0.04), (0.30, 0.09, 0.09)),
    Shape("right kidney", (0.37, -0.18, -0.16), (0.15, 0.15, 0.26)),
    Shape("left kidney", (-0.38, -0.18, -0.06), (0.15, 0.15, 0.26)),
    *both_sides(Shape("renal fat", (0.30, -0.13, -0.12), (0.08, 0.08, 0.11))),
    Shape("inferior vena cava", (0.12, -0.04, 0), (0.085, 0.075, INF)),
    Shape("aorta", (-0.07, -0.03, 0), (0.085, 0.085, INF)),
]

# --- the head -------------------------------------------------------------------------------------

MR_LABELS = {
    0: "background",
    1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter", 4: "ventricles",
    5: "deep grey", 6: "lesion", 7: "oedema",
}

MR_SCALE = {"t1": 800.0, "t1ce": 1000.0, "t2": 650.0, "flair": 450.0}  # of 1 in the table below

MR_TISSUES: Tissues = {
    # label, then t1, t1ce, t2, flair
    "air": (0, 0, 0, 0, 0),
    "fat": (0, 0.95, 0.95, 0.75, 0.75),
    "muscle": (0, 0.40, 0.42, 0.28, 0.35),
    "bone": (0, 0.06, 0.06, 0.06, 0.06),
    "eye": (0, 0.22, 0.22, 0.95, 0.20),
    "fluid": (1, 0.20, 0.20, 1.00, 0.14),
    "grey": (2, 0.50, 0.50, 0.62, 0.66),
    "white": (3, 0.78, 0.78, 0.42, 0.46),
    "ventricle": (4, 0.18, 0.18, 1.00, 0.12),
    "deep grey": (5, 0.60, 0.60, 0.52, 0.58),
    "oedema": (7, 0.55, 0.55, 0.82, 0.95),
    "rim": (6, 0.45, 1.00, 0.70, 0.82),
    "core": (6, 0.26, 0.28, 0.92, 0.45),
}

HEAD = [
    Shape("fat", (0, -0.25, -0.90), (0.60, 0.60, 0.70)),  # neck, nose, scalp
    Shape("fat", (0, 0.90, -0.44), (0.15, 0.14, 0.24)),
    Shape("fat", (0, -0.04, -0.02), (0.87, 0.94, 0.98)),
    Shape("muscle", (0, 0.08, -0.65), (0.56, 0.66, 0.38)),
    Shape("muscle", (0, -0.25, -0.90), (0.48, 0.48, 0.58)),
    Shape("bone", (0, -0.06, 0.10), (0.76, 0.82, 0.75)),
    Shape("bone", (0, 0.48, -0.60), (0.14, 0.30, 0.20)),  # nose and throat: air is as dark as bone
    Shape("bone", (0, 0.20, -0.80), (0.09, 0.09, 0.34)),
    *both_sides(Shape("eye", (0.32, 0.60, -0.30), (0.16, 0.16, 0.16))),
    Shape("fluid", (0, -0.06, 0.10), (0.65, 0.71, 0.64)),
]

CORTEX = [
    *both_sides(Shape("grey", (0.32, 0.10, -0.16), (0.22, 0.40, 0.24))),
    Shape("grey", (0, -0.06, 0.11), (0.57, 0.63, 0.55)),
]

BRAIN = [
    Shape("fluid", (0, -0.06, 0.30), (0.055, 0.80, 0.60)),  # parts the halves, above the next row
    Shape("grey", (0, -0.06, 0.04), (0.36, 0.36, 0.26)),
    Shape("white", (0, 0, 0), (INF, INF, INF), over="grey", depth=0.105),
    Shape("grey", (0, -0.38, -0.30), (0.42, 0.28, 0.22)),  # cerebellum and brain stem
    Shape("white", (0, -0.36, -0.30), (0.28, 0.15, 0.10)),
    Shape("white", (0, -0.10, -0.50), (0.13, 0.13, 0.55)),
]

NUCLEI = [
    *both_sides(Shape("deep grey", (0.22, 0, 0), (0.11, 0.20, 0.12))),
    *both_sides(Shape("ventricle", (0.10, -0.02, 0.15), (0.075, 0.28, 0.10))),
]
# fmt: on
