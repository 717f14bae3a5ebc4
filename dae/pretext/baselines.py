"""The other rows of Table 4: what DAE is compared with."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dae.model import Backbone
from dae.pretext.methods import METHODS, Drawn, Method, Output, Pretext

AnyPretext = Any  # a Method with `draw` and `forward`, as `Pretext` has them


class Scratch(Method):
    """No pre-training: the row that all others are compared with. There is nothing to run."""

    def draw(self, x: Tensor, seeds: Sequence[int]) -> Drawn:
        raise NotImplementedError("untrained weights are saved as they are drawn")

    def forward(self, x: Tensor, modality: Tensor, drawn: Drawn) -> Output:
        raise NotImplementedError("untrained weights are saved as they are drawn")


BASELINES: dict[str, type[Method]] = {"scratch": Scratch}


def pretext_of(backbone: Backbone, options: Any) -> AnyPretext:
    """The backbone with the method that --method names, of METHODS or of BASELINES.

    Raises ValueError where the options contradict each other.
    """
    if options.method in METHODS:
        return Pretext(backbone, options.method, options)
    return BASELINES[options.method](backbone, options)
