"""Whatever is in a file, it ends in a result or in one clear error.

Hypothesis changes good files: values of JSON, words of a command line, bytes of headers, of gzip
streams and of archives. Each case has an alarm, the memory of the process is looked at, and so are
the files around the folder that a case may write into. The short form is of some hundred cases, the
slow one (`-m slow`) of 10,000; both print what became of them.
"""

import copy
import gzip
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import NETWORK, refusal
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import eval as evaluate
from dae.config.check import CheckConfig
from dae.config.command_line import parse, run_or_explain
from dae.config.evaluate import (
    CkaConfig,
    CompareConfig,
    EmbedConfig,
    FeaturesConfig,
    FoldsConfig,
    PredictConfig,
    ScoreConfig,
    TuneConfig,
)
from dae.config.illustrate import CONFIGS as PICTURES
from dae.config.lists import MakeListConfig
from dae.config.pretrain import PretrainConfig
from dae.config.segment import SegConfig
from dae.config.study import StudyConfig
from dae.data import datalist, holdout, leaks, listfile, make_list
from dae.data.check import main as check
from dae.data.nifti import read_channels, read_grid, read_image, read_labels
from dae.data.sides import choose_flips
from dae.errors import InputError
from dae.evaluation import cases, postprocess, report
from dae.evaluation.features import encoder_of
from dae.evaluation.written import Written
from dae.model import SwinUNETR
from dae.study.cells import Folders, cell_commands, cell_fingerprint, cells_of
from dae.study.plan import read_plan, with_data_root
from dae.study.runner import (
    CommandFailed,
    Unit,
    has_finished,
    last_validation,
    progress_of,
    start_of,
)
from dae.study.times import expected, read_times
from dae.training.log import read_log
from dae.weights import checkpoint
from dae.weights.foreign import read_weights
from dae.weights.layouts import to_monai
from dae.weights.plan import load_planned, network_of_plan

SECONDS = 20  # of a case; all but the largest take milliseconds
MEMORY = 2 << 30  # bytes that the process may grow by
CODE_RAN = "code-ran"  # a file that hostile pickles would make


# --- what stands in hostile files

NAMES = (
    *(
        "",
        " ",
        ".",
        "..",
        "../..",
        "../outside",
        "a/../../outside",
        "/etc/passwd",
        "//",
        "~",
        "~/x",
    ),
    *("~nobody-has-this-name/x", "a\nb", "a\r", "a\tb", "a\0b", "\x1b[31m", "\u2028", "\ud800"),
    *("é", "e\u0301", "A", "a", "ß", "x" * 300, "é" * 200, "-rf", "--help", ".hidden", "a.", "a "),
    *("<script>alert(1)</script>", '"><b>', "$\\frac{", "$x$", "%s%n", "{0.__class__}", "con", "*"),
    *("**/../*", "[", "0", "-1", "1e999", "nan", "null", "\u202eabc", "１", "训练"),
)
# Given letters spare Hypothesis its table of all characters, which takes longer than the tests.
LETTERS = "ab/.\\-~\n\0 \u0301\ud800é\U0001f9e0'\"{}[]0"
ODD = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from([None, True, False, 0, -1, 1, 255, 256, 2**31, 2**63, 10**30, -(10**400)]),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0, 0.5]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, [{}], {"a": {"a": {}}}, ["a"] * 70, [1, 2]]),
    st.integers(-300, 300),
    st.text(LETTERS, max_size=5),
)
# Where something is changed, what is done there, and what comes in.
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("=+-k"), ODD), max_size=3)
# Position, what is done with the byte there, and a byte.
BYTES = st.lists(
    st.tuples(st.integers(0, 10**9), st.sampled_from("=x+-<"), st.integers(0, 255)), max_size=4
)


def containers(content: Any) -> list[Any]:
    """All objects and lists of a JSON document that are not empty."""
    found = []
    unread = [content]
    while unread:
        value = unread.pop()
        if isinstance(value, (dict, list)) and value:
            found.append(value)
            unread += value.values() if isinstance(value, dict) else value
    return found


def edited(content: Any, edits: Sequence[tuple[int, str, Any]]) -> Any:
    """A JSON document with some values replaced, added, taken away, or under another key."""
    content = copy.deepcopy(content)
    for where, what, given_value in edits:
        value = copy.deepcopy(given_value)  # Hypothesis may give one list twice
        all_of_them = containers(content)
        if not all_of_them:
            return value
        container = all_of_them[where % len(all_of_them)]
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = keys[where // len(all_of_them) % len(keys)]
        if what == "=":
            container[key] = value
        elif what == "-":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, value)
        elif what == "k":
            container[str(value)] = container.pop(key)
        else:
            container[str(value)] = copy.deepcopy(container[key])
    return content


def damaged(content: bytes, edits: Sequence[tuple[int, str, int]]) -> bytes:
    """Bytes replaced, flipped, put in, taken out, or all cut off that follow."""
    result = bytearray(content)
    for where, what, byte in edits:
        at = where % (len(result) + 1)
        if what == "=":
            result[at : at + 1] = bytes([byte])
        elif what == "x" and at < len(result):
            result[at] ^= byte
        elif what == "+":
            result[at:at] = bytes([byte]) * 3
        elif what == "-":
            del result[at : at + 1 + byte]
        elif what == "<" and byte < 64:  # seldom: little is left to be read
            del result[at:]
    return bytes(result)


class Text(NamedTuple):
    """How a JSON document is changed."""

    edits: Sequence[tuple[int, str, Any]]
    bytes: Sequence[tuple[int, str, int]]
    encoding: str

    def of(self, content: Any) -> bytes:
        text = json.dumps(edited(content, self.edits))
        return damaged(text.encode(self.encoding), self.bytes)


TEXTS = st.builds(
    Text,
    EDITS,
    st.one_of(*[st.just([])] * 5, BYTES),
    st.sampled_from(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-32"]),
)


# --- how a case ends


class TookTooLong(BaseException):
    """No `except Exception` of the code that is tested swallows it."""


def ring(number: int, frame: object) -> None:
    raise TookTooLong


def outcome(read: Callable[[Any, Path], object], case: Any, folder: Path) -> str:
    """ "result" or "refused". Anything else is a failure of the test."""
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        read(case, folder)
        return "result"
    except (InputError, CommandFailed) as error:
        line = str(error)
        assert line.strip() and len(line) < 3000
        assert line.isprintable()
        return "refused"
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """A case that wants much more than it may have fails, and does not stop the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < MEMORY // 1024, f"{grown >> 10} MiB more"


@pytest.fixture
def cage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; after the test nothing has appeared around it."""
    configuration.set_hypothesis_home_dir(tmp_path / "hypothesis")
    folder = tmp_path / "around" / "cage"
    folder.mkdir(parents=True)
    (tmp_path / "around" / "outside").write_bytes(b"as it was")
    monkeypatch.chdir(folder)
    yield folder
    around = sorted(path.name for path in (tmp_path / "around").iterdir())
    assert around == ["cage", "outside"]
    assert (tmp_path / "around" / "outside").read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hypothesis") == [
        "around"
    ]
    assert not list(folder.rglob(CODE_RAN))


# --- one kind of file after the other


def volume(seed: int = 0, kind: type = np.int16) -> nib.Nifti1Image:
    values = np.random.default_rng(seed).integers(0, 5, (6, 5, 4)).astype(kind)
    image = nib.Nifti1Image(values, np.diag([1.0, 2.0, 1.5, 1.0]))
    image.header.set_xyzt_units("mm")
    return image


VOLUMES = [volume(kind=kind).to_bytes() for kind in (np.int16, np.uint8, np.float32)]
VOLUMES.append(nib.Nifti2Image.from_image(volume()).to_bytes())


class Nifti(NamedTuple):
    """A volume, damaged before or after it is packed."""

    which: int
    header: Sequence[tuple[int, str, int]]  # in its first 352 bytes
    voxels: Sequence[tuple[int, str, int]]
    packed: bool
    stream: Sequence[tuple[int, str, int]]  # in the gzip stream


FIELDS = st.lists(  # what lies after the length of the header and before its last word
    st.tuples(st.integers(40, 343), st.sampled_from("=x"), st.integers(0, 255)), max_size=6
)
NIFTIS = st.builds(
    Nifti,
    st.integers(0, len(VOLUMES) - 1),
    st.one_of(FIELDS, FIELDS, FIELDS, BYTES),
    st.just([]) | BYTES,
    st.booleans(),
    st.one_of(st.just([]), st.just([]), BYTES),
)


def read_nifti(case: Nifti, folder: Path) -> None:
    good = VOLUMES[case.which]
    content = damaged(good[:352], case.header) + damaged(good[352:], case.voxels)
    if case.packed:
        content = damaged(gzip.compress(content, 1), case.stream)
    path = folder / ("a.nii.gz" if case.packed else "a.nii")
    path.write_bytes(content)
    (folder / "b.nii").write_bytes(good)

    refused = None
    for read in (read_grid, read_labels, read_image, partial(both, folder / "b.nii")):
        try:
            read(path)
        except InputError as error:
            refused = error
    if refused:
        raise refused


def both(other: Path, path: Path) -> None:
    read_channels([other, path])


ITEM = {"image": "a.nii.gz", "modality": "ct", "subject": "s1", "label": "b.nii.gz", "fold": 0}
LIST = {
    "name": "ours",
    "training": [ITEM, {**ITEM, "image": ["c.nii"], "subject": "s2", "label": "e.nii"}],
    "validation": [{**ITEM, "image": "v.nii", "subject": "s3", "label": "w.nii"}],
    "test": ["t.nii"],
    "labels": {"0": "background", "1": "liver", "2": "left kidney", "255": "ignore"},
    "swap": [[1, 2]],
    "tolerance_mm": {"liver": 2.0},
    "modality": {"0": "CT"},
    "modalities": {"pet": "zscore"},
}


OF_REGIONS = {  # as BraTS has them
    **{key: value for key, value in LIST.items() if key not in ("swap", "tolerance_mm")},
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3, "ignore": 4},
    "regions_class_order": [2, 1, 3],
}


def read_list(content: dict[str, Any], case: Text, folder: Path) -> None:
    path = folder / "list.json"
    path.write_bytes(case.of(content))
    items = datalist.load(str(path))
    every = (*items.training, *items.validation, *items.test)
    for item in every:
        for file in (*item.image, item.label or path):
            assert Path(os.path.normpath(file)).is_relative_to(folder)
            file.is_file()
        for name in (item.subject, item.modality_name):
            assert len(name.splitlines()) < 2
            leaks.name_of(name)
    for name in (*items.labels.values(), *(region.name for region in items.regions)):
        assert len(name.splitlines()) < 2

    items.modalities()
    choose_flips(items.labels, items.swap, regions=[region.name for region in items.regions])
    items.fingerprint_by_size(labels=True)
    cases.case_names([item.image[0] for item in every])
    datalist.split_channels(items)
    flags = {"fold": None, "split_seed": None, "allow_trained": False}
    holdout.for_pretraining(items, **flags)
    holdout.for_segmentation(items, "list.json", label_fraction=0.5, **flags)


NNUNET = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "liver": 1, "kidney": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "swap": [[1, 2]],
}
SPLITS = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]


def read_nnunet(case: tuple[Text, Text], folder: Path) -> None:
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "imagesTr/b_0000", "imagesTr/b_0001"):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (folder / "dataset.json").write_bytes(case[0].of(NNUNET))
    (folder / "splits_final.json").write_bytes(case[1].of(SPLITS))
    items = datalist.load(str(folder))
    for item in items.training:
        assert all(file.is_relative_to(folder) for file in item.image)


LINES: list[tuple[type[Any], list[str]]] = [
    (PretrainConfig, ["--data", "x", "--crop", "8", "8", "8", "--lr", "1e-3", "--method", "mae"]),
    (SegConfig, ["--data", "x", "--fold", "1", "--label-fraction", "0.5", "--resume"]),
    (PredictConfig, ["--checkpoint", "a.pt", "b.pt", "--overlap", "0.5", "--tta"]),
    (ScoreConfig, ["--predictions", "p", "--labels", "l", "--tolerance", "2", "--ignore", "255"]),
    (TuneConfig, ["--predictions", "p", "--labels", "l", "--out", "o"]),
    (CkaConfig, ["--before", "a", "--after", "b", "--crops", "4", "--examples", "positions"]),
    (EmbedConfig, ["--checkpoint", "a", "--crops", "4", "--seed", "1"]),
    (CompareConfig, ["--a", "x", "--b", "y", "--seed", "3"]),
    (FoldsConfig, ["--scores", "x", "y", "--out", "o"]),
    (CheckConfig, ["--ct-window", "-100", "100", "--workers", "2", "--data-root", "/"]),
    (MakeListConfig, ["--pattern", "{subject}.nii", "--modality", "ct", "--out", "o", "--add"]),
    (StudyConfig, ["--data", "pretrain=a", "finetune=b", "--only", "dae", "--dry-run"]),
    *(
        (config, ["--out", "x", "--data", "y", "--crop", "8", "8", "8"])
        for config in PICTURES.values()
    ),
]
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(["--crop", "--fold=9", "--no-resume", "--", "-", "--data=", "-h1", "@list"]),
    st.text(LETTERS, max_size=9),
    st.integers().map(str),
    st.floats().map(str),
)


class Line(NamedTuple):
    """A command line, with some words replaced, put in or taken out."""

    which: int
    edits: Sequence[tuple[int, str, str]]


COMMANDS = st.builds(
    Line,
    st.integers(0, len(LINES) - 1),
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from("=+-"), WORDS), max_size=4),
)


def read_command_line(case: Line, folder: Path) -> None:
    config, words = LINES[case.which]
    words = list(words)
    for where, what, word in case.edits:
        if word in ("-h", "--help"):
            continue  # it prints its page and ends the process
        at = where % (len(words) + 1)
        words[at : at + (what != "+")] = [word] if what != "-" else []
    parse(config, words, prog="x", description="")


PLAN = {
    "name": "trial",
    "data": {"pretrain": "a.json", "finetune": "b.json", "test": "c.json"},
    "pretrain": {"steps": 10, "crop": [8, 8, 8], "amp": "off"},
    "methods": {"mae": {"method": "mae"}, "dae": {"finetune": {"lr": 1e-4}}},
    "finetune": {"steps": 10},
    "tunings": {"full": {}, "frozen": {"lr": 0.1}},
    "labels": [2, 0.5, "all"],
    "seeds": {"pretrain": 2, "finetune": {"default": 2, "dae": 3}, "crossed": True},
    "split": "test",
    "predict": {"overlap": 0.5},
    "score": {"tolerance": 2.0},
    "baseline": "mae",
    "scratch_lr": [1, 10],
    "headline": ["mae", "dae"],
    "launchers": {"pretrain": ["torchrun"]},
}


def read_study(case: Text, folder: Path) -> None:
    path = folder / "plan.json"
    path.write_bytes(case.of(PLAN))
    plan = read_plan(str(path))
    names = set()
    for cell in cells_of(plan):
        target = Path(os.path.normpath(folder / cell.name))
        assert target.parent == folder and len(os.fsencode(cell.name)) <= 255
        assert cell.name.isprintable()
        names.add(cell.name.casefold())
    assert len(names) == len(cells_of(plan))


# --- weights


def network() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(1, 3, **NETWORK)


WEIGHTS = network().state_dict()
RUN: dict[str, Any] = {  # a checkpoint, but for its weights
    "format": checkpoint.FORMAT,
    "step": 4,
    "global_batch": 2,
    "threads": 1,
    "data": "voxels 00",
    "config": {"steps": 4, "flip_axes": "auto", "foreground_crop": False},
    "plan": {
        "backbone": "swin_unetr",
        "arguments": json.loads(json.dumps(NETWORK)),
        "in_channels": 1,
        "out_channels": 3,
        "classes": {"0": "background", "1": "liver", "2": "kidney"},
        "method": "dae",
        "crop": [16, 16, 16],
        "spacing": [],
        "modalities": ["ct"],
        "intensity": {"ct": ["window"]},
        "ct_window": [-1000.0, 1000.0],
        "mr_intensity": "zscore",
        "seen": {"trained": ["a"], "held_out": ["b"], "voxels": [], "fold": 0, "split_seed": 0},
        "pretrained_on": {"subjects": [], "voxels": []},
        "flip_axes": [1, 2],
        "swap": [],
        "swap_axes": [],
    },
}
RUN_OF_REGIONS: dict[str, Any] = {
    **RUN,
    "plan": {
        **RUN["plan"],
        "regions": {"whole": [1, 2], "left core": [1], "right core": [2]},
        "regions_class_order": [1, 1, 2],
    },
}
ODD_TENSORS = st.sampled_from(
    [
        torch.zeros(3),
        torch.zeros(1).expand(1 << 20, 1 << 14),
        torch.empty(1 << 20, 1 << 20, device="meta"),
        torch.sparse_coo_tensor(size=(1 << 20, 1 << 20)),
        torch.tensor(math.nan),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(0),
    ]
)
STATES = st.tuples(
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("=+-k"), ODD), max_size=3),
    st.lists(st.tuples(st.integers(0, 10**6), ODD_TENSORS), max_size=1),
    st.just([]) | st.just([]) | BYTES,
)


def read_checkpoint(run: dict[str, Any], case: Any, folder: Path) -> None:
    edits, tensors, flips = case
    state = {"model": dict(WEIGHTS), **edited(run, edits)}
    for where, value in tensors:
        state["model"] = {**WEIGHTS, list(WEIGHTS)[where % len(WEIGHTS)]: value}
    path = folder / "last.pt"
    with path.open("w+b") as file:
        torch.save(state, file)
        checkpoint.seal(file)
    path.write_bytes(damaged(path.read_bytes(), flips))
    use_weights(path)


def use_weights(path: Path) -> None:
    """What the commands do with weights before anything is trained or predicted."""
    weights = read_weights(path)
    config = FeaturesConfig(device="cpu")
    encoder_of(weights, path, config, torch.device("cpu"))
    if not checkpoint.has_seal(path):
        return
    state = load_planned(path, mapped=True)
    plan = evaluate.trained_plan(state)
    checkpoint.load_weights(network_of_plan(plan, config, path), state["model"], path)
    leaks.seen_of([state], [str(path)])


def saved_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOUR: dict[str, Any] = {
    **NETWORK,
    "depths": (1, 1, 1, 1),
    "heads": (1, 1, 1, 1),
    "feature_size": 12,
}
MONAI_FILE = saved_bytes({"state_dict": to_monai(SwinUNETR(1, 3, **FOUR).state_dict())})


class Foreign(NamedTuple):
    """An archive of torch with its pickle changed, and with its bytes changed."""

    pickle: Sequence[tuple[int, str, int]]
    archive: Sequence[tuple[int, str, int]]


FOREIGN = st.builds(Foreign, BYTES, st.just([]) | st.just([]) | BYTES)


def repacked(archive: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    """The archive with another data.pkl, as torch.save would have packed it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = edit(content)
            new.writestr(entry.filename, content)
    return file.getvalue()


def read_foreign(case: Foreign, folder: Path) -> None:
    path = folder / "model.pt"
    content = repacked(MONAI_FILE, lambda pickled: damaged(pickled, case.pickle))
    path.write_bytes(damaged(content, case.archive))
    use_weights(path)


# --- scores, steps, and what a run left


HEAD = ",".join(cases.COLUMNS)
SCORES = "\n".join(
    [HEAD, *(f"s{n},1,liver,ok,{','.join(['0.5'] * len(cases.NUMBERS))}" for n in range(3)), ""]
)
SUMMARY = {
    "definition": "default",
    "ignore": None,
    "tolerance_mm": {"1": 1.0},
    "classes": {"1": {"name": "liver", "dice": {"mean": 0.5}}},
    "labels": {"s0": "00", "s1": "01"},
    "diagonals_mm": {"s0": 10.0, "s1": 11.0},
}
TABLES = st.tuples(
    st.lists(st.tuples(st.integers(0, 99), ODD), max_size=3),
    st.just([]) | BYTES,
    TEXTS,
)


def compare_scores(case: Any, folder: Path) -> None:
    cells, flips, summary = case
    rows = [line.split(",") for line in SCORES.splitlines()]
    for where, value in cells:
        row = rows[where % len(rows)]
        row[where // len(rows) % len(row)] = str(value)
    text = "\n".join(",".join(row) for row in rows)

    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "scores.csv").write_text(SCORES)
        (folder / name / "summary.json").write_text(json.dumps(SUMMARY))
    changed = damaged(text.encode("utf-8", "surrogatepass"), flips)
    (folder / "b" / "scores.csv").write_bytes(changed)
    (folder / "b" / "summary.json").write_bytes(summary.of(SUMMARY))

    refused = None
    for command in (compare_them, fold_them):
        try:
            command(folder)
        except InputError as error:
            refused = error
    if refused:
        raise refused


def compare_them(folder: Path) -> None:
    evaluate.compare(CompareConfig(a=str(folder / "a"), b=str(folder / "b")))


def fold_them(folder: Path) -> None:
    evaluate.folds(FoldsConfig(scores=(str(folder / "a"), str(folder / "b"))))


STEPS = {
    "1": [{"do": "largest_components", "keep": 2}, {"do": "fill_holes"}],
    "2": [{"do": "smooth_boundary", "sigma_mm": 1.0}],
}


def read_steps(case: Text, folder: Path) -> None:
    path = folder / "postprocess.json"
    path.write_bytes(case.of(STEPS))
    steps = postprocess.load_steps(path)
    labels = np.random.default_rng(0).integers(0, 3, (6, 7, 8)).astype(np.uint8)
    postprocess.apply(labels, steps, (1.0, 2.0, 0.5))


EVENTS = [
    {"event": "start", "step": 0, "torch": "2"},
    {"event": "train", "step": 1, "loss": 0.5},
    {"event": "validation", "step": 2, "dice": 0.5, "cases": 3},
    {"event": "end", "step": 2, "reason": "finished"},
]
PROGRESS = {"begun": ["pretrain"], "seconds": {"pretrain": 3.0}, "fingerprint": {"a": {"b": 1}}}
TIMES = [{"step": "pretrain", "method": "dae", "tuning": "", "labels": "all", "seconds": 3.0}]


def lines_of(case: Text, entries: list[dict[str, Any]]) -> bytes:
    """Some lines, of which each is changed in the same way."""
    return b"\n".join(Text(case.edits, [], case.encoding).of(entry) for entry in entries)


def read_logs(case: Text, folder: Path) -> None:
    """What a resumed run and a study read of a run."""
    unit = Unit("x", folder, {"a": {"b": 1}}, [])
    (folder / "log.jsonl").write_bytes(damaged(lines_of(case, EVENTS), case.bytes))
    (folder / "times.jsonl").write_bytes(damaged(lines_of(case, TIMES), case.bytes))
    (folder / "progress.json").write_bytes(case.of(PROGRESS))
    read_log(folder / "log.jsonl")
    has_finished(folder / "log.jsonl")
    last_validation(folder / "log.jsonl")
    start_of(folder / "log.jsonl")
    expected(read_times(folder / "times.jsonl"), step="pretrain", method="dae")
    progress_of(unit)


LEDGER = [
    {"file": "a.nii.gz", "sha256": "0" * 64, "time": "t", "settings": {}, "source": {"images": []}},
    {"file": "predicted.json", "sha256": "1" * 64, "time": "t"},
]
PREDICTED = {"split": "test", "fold": 0, "held_out": ["b"], "trained": ["a"]}


def read_ledger(case: Text, folder: Path) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "written.jsonl").write_bytes(damaged(lines_of(case, LEDGER), case.bytes))
    (out / "predicted.json").write_bytes(case.of(PREDICTED))
    (out / "a.nii.gz").write_bytes(b"somebody's own")

    written = Written(out)
    evaluate.check_targets(written, {}, {"tta": False})
    written.last("a.nii.gz")
    written.is_whole("a.nii.gz")
    written.write("new.txt", partial(Path.write_bytes, data=b"x"))
    assert Written(out).is_whole("new.txt")
    assert (out / "a.nii.gz").read_bytes() == b"somebody's own"
    leaks.read_predicted(out)


class Area(NamedTuple):
    """One kind of input."""

    cases: SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    short: int  # cases of the default suite
    long: int  # of the slow form


AREAS = {
    "nifti": Area(NIFTIS, read_nifti, 70, 2000),
    "lists": Area(TEXTS, partial(read_list, LIST), 50, 1700),
    "lists of regions": Area(TEXTS, partial(read_list, OF_REGIONS), 30, 800),
    "nnunet": Area(st.tuples(TEXTS, TEXTS), read_nnunet, 30, 900),
    "command lines": Area(COMMANDS, read_command_line, 40, 1700),
    "plans": Area(TEXTS, read_study, 20, 700),
    "checkpoints": Area(STATES, partial(read_checkpoint, RUN), 10, 170),
    "checkpoints of regions": Area(STATES, partial(read_checkpoint, RUN_OF_REGIONS), 10, 80),
    "foreign weights": Area(FOREIGN, read_foreign, 8, 250),
    "scores": Area(TABLES, compare_scores, 12, 400),
    "post-processing": Area(TEXTS, read_steps, 20, 500),
    "logs": Area(TEXTS, read_logs, 20, 400),
    "ledgers": Area(TEXTS, read_ledger, 20, 400),
}


def tried(area: Area, count: int, folder: Path) -> Counter[str]:
    """How so many cases ended."""
    ends = Counter[str]()

    @settings(
        max_examples=count,
        derandomize=True,  # the same cases each time
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(area.cases)
    def one(case: Any) -> None:
        ends[outcome(area.read, case, folder)] += 1

    one()
    return ends


@pytest.mark.parametrize("name", AREAS)
def test_what_is_read_ends_in_a_result_or_in_one_clear_error(name: str, cage: Path) -> None:
    ends = tried(AREAS[name], AREAS[name].short, cage)
    assert set(ends) == {"result", "refused"}  # cases that are all refused test little


@pytest.mark.slow
def test_ten_thousand_cases_end_in_a_result_or_in_one_clear_error(
    cage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_ends = Counter[str]()
    words = []
    for name, area in AREAS.items():
        ends = tried(area, area.long, cage)
        all_ends += ends
        words.append(f"{name} {ends.total()}")
    with capsys.disabled():
        print(
            f"\ncases tried: {', '.join(words)}; "
            f"results {all_ends['result']}, refused {all_ends['refused']}"
        )
    assert all_ends.total() >= 10_000


# --- what no change of a good file comes to


def readers_of_json(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Every function that reads JSON, of a file that it is given."""
    return {
        "list.json": lambda path: datalist.load(str(path)),
        "dataset.json": lambda path: datalist.load(str(path.parent)),
        "plan.json": lambda path: read_plan(str(path)),
        "postprocess.json": postprocess.load_steps,
        "predicted.json": lambda path: leaks.read_predicted(path.parent),
        "summary.json": lambda path: report.terms_of(path.parent / "scores.csv"),
        "log.jsonl": lambda path: (read_log(path), last_validation(path)),
        "times.jsonl": read_times,
        "written.jsonl": lambda path: Written(path.parent),
        "progress.json": lambda path: progress_of(Unit("x", path.parent, {}, {})),
    }


MONSTERS = {
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a million digits": b'{"training": ' + b"9" * 1_000_000 + b"}",
    "digits in a key": b'{"labels": {"' + b"9" * 1_000_000 + b'": "a"}, "training": ["a"]}',
    "UTF-16": json.dumps(LIST).encode("utf-16"),
    "NUL": b'{"training": [{"image": "a\x00b"}]}',
    "NaN": b'{"training": NaN, "name": Infinity, "1": -Infinity}',
    "twice": b'{"name": "a", "name": "b"}',
    "nothing": b"",
    "a number": b"7",
    "lone surrogate": b'{"name": "\\ud800", "training": ["\\ud800"], "modality": "ct"}',
    "half a line": json.dumps(LIST).encode()[:-20],
}


@pytest.mark.parametrize("monster", MONSTERS)
def test_no_json_makes_a_traceback_whoever_reads_it(monster: str, cage: Path) -> None:
    for name, read in readers_of_json(cage).items():
        folder = cage / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(MONSTERS[monster])
        end = outcome(lambda path, _, read=read: read(path), folder / name, cage)
        forgiving = name.endswith("jsonl") or name == "summary.json"
        assert end == ("result" if forgiving else "refused"), name


def test_a_list_with_a_byte_order_mark_is_read(cage: Path) -> None:
    (cage / "list.json").write_bytes(json.dumps(LIST).encode("utf-8-sig"))
    assert len(datalist.load(str(cage / "list.json")).training) == 2


def test_json_that_would_fill_the_memory_is_refused_by_its_size(cage: Path) -> None:
    path = cage / "list.json"
    with path.open("wb") as file:
        file.truncate(listfile.LARGEST + 1)
    assert "is not read" in refusal(datalist.load, str(path))


# --- volumes that claim more than they hold


def with_sizes(sizes: tuple[int, int, int], offset: float = 352.0) -> bytes:
    """The header of a volume of int16 that claims these sizes."""
    header = bytearray(volume().to_bytes()[:352])
    header[40:48] = struct.pack("<4h", 3, *sizes)
    header[108:112] = struct.pack("<f", offset)
    return bytes(header)


def bomb(path: Path, header: bytes, megabytes: int) -> None:
    """A gzip stream of a header and zeros, a thousandth as long as what it unpacks to."""
    zeros = gzip.compress(bytes(1 << 20), 9)
    path.write_bytes(gzip.compress(header) + zeros * megabytes)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_claims_30000_cubed_asks_for_no_memory(name: str, cage: Path) -> None:
    content = with_sizes((30_000, 30_000, 30_000)) + bytes(1000)
    (cage / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert "its header claims 30000 x 30000 x 30000" in refusal(read_image, cage / name)


def test_a_gzip_stream_of_ten_megabytes_that_unpacks_to_ten_gigabytes_is_refused(
    cage: Path,
) -> None:
    path = cage / "a.nii.gz"
    bomb(path, with_sizes((1720, 1720, 1720)), 10_000)
    assert path.stat().st_size < 12_000_000
    for read in (read_image, read_labels):
        assert "times as much as the file" in refusal(read, path)


def test_what_follows_the_voxels_is_not_unpacked_for_ever(cage: Path) -> None:
    path = cage / "a.nii.gz"
    content = VOLUMES[0]
    bomb(path, content, 2_000)
    assert "goes on after its voxels" in refusal(read_image, path)


def test_an_extension_before_the_voxels_is_not_read_whatever_its_size(cage: Path) -> None:
    path = cage / "a.nii.gz"
    extension = struct.pack("<4B2i", 1, 0, 0, 0, (1 << 31) - 16, 6)
    bomb(path, with_sizes((6, 5, 4), offset=2.0**31)[:348] + extension, 2_100)
    assert "its voxels begin at byte" in refusal(read_image, path)


# --- weights


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["sealed", "archive", "pickle", "old torch"])
def test_code_in_a_file_of_weights_never_runs(form: str, cage: Path) -> None:
    path = cage / "last.pt"
    content = {"model": RunsCode(cage / CODE_RAN), "plan": {}, "format": checkpoint.FORMAT}
    if form == "sealed":
        checkpoint.save(path, content)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    for read in (read_weights, checkpoint.load):
        refusal(read, path)
    assert not (cage / CODE_RAN).exists()

    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert (cage / CODE_RAN).exists()  # so the test can fail
    (cage / CODE_RAN).unlink()


def sealed(path: Path, archive: bytes) -> Path:
    with path.open("w+b") as file:
        file.write(archive)
        checkpoint.seal(file)
    return path


def with_entries(change: Callable[[zipfile.ZipFile], object], compression: int = 0) -> bytes:
    """The archive of a good checkpoint with more in it, or compressed."""
    file = io.BytesIO()
    whole = saved_bytes({**RUN, "model": WEIGHTS})
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compression)
        change(new)
    return file.getvalue()


def test_a_file_in_an_archive_by_the_name_of_another_folder_is_written_nowhere(cage: Path) -> None:
    archive = with_entries(lambda new: new.writestr("../outside", b"x"))
    end = outcome(lambda path, _: use_weights(path), sealed(cage / "last.pt", archive), cage)
    assert end == "refused"  # and `cage` sees that nothing was written


def test_an_archive_that_claims_more_than_its_file_holds_is_refused(cage: Path) -> None:
    compressed = with_entries(
        lambda new: new.writestr("archive/data/9", bytes(64 << 20)), zipfile.ZIP_DEFLATED
    )
    path = sealed(cage / "last.pt", compressed)
    for read in (checkpoint.load, read_weights):
        assert "made to fill the memory" in refusal(read, path)

    little = with_entries(lambda new: None, zipfile.ZIP_DEFLATED)
    line = refusal(checkpoint.load, sealed(path, little))
    assert "compressed" in line or "made to fill" in line


def test_a_tensor_of_more_values_than_its_file_is_refused(cage: Path) -> None:
    huge = torch.zeros(1).expand(1 << 16, 1 << 16)
    name = next(iter(WEIGHTS))
    checkpoint.save(cage / "last.pt", {**RUN, "model": {**WEIGHTS, name: huge}})
    assert "fewer values in the file" in refusal(checkpoint.load, cage / "last.pt")

    # A storage that claims 2 GB, and one that a file asks to be made of nothing.
    claims = saved_bytes({"w": torch.arange(8.0)})
    pickled = b"J" + (500_000_000).to_bytes(4, "little")
    (cage / "a.pt").write_bytes(repacked(claims, lambda text: text.replace(b"K\x08", pickled)))
    refusal(read_weights, cage / "a.pt")
    asks = b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    (cage / "b.pt").write_bytes(repacked(claims, lambda _: asks))
    assert "bytearray" in refusal(read_weights, cage / "b.pt")


def test_a_dictionary_that_holds_itself_is_walked_through_once(cage: Path) -> None:
    inside: dict[str, Any] = {"w": torch.zeros(2)}
    inside["again"] = inside
    for _ in range(60):  # as a tree it would have 2^60 leaves
        inside = {"a": inside, "b": inside}
    torch.save(inside, cage / "a.pt")
    assert outcome(lambda path, _: read_weights(path), cage / "a.pt", cage) == "refused"


@pytest.mark.parametrize(
    "name, value",
    [("feature_size", 10**6), ("depths", [10**6, 1]), ("window", [4096] * 3), ("depths", [1] * 99)],
)
def test_a_plan_of_a_huge_network_builds_none(name: str, value: Any, cage: Path) -> None:
    plan = {**RUN["plan"], "arguments": {**RUN["plan"]["arguments"], name: value}}
    checkpoint.save(cage / "last.pt", {**RUN, "plan": plan, "model": WEIGHTS})
    assert outcome(lambda path, _: use_weights(path), cage / "last.pt", cage) == "refused"


@pytest.mark.parametrize(
    "regions, order",
    [
        (5, [1]),
        ({"a": 1, "b": [2], "c": [1, 2]}, [1, 2, 1]),
        ({"a": [1], "b": ["2"], "c": [1, 2]}, [1, 2, 1]),
        ({3: [1], "b": [2], "c": [1, 2]}, [1, 2, 1]),
        ({"c": [1, 2], "a": [1], "b\n": [2]}, [1, 1, 2]),
        ({"c": [1, 2], "a": [1], "b": [2]}, [1, 1]),
        ({"c": [1, 2], "a": [1], "b": [2]}, 2),
        ({"c": [1, 2], "a": [1], "b": [2]}, [1, 1, 9]),
        ({"a": [1], "b": [2], "c": [1, 2]}, [1, 2, 1]),  # the larger one last
        ({"c": [1, 2, 3], "a": [1, 3], "b": [2]}, [2, 1, 2]),  # 3 is no label of the plan
        ({"c": [1, 2], "a": [1]}, [2, 1]),  # two for three outputs
    ],
)
def test_regions_of_a_plan_are_such_as_a_list_may_have(
    regions: Any, order: Any, cage: Path
) -> None:
    wrong = {**RUN["plan"], "regions": regions, "regions_class_order": order}
    checkpoint.save(cage / "last.pt", {**RUN, "plan": wrong, "model": WEIGHTS})
    line = refusal(load_planned, cage / "last.pt")
    assert line.startswith(str(cage / "last.pt")) and "\n" not in line


def test_right_regions_of_a_plan_are_taken(cage: Path) -> None:
    order = {"regions": {"c": [1, 2], "a": [1], "b": [2]}, "regions_class_order": [1, 1, 2]}
    plan = {**RUN["plan"], **order}
    checkpoint.save(cage / "last.pt", {**RUN, "plan": plan, "model": WEIGHTS})
    assert load_planned(cage / "last.pt")["plan"] == plan


def test_a_network_of_the_users_own_may_have_any_arguments(cage: Path) -> None:
    """It is built only where the command line names it: what it takes is its author's business."""
    arguments = {"slope": -0.2, "seed": 10**9, "channels": list(range(100))}
    plan = {**RUN["plan"], "backbone": "mynet:MyNet", "arguments": arguments}
    checkpoint.save(cage / "last.pt", {**RUN, "plan": plan, "model": WEIGHTS})
    assert load_planned(cage / "last.pt")["plan"]["arguments"] == arguments


# --- a list stays in its folder


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize(
    "path", ["../outside", "a/../../outside", "/etc/passwd", "{cage}/../outside", "link/../x", "~"]
)
def test_a_list_does_not_leave_its_folder_until_it_may(path: str, key: str, cage: Path) -> None:
    (cage / "elsewhere").mkdir()
    (cage.parent.parent / "hypothesis").mkdir(exist_ok=True)
    (cage / "link").symlink_to(cage.parent.parent / "hypothesis")  # what holds nothing of ours
    item = {"image": "a.nii", "modality": "ct", key: path.replace("{cage}", str(cage))}
    (cage / "list.json").write_text(json.dumps({"training": [item]}))
    line = refusal(datalist.load, str(cage / "list.json"))
    assert "--data-root" in line and "list.json: training[0]" in line

    (item,) = datalist.load(str(cage / "list.json"), root="/").training
    assert item.image[0].name or item.label


def test_a_path_within_the_folder_is_allowed_however_it_is_written(cage: Path) -> None:
    (cage.parent.parent / "hypothesis").mkdir(exist_ok=True)
    (cage / "link").symlink_to(cage.parent.parent / "hypothesis")
    for path in ("a.nii", "./b/../a.nii", f"{cage}/a.nii", "link/a.nii", "..a.nii", "a..nii"):
        content = {"training": [{"image": path, "modality": "ct"}]}
        (cage / "list.json").write_text(json.dumps(content))
        (item,) = datalist.load(str(cage / "list.json")).training
        assert item.image == (cage / path,)
        (item,) = datalist.load("list.json").training  # from the folder itself


def test_links_are_followed_whatever_the_way_to_the_list(
    cage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ".." that the user writes is not one of the list."""
    for name in ("data", "far", "work"):
        (cage / name).mkdir()
    (cage / "far/a.nii").touch()
    (cage / "data/a.nii").symlink_to(cage / "far/a.nii")
    (cage / "data/link").symlink_to(cage / "far")
    monkeypatch.chdir(cage / "work")

    path = Path("../data/list.json")
    for name in ("a.nii", "link/a.nii", "./a.nii"):
        path.write_text(json.dumps({"training": [{"image": name, "modality": "ct"}]}))
        for root in ("", "../data"):
            (item,) = datalist.load(str(path), root=root).training
            assert item.image[0].is_file()
    for name in ("link/../work/a.nii", "../data/a.nii", "../far/a.nii", "../data/../far/a.nii"):
        path.write_text(json.dumps({"training": [{"image": name, "modality": "ct"}]}))
        for root in ("", "../data"):
            assert "lies outside" in refusal(datalist.load, str(path), root=root)


def test_a_data_root_is_where_paths_start_and_stay(cage: Path) -> None:
    (cage / "lists").mkdir()
    path = cage / "lists/list.json"
    path.write_text(json.dumps({"training": [{"image": "b/a.nii", "modality": "ct"}]}))
    (item,) = datalist.load(str(path), root=str(cage)).training
    assert item.image == (cage / "b/a.nii",)

    path.write_text(json.dumps({"training": [{"image": "../a.nii", "modality": "ct"}]}))
    assert str(cage) in refusal(datalist.load, str(path), root=str(cage))
    (item,) = datalist.load(str(path), root="/").training
    assert item.image == (cage / "lists/../a.nii",)


def test_every_command_that_reads_a_list_has_the_flag() -> None:
    configs = [PretrainConfig, SegConfig, PredictConfig, ScoreConfig, TuneConfig, CkaConfig]
    configs += [EmbedConfig, CheckConfig, MakeListConfig, StudyConfig, *PICTURES.values()]
    for config in configs:
        set_by = parse(config, ["--data-root", "/x"], prog="x", description="")
        assert set_by.data_root == "/x", config


def test_a_list_that_was_made_beside_its_images_names_the_flag_that_reads_it(
    cage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cage / "scans").mkdir()
    (cage / "scans/s1.nii").write_bytes(VOLUMES[0])
    for out, flags, said in (
        ("scans/a.json", {}, ""),
        ("all.json", {}, ""),
        ("lists/a.json", {}, "--data-root /"),
        ("lists/b.json", {"data_root": str(cage)}, f"--data-root {cage}"),
    ):
        config = MakeListConfig(pattern=("{subject}.nii",), modality="ct", out=out, **flags)
        make_list.main(cage / "scans", config)
        printed = capsys.readouterr().out
        assert (f"need {said}" in printed) if said else ("--data-root" not in printed)
        items = datalist.load(out, root=said.removeprefix("--data-root "))
        assert items.training[0].image[0].samefile(cage / "scans/s1.nii")

    elsewhere = MakeListConfig(
        pattern=("{subject}.nii",), modality="ct", out="c.json", data_root=str(cage / "lists")
    )
    assert "--data-root" in refusal(make_list.main, cage / "scans", elsewhere)


def test_a_study_gives_the_flag_to_every_step(cage: Path) -> None:
    (cage / "plan.json").write_text(json.dumps({**PLAN, "score": {"data_root": "/own"}}))
    plan = with_data_root(read_plan(str(cage / "plan.json")), "/all")
    folders = Folders(cage)
    (cell, *_) = cells_of(plan)
    before = cell_fingerprint(read_plan(str(cage / "plan.json")), folders, cell)
    assert cell_fingerprint(plan, folders, cell) == before  # finished cells stay finished
    roots = []
    for command in cell_commands(plan, folders, cell):
        roots.append(command.rest[command.rest.index("--data-root") + 1])
    assert roots == ["/all", "/all", "/own"]


# --- names


def test_what_a_command_prints_is_one_line_that_no_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse() -> None:
        raise InputError("a\nb \x1b[31m \0 \ud800 \u202e é 训练")

    with pytest.raises(SystemExit):
        run_or_explain(refuse, "prog")
    assert capsys.readouterr().err == "prog: a b \\x1b[31m \\x00 \\ud800 \\u202e é 训练\n"


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", "\x1b[31ma", "a\u2028b", "a\ud800"])
def test_names_are_one_line_of_text(name: str, cage: Path) -> None:
    item = {"image": "a.nii", "modality": "ct"}
    for content in (
        {"training": [{**item, "subject": name}]},
        {"training": [{**item, "image": name}]},
        {"training": [{**item, "label": name}]},
        {"training": [item], "labels": {"0": "background", "1": name}},
        {"training": [{**item, "modality": name}], "modalities": {name: "zscore"}},
    ):
        (cage / "list.json").write_text(json.dumps(content))
        line = refusal(datalist.load, str(cage / "list.json"))
        assert "one line of text" in line and line.isprintable()


@pytest.mark.parametrize("name", ["-rf", "a.", "..a", "<b>", "é", "训练", "a b", "$x$", "con"])
def test_names_that_are_only_odd_are_read(name: str, cage: Path) -> None:
    item = {"image": f"{name}.nii", "modality": name, "subject": name}
    content = {"training": [item], "modalities": {name: "zscore"}, "labels": {"1": name}}
    (cage / "list.json").write_text(json.dumps(content))
    (read,) = datalist.load(str(cage / "list.json")).training
    assert (read.subject, read.image, read.modality) == (name, (cage / f"{name}.nii",), (name,))


@pytest.mark.parametrize("pair", [("A", "a"), ("é", "e\u0301"), ("ß", "ss"), ("STRASSE", "straße")])
def test_two_cases_are_never_one_file_on_any_disk(pair: tuple[str, str], cage: Path) -> None:
    images = [cage / f"{name}.nii.gz" for name in pair]
    assert "rename it" in refusal(cases.case_names, images)
    assert cases.case_names([cage / "a.nii", cage / "b.nii"]) == ["a", "b"]


def test_a_case_is_a_file_in_the_folder_of_its_predictions(cage: Path) -> None:
    for name in ("a..", "..", "-rf", "a\\b", ".hidden"):
        (case,) = cases.case_names([cage / f"{name}.nii.gz"])
        assert (cage / f"{case}.nii.gz").parent == cage
    assert "too long" in refusal(cases.case_names, [cage / f"{'x' * 245}.nii"])
    item = {"training": [{"image": "x" * 300, "modality": "ct"}]}
    (cage / "list.json").write_text(json.dumps(item))
    assert "over 255 bytes" in refusal(datalist.load, str(cage / "list.json"))


@pytest.mark.parametrize("name", ["../x", "a/b", "a\nb", "-x", "x" * 300, "", ".", "..", "é" * 90])
def test_a_method_of_a_plan_is_the_name_of_a_folder(name: str, cage: Path) -> None:
    plan = {**PLAN, "methods": {name: {}}, "baseline": "", "headline": [], "seeds": {}}
    (cage / "plan.json").write_text(json.dumps(plan))
    refusal(read_plan, str(cage / "plan.json"))


def test_two_methods_are_never_one_folder(cage: Path) -> None:
    plan = {**PLAN, "methods": {"dae": {}, "DAE": {}}, "headline": [], "seeds": {}, "baseline": ""}
    (cage / "plan.json").write_text(json.dumps(plan))
    assert "capitals" in refusal(read_plan, str(cage / "plan.json"))


@pytest.mark.parametrize("ending", ["/../../*", "**/*.nii", "[a", "?.nii", "a\nb", ".nii/../x"])
def test_the_ending_of_an_nnunet_folder_is_no_pattern(ending: str, cage: Path) -> None:
    (cage / "dataset.json").write_text(json.dumps({**NNUNET, "file_ending": ending}))
    assert '"file_ending"' in refusal(datalist.load, str(cage))


SCRIPT = "<script>alert('1')</script>"


def test_pages_escape_the_names_in_them(cage: Path) -> None:
    label = nib.Nifti1Image(
        np.random.default_rng(0).integers(0, 2, (8, 8, 8)).astype(np.uint8), np.eye(4)
    )
    for folder in ("labels", "predictions"):
        (cage / folder).mkdir()
        nib.save(label, cage / folder / "<b>$x.nii.gz")
    image = nib.Nifti1Image(
        np.random.default_rng(0).normal(0, 300, (8, 8, 8)).astype(np.float32), np.eye(4)
    )
    nib.save(image, cage / "labels" / "<i>$image.nii.gz")
    item = {
        "image": "labels/<i>$image.nii.gz",
        "label": "labels/<b>$x.nii.gz",
        "modality": SCRIPT,
        "subject": SCRIPT,
    }
    content = {
        "training": [item],
        "test": [{**item, "image": "labels/<b>$x.nii.gz"}],
        "labels": {"0": "background", "1": SCRIPT + "$\\frac{"},
        "modalities": {SCRIPT: "zscore"},
    }
    (cage / "<u>.json").write_text(json.dumps(content))
    flags = {"data": "<u>.json", "split": "test", "predictions": "predictions", "out": "scores"}
    evaluate.score(ScoreConfig(**flags))
    check([str(cage / "<u>.json")], CheckConfig(out="check", workers=1))
    for page in ("scores/report.html", "check/check.html"):
        text = (cage / page).read_text()
        assert "&lt;script&gt;" in text
        for name in ("<script>alert", "<b>$x", "<i>$image", "<u>.json"):
            assert name not in text, (page, name)
