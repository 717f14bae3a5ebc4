"""Two processes (gloo, CPU) against one with twice the batch: losses, gradients, contrast, stop."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import NETWORK, command, events, interrupt, same_weights, torchrun, train
from processes import run_ranks
from test_pretrain import Config, weights
from torch.nn.parallel import DistributedDataParallel

from dae.config.pretrain import PretextConfig
from dae.model import SwinUNETR
from dae.model.probe import Probe
from dae.pretext.baselines import BASELINES, pretext_of
from dae.pretext.contrast import cmcl, gather
from dae.pretext.methods import Pretext
from dae.training.distributed import Stopped, all_or_none
from dae.weights import checkpoint
from train_pretrain import main

BASELINES_TRAINED = [name for name in BASELINES if name != "scratch"]
MODALITY = torch.tensor([0, 1, 0, 2])
SEEDS = [5, 6, 7, 8]


def gradients(
    wrap: Callable[[Any], torch.nn.Module], part: slice, method: Any = "dae"
) -> dict[str, torch.Tensor]:
    """One backward pass on a part of one batch of four, alpha 1 so that the contrast counts."""
    torch.manual_seed(0)
    options = PretextConfig(method=method, alpha=1.0, mask_block=4)
    pretext = pretext_of(SwinUNETR(1, 1, **NETWORK), options)
    x = torch.randn(4, 1, 16, 16, 16)
    net = wrap(pretext)
    net(x[part], MODALITY[part], pretext.draw(x[part], SEEDS[part])).loss.backward()
    return {name: p.grad for name, p in pretext.named_parameters() if p.grad is not None}


def trained(part: slice) -> dict[str, torch.Tensor]:
    """The weights after three steps of AdamW under DDP."""
    torch.manual_seed(0)
    pretext = Pretext(SwinUNETR(1, 1, **NETWORK), "dae", PretextConfig())
    net = DistributedDataParallel(pretext)
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=1e-2)
    for step in range(3):
        x = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(step))
        net(x[part], MODALITY[part], pretext.draw(x[part], SEEDS[part])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(pretext.state_dict())


def gradients_of_probe(
    wrap: Callable[[Any], torch.nn.Module], part: slice
) -> dict[str, torch.Tensor]:
    """One backward pass of a linear probe on a part of one batch of four, and its sums."""
    torch.manual_seed(0)
    probe = Probe(SwinUNETR(1, 1, **NETWORK), 1, 3)
    x = torch.randn(4, 1, 16, 16, 16)
    net = wrap(probe)
    net(x[part]).square().mean().backward()
    found = {name: p.grad for name, p in probe.named_parameters() if p.grad is not None}
    return found | {name: y for name, y in probe.named_buffers() if name.endswith("sums")}


def gives_up(where: str, rank: int) -> bool:
    """Whether this rank goes without the result where work is given up on one."""
    try:
        with all_or_none():
            if where == f"on rank {rank}":
                raise Stopped
    except Stopped:
        return True
    return False


def as_a_rank(out: Path) -> None:
    """What each of two processes does when this file is run under torchrun."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    z = torch.nn.functional.normalize(
        torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    mine = z[2 * rank : 2 * rank + 2].clone().requires_grad_()
    everyone, modality = gather(mine, MODALITY[2 * rank : 2 * rank + 2])
    cmcl(everyone, modality).backward()
    facts = {
        "gradients": {
            n: gradients(DistributedDataParallel, slice(n * rank, n * rank + n)) for n in (1, 2)
        },
        "baselines": {
            method: gradients(DistributedDataParallel, slice(2 * rank, 2 * rank + 2), method)
            for method in BASELINES_TRAINED
        },
        "probe": gradients_of_probe(DistributedDataParallel, slice(2 * rank, 2 * rank + 2)),
        "z": everyone.detach(),
        "modality": modality,
        "z_gradient": mine.grad,
    }
    facts["weights"] = trained(slice(2 * rank, 2 * rank + 2))
    facts["stopped"] = [gives_up(where, rank) for where in ("nowhere", "on rank 0", "on rank 1")]
    torch.save(facts, out / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    done = run_ranks((__file__, out), (__file__, out))
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", BASELINES_TRAINED)
def test_gradients_of_a_baseline_on_two_ranks_are_those_of_one_process(
    ranks: list[dict[str, Any]], method: str
) -> None:
    """NT-Xent compares the samples of both ranks, and its gradient is whole."""
    alone = gradients(lambda pretext: pretext, slice(4), method)
    first, second = (rank["baselines"][method] for rank in ranks)
    assert alone.keys() == first.keys() == second.keys()
    for name, gradient in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(
            first[name], gradient, atol=1e-6 + 1e-3 * float(gradient.abs().max())
        ), name


@pytest.mark.parametrize("samples", [1, 2])
def test_gradients_of_two_ranks_are_identical_and_equal_those_of_one_process(
    ranks: list[dict[str, Any]], samples: int
) -> None:
    alone = gradients(lambda pretext: pretext, slice(2 * samples))
    first, second = (rank["gradients"][samples] for rank in ranks)
    assert same_weights(first, second)
    for name, gradient in alone.items():
        assert torch.allclose(first[name], gradient, atol=1e-6, rtol=1e-5), name


def test_a_probe_standardises_over_both_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = gradients_of_probe(lambda probe: probe, slice(4))
    first, second = (rank["probe"] for rank in ranks)
    assert same_weights(first, second)
    for name, value in alone.items():
        assert torch.allclose(first[name], value, atol=1e-5, rtol=1e-4), name


def test_weights_of_two_ranks_stay_identical(ranks: list[dict[str, Any]]) -> None:
    assert same_weights(ranks[0]["weights"], ranks[1]["weights"])


def test_what_one_rank_gives_up_all_ranks_give_up(ranks: list[dict[str, Any]]) -> None:
    """Also the rank whose own part is done by then."""
    assert [rank["stopped"] for rank in ranks] == [[False, True, True]] * 2


def test_the_contrast_sees_all_ranks_and_its_gradient_is_whole(ranks: list[dict[str, Any]]) -> None:
    """A gather without gradient has the right loss and half the gradient.

    DDP takes the mean over the ranks, so the gradient of each of two ranks is twice as large.
    """
    z = ranks[0]["z"].clone().requires_grad_()
    cmcl(z, MODALITY).backward()
    assert z.grad is not None
    for rank, facts in enumerate(ranks):
        assert torch.equal(facts["modality"], MODALITY)
        assert torch.allclose(facts["z_gradient"] / 2, z.grad[2 * rank : 2 * rank + 2], atol=1e-7)


@pytest.mark.parametrize(
    "amp, samples, alpha, lr, tolerance",
    [
        ("off", 1, 1.0, 1e-3, 1e-5),
        ("off", 2, 1.0, 1e-3, 1e-5),
        ("bf16", 2, 0.05, 4e-4, 1e-3),
    ],
)
def test_two_ranks_train_as_one_process_with_twice_the_batch(
    tiny: Config, tmp_path: Path, amp: str, samples: int, alpha: float, lr: float, tolerance: float
) -> None:
    one = tiny(
        out=str(tmp_path / "one"), steps=20, batch_size=2 * samples, alpha=alpha, lr=lr, amp=amp
    )
    two = tiny(out=str(tmp_path / "two"), steps=20, batch_size=samples, alpha=alpha, lr=lr, amp=amp)
    main(one)
    done = train(two, ranks=2)
    assert done.returncode == 0, done.stderr
    for kind in ("train", "validation"):
        for a, b in zip(events(one, kind), events(two, kind), strict=True):
            # In bf16 the contrast alone drifts by .002; the loss has a twentieth of it.
            for key in ("loss", "l1", "l1_raw", "l1_input", *(["cmcl"] if amp == "off" else [])):
                assert a.get(key) == pytest.approx(b.get(key), abs=tolerance), (
                    kind,
                    a["step"],
                    key,
                )


@pytest.mark.parametrize(
    "method",
    [
        "swin_unetr",  # its loss has the contrast and the rotation of the others in it
        pytest.param("contrastive", marks=pytest.mark.slow),
        pytest.param("rotation", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_a_baseline_as_one_process_with_twice_the_batch(
    tiny: Config, tmp_path: Path, method: str
) -> None:
    """Down to the accuracies, the rank of the features and the validation."""
    one = tiny(
        method=method, out=str(tmp_path / "one"), steps=8, batch_size=4, lr=1e-3, mask_block=4
    )
    two = replace(one, out=str(tmp_path / "two"), batch_size=2)
    main(replace(one, log_every=4))
    done = train(replace(two, log_every=4), ranks=2)
    assert done.returncode == 0, done.stderr
    clock = {"samples_per_s", "data_wait", "seconds", "event", "chance"}
    for kind in ("train", "validation"):
        for a, b in zip(events(one, kind), events(two, kind), strict=True):
            assert a["chance"] == b["chance"]
            for key in a.keys() - clock:
                assert a[key] == pytest.approx(b[key], abs=2e-4, rel=1e-3), (kind, a["step"], key)


def test_ranks_that_find_different_checkpoints_refuse_to_go_on(
    tiny: Config, tmp_path: Path
) -> None:
    """As on two nodes without a shared file system."""
    config = tiny(out=str(tmp_path / "rank0"), steps=8, stop_after=3)
    assert train(config, ranks=2).returncode == 0

    resumed = replace(config, stop_after=0, resume=True)
    elsewhere = replace(resumed, out=str(tmp_path / "rank1"))
    done = run_ranks(command(resumed), command(elsewhere))
    assert done.returncode != 0 and "the ranks find it at steps [3, 0]" in done.stderr


def test_sigterm_to_torchrun_ends_in_a_checkpoint_from_which_the_run_goes_on(
    tiny: Config, tmp_path: Path
) -> None:
    """torchrun has an exit code of its own. The ranks agree on a step, and it is saved."""
    straight = tiny(out=str(tmp_path / "straight"), steps=60, stop_after=40, workers=1)
    broken = tiny(out=str(tmp_path / "broken"), steps=60, stop_after=40, workers=1, resume=True)
    assert train(straight, ranks=2).returncode == 0
    process = torchrun(*command(broken), stderr=subprocess.DEVNULL)
    code = interrupt(broken, signal.SIGTERM, after_step=5, process=process)
    assert code in (0, 1, -signal.SIGTERM)
    assert 5 <= checkpoint.load(Path(broken.out) / "last.pt")["step"] < 40
    assert events(broken, "end")[-1]["reason"] == "stopped"
    assert train(broken, ranks=2).returncode == 0
    assert same_weights(weights(broken.out), weights(straight.out))


if __name__ == "__main__":
    as_a_rank(Path(sys.argv[1]))
