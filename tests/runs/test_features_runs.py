"""train_seg.py --schedule probe, eval.py cka and embed, on tiny phantoms."""

import csv
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETWORK, events, refusal, same_weights

from dae.config.evaluate import CkaConfig, EmbedConfig, PredictConfig, ScoreConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.data import datalist
from dae.demo.phantom import CT_LABELS
from dae.errors import InputError
from dae.model import SwinUNETR
from dae.weights import checkpoint
from dae.weights.layouts import to_monai
from train_pretrain import main as pretrain
from train_seg import main

evaluate = importlib.import_module("eval")
Config = Callable[..., SegConfig]


def weights(config: Any, name: str = "last.pt") -> dict[str, Any]:
    return dict(checkpoint.load(Path(config.out) / name)["model"])


@pytest.fixture
def probe(tiny_seg: Config) -> Config:
    """Configurations of tiny probes; keyword arguments override."""

    def config(**given: Any) -> SegConfig:
        return tiny_seg(**{"schedule": "probe", "lr": 1e-1, "loss": "dice_ce", **given})

    return config


@pytest.fixture
def common(pretrained: Path, tmp_path: Path) -> dict[str, Any]:
    """Flags of cka and embed."""
    return {
        "data": str(pretrained / "phantoms/pretrain.json"),
        "cache_dir": str(pretrained / "cache"),
        "out": str(tmp_path / "features"),
        "device": "cpu",
    }


def data_list(path: Path, items: Sequence[Any]) -> str:
    """A list with these items to validate on, in this order."""
    entries = []
    for item in items:
        image = str(item.image[0].absolute())
        entry = {"image": image, "modality": item.modality_name, "subject": item.subject}
        entries.append(entry)
    other = {"image": "other.nii", "modality": "ct"}
    path.write_text(json.dumps({"training": [other], "validation": entries}))
    return str(path)


# --- the probe


def test_a_probe_trains_its_head_on_the_encoder_that_was_pre_trained(
    probe: Config, pretrained: Path
) -> None:
    config = probe(steps=30, log_every=1)
    main(config)
    before = checkpoint.load(pretrained / "pre/last.pt")["model"]
    after = weights(config)
    encoder = {name: value for name, value in before.items() if name.startswith("encoder.")}
    assert all(torch.equal(after[name], value) for name, value in encoder.items())
    assert {name.split(".")[0] for name in after} == {"encoder", "head"}

    losses = [event["loss"] for event in events(config, "train")]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert all(event["lr_encoder"] == 0 for event in events(config, "train"))
    plan = checkpoint.load(Path(config.out) / "last.pt")["plan"]
    assert plan["probe"] is True and plan["classes"]["4"] == CT_LABELS[4]


def test_a_probe_is_predicted_and_scored_with_as_any_network(
    probe: Config, pretrained: Path, tmp_path: Path
) -> None:
    config = probe()
    main(config)
    data = str(pretrained / "phantoms/ct_seg.json")
    predictions = str(tmp_path / "predictions")
    paths = evaluate.predict(
        PredictConfig(
            checkpoint=(config.out + "/last.pt",), data=data, out=predictions, device="cpu"
        )
    )
    assert paths
    summary = evaluate.score(
        ScoreConfig(predictions=predictions, data=data, out=str(tmp_path / "scores"))
    )
    validated = events(config, "validation")[-1]["dice"]
    assert summary["mean_of_cases"]["dice"]["mean"] == pytest.approx(validated, abs=0.15)


def test_a_probe_that_was_stopped_ends_as_one_that_was_not(probe: Config, tmp_path: Path) -> None:
    whole = probe(out=str(tmp_path / "whole"), steps=5)
    main(whole)
    halves = probe(out=str(tmp_path / "halves"), steps=5, stop_after=2)
    main(halves)
    main(replace(halves, stop_after=0, resume=True))
    assert same_weights(weights(whole), weights(halves))

    reason = refusal(main, replace(halves, resume=True, schedule="warmup"))
    assert "--schedule warmup" in reason and "probe" in reason


def test_random_features_are_the_floor_and_need_no_weights(probe: Config) -> None:
    config = probe(from_scratch=True, pretrained="", **NETWORK)
    main(config)
    assert events(config, "start")[0]["weights"] == "from scratch"


def test_a_probe_has_no_decoder_to_take_or_to_give(
    probe: Config, tiny_seg: Config, tiny: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    assert "--transfer decoder" in refusal(main, probe(transfer="decoder"))
    assert "--transfer both" in refusal(main, probe(set_flags=("transfer",)))
    config = probe(transfer="encoder")
    main(config)

    # What is fine-tuned or pre-trained from a probe takes its encoder.
    last = config.out + "/last.pt"
    reason = refusal(main, tiny_seg(pretrained=last, out=str(tmp_path / "tuned")))
    assert "no decoder; take --transfer encoder" in reason
    flags: dict[str, Any] = {"pretrained": last, "lr": 0.0}
    for name, more in (("tuned", {"transfer": "encoder"}), ("probe", {"schedule": "probe"})):
        tuned = tiny_seg(out=str(tmp_path / name), **flags, **more)
        main(tuned)
        assert encoders_equal(tuned, config)
    again = tiny(init=last, out=str(tmp_path / "again"), lr=0.0)
    pretrain(again)
    assert encoders_equal(again, config)


def encoders_equal(a: Any, b: Any) -> bool:
    weights_a = weights(a)
    return all(
        torch.equal(value, weights_a[name])
        for name, value in weights(b).items()
        if name.startswith("encoder.")
    )


# --- cka


def cka_of(before: str, after: str, common: dict[str, Any], **more: Any) -> list[float]:
    flags = {"crops": 8, **common, **more}
    rows = evaluate.cka(CkaConfig(before=before, after=after, **flags))
    return [row["cka"] for row in rows]


@pytest.mark.parametrize("examples", ["crops", "positions"])
def test_what_did_not_move_is_1_and_other_weights_are_not(
    probe: Config,
    tiny_seg: Config,
    pretrained: Path,
    tmp_path: Path,
    common: dict[str, Any],
    examples: str,
) -> None:
    """A probe has the encoder that it started from."""
    before = str(pretrained / "pre/last.pt")
    common["examples"] = examples
    common["data"] = str(pretrained / "phantoms/ct_seg.json")
    probed = probe(out=str(tmp_path / "probe"), steps=2)
    scratch = tiny_seg(out=str(tmp_path / "scratch"), from_scratch=True, seed=5, steps=2)
    for config in (probed, scratch):
        main(config)
    same = cka_of(before, probed.out + "/last.pt", {**common, "out": str(tmp_path / "same")})
    other = cka_of(before, scratch.out + "/last.pt", common)
    assert same == pytest.approx([1, 1, 1])
    assert max(other) < 0.999 and min(other) > -0.5

    out = Path(common["out"])
    with (out / "cka.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["cka"]) for line in lines] == other
    assert [line["grid"] for line in lines] == ["8 8 8", "4 4 4", "2 2 2"]
    assert f"{other[0]:.3f}" in (out / "cka.md").read_text()
    assert (out / "figures/cka.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_other_programs_and_of_other_networks(
    pretrained: Path, tmp_path: Path, common: dict[str, Any]
) -> None:
    """A file of MONAI's says nothing of crops and spacing. Its five states are Table 7's stages."""
    torch.manual_seed(0)
    network = SwinUNETR(1, 1, feature_size=12, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8))
    foreign = tmp_path / "monai.pt"
    torch.save(to_monai(network.state_dict()), foreign)
    assert cka_of(str(foreign), str(foreign), common, crops=4) == pytest.approx([1, 1, 1, 1, 1])

    ours = str(pretrained / "pre/last.pt")
    reason = refusal(cka_of, ours, str(foreign), common)
    assert "compare two files of one network" in reason
    assert "--before" in refusal(cka_of, "", ours, common)
    assert "--after" in refusal(cka_of, ours, "", common)


def test_what_a_network_was_trained_on_is_refused_by_both(
    probe: Config, pretrained: Path, common: dict[str, Any]
) -> None:
    config = probe()
    main(config)
    last = config.out + "/last.pt"
    common |= {"data": str(pretrained / "phantoms/ct_seg.json"), "split": "training"}
    reason = refusal(cka_of, last, last, common)
    assert "trained on case" in reason and "--allow-trained" in reason
    assert "trained on case" in refusal(evaluate.embed, EmbedConfig(checkpoint=last, **common))
    assert not Path(common["out"]).exists()
    assert cka_of(last, last, common, crops=4, allow_trained=True) == pytest.approx([1, 1, 1])


# --- embed


def vectors_in(folder: str) -> dict[str, Any]:
    with np.load(Path(folder) / "features.npz") as file:
        return dict(file)


def test_each_volume_has_a_vector_whatever_the_list(
    pretrained: Path, tmp_path: Path, common: dict[str, Any]
) -> None:
    common |= {"data_root": "/"}  # the lists are elsewhere
    last = str(pretrained / "pre/last.pt")
    items = datalist.load(common["data"])
    some = [*items.training, *items.validation][:4]

    evaluate.embed(
        EmbedConfig(
            checkpoint=last, **common | {"data": data_list(tmp_path / "all.json", some), "crops": 2}
        )
    )
    first = vectors_in(common["out"])
    assert first["features"].shape == (4, 32) and first["features"].dtype == np.float64
    assert list(first["modality"]) == [item.modality_name for item in some]
    assert list(first["subject"]) == [item.subject for item in some]
    assert len(set(first["case"])) == 4

    out = str(tmp_path / "turned")
    evaluate.embed(
        EmbedConfig(
            checkpoint=last,
            **common
            | {"data": data_list(tmp_path / "some.json", some[:1:-1]), "crops": 2, "out": out},
        )
    )
    second = vectors_in(out)
    np.testing.assert_array_equal(second["features"], first["features"][:1:-1])
    assert list(second["case"]) == list(first["case"][:1:-1])


def test_weights_that_have_seen_other_intensities_are_named_by_both(
    common: dict[str, Any], pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = pretrained / "pre/last.pt"
    scaled = tmp_path / "scaled.pt"
    saved = checkpoint.load(plain)
    saved["plan"]["recon"] = "scaled"
    checkpoint.save(scaled, saved)
    told = f"{scaled}: warning: the weights were pre-trained with --recon scaled, on crops at mean"

    flags = {**common, "crops": 4}
    evaluate.cka(CkaConfig(before=str(scaled), after=str(plain), **flags))
    assert capsys.readouterr().out.count(told) == 1
    evaluate.embed(EmbedConfig(checkpoint=str(scaled), **flags))
    assert capsys.readouterr().out.count(told) == 1
    evaluate.embed(EmbedConfig(checkpoint=str(plain), **flags | {"out": str(tmp_path / "b")}))
    assert "warning" not in capsys.readouterr().out


def test_the_same_command_again_writes_the_same_files_and_no_others(
    pretrained: Path, common: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = EmbedConfig(checkpoint=str(pretrained / "pre/last.pt"), crops=1, **common)
    contents = []
    for _ in range(2):
        summary = evaluate.embed(config)
        out = Path(common["out"])
        names = ("features.npz", "embedding.json", "figures/embedding.png")
        contents.append([(out / name).read_bytes() for name in names])
    assert contents[0] == contents[1]
    assert json.loads((out / "embedding.json").read_text())["effective_rank"] == pytest.approx(
        summary["effective_rank"]
    )
    assert "effective rank" in capsys.readouterr().out

    (out / "features.npz").write_bytes(b"mine")
    with pytest.raises(InputError, match="was changed since it was written"):
        evaluate.embed(config)


def test_pre_training_holds_out_its_own_share_of_a_list_that_says_nothing(
    pretrained: Path, tmp_path: Path, common: dict[str, Any]
) -> None:
    content = json.loads(Path(common["data"]).read_text())
    folder = Path(common["data"]).parent
    training = content["training"] + content.get("validation", [])
    path = tmp_path / "list.json"
    path.write_text(json.dumps({**content, "training": training, "validation": []}))
    common |= {"data": str(path), "data_root": str(folder), "crops": 1}
    last = str(pretrained / "pre/last.pt")
    summary = evaluate.embed(EmbedConfig(checkpoint=last, **common))
    subjects = {item["subject"] for item in training}
    one = max(1, round(0.05 * len(subjects)))
    assert len(set(vectors_in(common["out"])["subject"])) == one
    common |= {"split": "training", "out": str(tmp_path / "all")}
    summary = evaluate.embed(EmbedConfig(checkpoint=last, **common))
    assert summary["volumes"] == len(training)
