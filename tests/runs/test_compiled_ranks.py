"""--compile on two ranks (gloo, CPU): the gradients of the eager ranks, sent bucket by bucket."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch.nn.parallel import DistributedDataParallel

from dae.config.pretrain import PretextConfig
from dae.model import SwinUNETR
from dae.pretext.baselines import pretext_of

MODALITY = torch.tensor([0, 1, 0, 2])
SEEDS = [5, 6, 7, 8]
METHODS = ("dae", "smit")


def gradients(method: Any, rank: int, *, compiled: bool) -> tuple[torch.Tensor, int]:
    """The gradients of a rank after a backward pass, and the number of graphs of the forward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = SwinUNETR(1, 1, feature_size=24, depths=(1, 1, 1), heads=(2, 2, 2), window=(2, 2, 2))
    pretext = pretext_of(network, PretextConfig(method=method, mask_block=8, alpha=1.0))
    x = torch.randn(4, 1, 32, 32, 32)
    graphs = []

    def as_traced(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    # As in train_pretrain.py: the compiler first, DDP around it. Its buckets of 25 MiB are as small
    # here as those 7 MiB of gradients need.
    net: Any = torch.compile(pretext, backend=as_traced) if compiled else pretext
    net = DistributedDataParallel(net, bucket_cap_mb=1)
    mine = slice(2 * rank, 2 * rank + 2)
    net(x[mine], MODALITY[mine], pretext.draw(x[mine], SEEDS[mine])).loss.backward()
    found = [p.grad.flatten() for p in pretext.parameters() if p.grad is not None]
    return torch.cat(found), len(graphs)


def as_a_rank(out: Path) -> None:
    """What each of two processes does when this file is run."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    facts = {}
    for method in METHODS:
        eager, _ = gradients(method, rank, compiled=False)
        compiled, graphs = gradients(method, rank, compiled=True)
        facts[method] = {"eager": eager, "compiled": compiled, "graphs": graphs}
    torch.save(facts, out / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_ranks_send_the_gradients_of_the_eager_ones_bucket_by_bucket(
    tmp_path: Path,
) -> None:
    """One graph would hand over all gradients at its end, and nothing would hide their sending.

    torch splits it where DDP's buckets are full. Rounding moves a few activations across the kink
    of leaky ReLU: seen, 2e-5 of the whole norm.
    """
    done = run_ranks((__file__, tmp_path), (__file__, tmp_path))
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for method in METHODS:
        first, second = (rank[method] for rank in ranks)
        assert torch.equal(first["compiled"], second["compiled"])
        assert first["graphs"] > 1
        error = (first["compiled"] - first["eager"]).norm() / first["eager"].norm()
        assert error < 1e-3, method


if __name__ == "__main__":
    as_a_rank(Path(sys.argv[1]))
