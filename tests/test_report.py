"""dae/evaluation/report.py: what is written is strict, whole, and has every number."""

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from conftest import refusal

from dae import figures as pictures_module
from dae.data.regions import Region
from dae.errors import InputError
from dae.evaluation.cases import Pair, pair, score
from dae.evaluation.metrics import Row
from dae.evaluation.report import (
    PAGE,
    SHOWN,
    about_policy,
    check_classes,
    check_names,
    check_terms,
    comparison_text,
    figures,
    fold_text,
    terms_of,
    tolerances,
    write_lines,
    write_page,
    write_summary,
    write_table,
)
from dae.evaluation.statistics import OVERALL, OVERALL_NAME, compare, fold_table, summarise
from tests.test_statistics import A, B, row, rows_of

pytestmark = pytest.mark.filterwarnings("error")
CLASSES = {1: "liver & bile", 2: "<b>spleen</b>", 3: "aorta", 4: 'vena "cava"', 5: "never there"}


class Run(NamedTuple):
    """Five cases of five classes: good, missed, spurious and absent ones."""

    rows: list[Row]
    diagonals: dict[str, float]
    pairs: list[Pair]
    folder: Path


class Page(NamedTuple):
    """A page as it is written, and the pictures in it."""

    text: str
    pictures: dict[str, bytes]


def saved(path: Path, labels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([1.5, 2.0, 3.0, 1.0])), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    truth = np.zeros((20, 16, 12), np.uint8)
    for cls in (1, 2, 3):
        truth[6 * cls - 4 : 6 * cls, 4:11, 2:9] = cls

    for n in range(5):
        shift = rng.integers(-1, 2, 3)
        prediction = np.roll(truth, shift, (0, 1, 2)) if n > 0 else truth.copy()
        if n == 1:
            prediction[prediction == 3] = 0
            prediction[0:2, 0:2, 0:2] = 4
        saved(folder / "labels" / f"case_{n}&co.nii.gz", truth)
        saved(folder / "predictions" / f"case_{n}&co.nii.gz", prediction)

    pairs = pair(folder / "predictions", folder / "labels")
    rows, diagonals, _ = score(pairs, CLASSES)
    return Run(rows, diagonals, pairs, folder)


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    pictures = figures(run.rows, run.pairs)
    summary = summarise(run.rows, diagonals=run.diagonals, tolerance=1.0)
    write_page(run.rows, summary, pictures, run.folder / "report.html")
    return Page((run.folder / "report.html").read_text(encoding="utf-8"), pictures)


class Reader(HTMLParser):
    """All texts, tags, attributes and table cells of a page; in a cell a tag is a blank."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("td", "th"):
            self.in_cell = True
            self.cells.append("")
        elif self.in_cell:
            self.cells[-1] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.in_cell:
            self.cells[-1] += data

    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def after(self, cell: str) -> list[str]:
        """The cells that follow the first of this text."""
        return self.cells[self.cells.index(cell) + 1 :]


def strict(text: str) -> Any:
    def fail(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=fail)


# --- summary.json


def test_a_summary_is_json_without_nan_or_infinity(run: Run, tmp_path: Path) -> None:
    summary = summarise(run.rows, diagonals=run.diagonals, tolerance={1: 1.0, 2: inf})
    write_summary(summary, tmp_path / "summary.json")
    found = strict((tmp_path / "summary.json").read_text())

    of_nothing = dict.fromkeys(("mean", "median", "std", "low", "high"))
    assert found["classes"]["5"]["dice"] == {**of_nothing, "n": 0, "left_out": 5}
    assert found["classes"]["3"]["status"] == {"ok": 4, "missed": 1, "spurious": 0, "absent": 0}
    assert found["classes"]["4"]["status"] == {"ok": 0, "missed": 0, "spurious": 1, "absent": 4}
    assert found["classes"]["1"]["dice"]["mean"] == summary["classes"][1]["dice"]["mean"]
    assert found["classes"]["1"]["msd"] == found["classes"]["1"]["assd"]
    assert (found["policy"], found["definition"]) == ("exclude", "default")
    assert found["tolerance_mm"] == {"1": 1.0, "2": None}
    assert found["diagonals_mm"] == run.diagonals
    assert found["cases"] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


# --- figures


def test_there_is_a_picture_of_all_cases_and_one_of_each_of_the_worst(page: Page) -> None:
    assert len(page.pictures) == 4
    assert "distribution" in page.pictures
    assert "worst-case_1&co" in page.pictures
    assert "worst-case_0&co" not in page.pictures


def test_an_image_lies_under_its_overlay_if_it_is_on_the_labels_grid(
    run: Run, tmp_path: Path
) -> None:
    case = "case_1&co"
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None], (20, 16, 12))
    nib.save(nib.Nifti1Image(ramp, np.diag([1.5, 2.0, 3.0, 1.0])), tmp_path / "same.nii")
    nib.save(nib.Nifti1Image(ramp, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "other.nii")

    def drawn_over(name: str) -> bytes:
        images = {case: tmp_path / name}
        return figures(run.rows, run.pairs, images=images)[f"worst-{case}"]

    without = figures(run.rows, run.pairs)[f"worst-{case}"]
    assert drawn_over("same.nii") != without
    assert drawn_over("other.nii") == without
    assert drawn_over("no such.nii") == without


def test_what_was_not_annotated_is_drawn_as_background(run: Run) -> None:
    case = "worst-case_1&co"
    assert figures(run.rows, run.pairs, ignore=2)[case] != figures(run.rows, run.pairs)[case]


# --- the page


def test_the_page_needs_nothing_beside_itself(page: Page) -> None:
    reader = Reader(page.text)
    names = ("src", "href", "srcset", "data", "action")
    sources = [value or "" for name, value in reader.attributes if name in names]
    assert len(sources) == len(page.pictures)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)

    without = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page.text)
    assert not re.search(r"https?:|//|@import|url\(|file:", without)
    assert not re.search(r"\$\w", without)  # nothing of the template is left


def test_the_page_names_every_case_and_every_class_as_text(page: Page, run: Run) -> None:
    shown = Reader(page.text).words()
    for name in (*CLASSES.values(), *(each.case for each in run.pairs)):
        assert name in shown
    assert "<b>spleen" not in page.text
    assert "&lt;b&gt;spleen&lt;/b&gt;" in page.text
    assert "liver &amp; bile" in page.text


def test_dice_hd_and_msd_come_first(page: Page) -> None:
    titles = ["Dice", "HD, mm", "MSD, mm", "HD95, mm", "NSD"]
    assert list(SHOWN.values()) == titles
    reader = Reader(page.text)
    assert re.findall(r"<li>([^<]+)<b>", page.text)[:5] == titles
    assert [cell for cell in reader.cells if cell in titles] == titles


def test_the_page_has_the_numbers_of_the_summary(page: Page, run: Run) -> None:
    summary = summarise(run.rows)
    reader = Reader(page.text)
    for cls in (1, 2, 3):
        scores = summary["classes"][cls]
        statuses, *cells = reader.after(CLASSES[cls])
        counts = [f"{n} {status}" for status, n in scores["status"].items() if n]
        assert statuses == ", ".join(counts)
        for metric, decimals in (("dice", 3), ("hd", 2), ("msd", 2), ("hd95", 2), ("nsd", 3)):
            mean, low, high, median = (
                f"{scores[metric][key]:.{decimals}f}" for key in ("mean", "low", "high", "median")
            )
            assert cells[:3] == [f"{mean} {low} to {high}", median, str(scores[metric]["n"])]
            cells = cells[3:]

    assert reader.after("aorta")[0] == "4 ok, 1 missed"
    assert reader.after("aorta")[6] == "4"  # n of HD
    assert reader.after("never there")[:4] == ["5 absent", "– –", "–", "0"]
    overall = f"{summary['mean_of_cases']['dice']['mean']:.3f}"
    assert overall in reader.after(OVERALL_NAME)[1]
    assert f"Dice<b>{overall}</b>" in page.text


def test_the_page_has_the_dice_of_every_case(page: Page, run: Run) -> None:
    reader = Reader(page.text)
    for each in run.pairs:
        expected = []
        for scores in run.rows:
            if scores["case"] == each.case:
                good = scores["status"] == "ok"
                expected.append(f"{scores['dice']:.3f}" if good else scores["status"])
        assert reader.after(each.case)[:5] == expected


def test_the_lowest_cases_come_first_and_say_what_is_wrong(page: Page) -> None:
    captions = re.findall(r"<figcaption>(<b>.*?)</figcaption>", page.text)
    means = [float(mean) for mean in re.findall(r"mean Dice ([\d.]+)", " ".join(captions))]
    assert len(captions) == len(means) == 3
    assert means == sorted(means)
    assert captions[0].startswith("<b>case_1&amp;co</b>")
    assert "aorta missed" in captions[0]
    assert "vena &quot;cava&quot; spurious" in captions[0]


@pytest.mark.parametrize(
    "policy, words", [("exclude", "no distance: n is how many"), ("diagonal", "volume's diagonal")]
)
def test_the_page_says_how_its_numbers_were_taken(
    run: Run, page: Page, policy: Any, words: str, tmp_path: Path
) -> None:
    summary = summarise(
        run.rows,
        policy=policy,
        diagonals=run.diagonals,
        definition="medpy",
        tolerance=2.5,
        ignore=9,
    )
    write_page(run.rows, summary, page.pictures, tmp_path / "page.html")
    shown = Reader((tmp_path / "page.html").read_text()).words()
    for phrase in (
        f"5 cases, 5 classes; surfaces by definition medpy, averages by policy {policy}",
        words,
        "within 2.5 mm",
        "both directions pooled",
        "What is labelled 9 counts for nothing.",
        "percentile bootstrap",
        "MSD the mean over both surfaces (also called ASSD)",
    ):
        assert phrase in shown


def test_a_tolerance_of_each_class_is_named_with_it() -> None:
    names = {1: "liver", 2: "spleen", 3: "aorta"}
    assert tolerances(1.5, names) == "1.5"
    assert tolerances({1: 3.0, 2: 1.5, 3: 3.0}, names) == "1.5 (spleen), 3 (liver, aorta)"


def luminance(code: str) -> float:
    """Of a colour, relative (WCAG 2)."""
    parts = np.array([int(code[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_is_legible_in_light_and_in_dark() -> None:
    """Contrast (WCAG 2) of texts on both grounds is at least 4.5, and of figures at least 3."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6});", part))
        for part in PAGE.read_text().split("@media (prefers-color-scheme: dark)")
    )
    assert set(light) == set(dark) == {"ink", "soft", "line", "back", "card"}
    for theme in (light, dark):
        for ink in ("ink", "soft"):
            for ground in ("back", "card"):
                assert contrast(theme[ink], theme[ground]) > 4.5
        assert contrast(pictures_module.INK, theme["back"]) > 3


def test_one_perfect_case_makes_a_page(tmp_path: Path) -> None:
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    saved(tmp_path / "p.nii", labels)
    saved(tmp_path / "t.nii", labels)
    pairs = [Pair("p", tmp_path / "p.nii", tmp_path / "t.nii")]
    rows = score(pairs, {1: "a", 2: "b"}).rows
    write_page(rows, summarise(rows), figures(rows, pairs), tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text())
    assert "1.000 –" in reader.cells
    assert "1 case, 2 classes" in reader.words()


# --- regions

REGIONS = {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}


def test_a_page_of_regions_counts_regions_and_names_the_labels_that_are_drawn(
    run: Run, tmp_path: Path
) -> None:
    """A picture shows each region less those within it, so 2 is what is whole and not core."""
    regions = [Region(name, tuple(labels)) for name, labels in REGIONS.items()]
    rows = score(run.pairs, CLASSES, regions=regions).rows
    summary = {**summarise(rows), "regions": REGIONS}
    pictures = figures(rows, run.pairs, drawn=[1, 2, 3, 4])
    write_page(rows, summary, pictures, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "5 cases, 3 regions" in Reader(text).words()

    (legend,) = re.findall(r'<ul class="legend">(.*?)</ul>', text, flags=re.S)
    assert re.findall(r"</i>(.*?)</li>", legend) == ["core", "whole", "enhancing"]
    assert pictures != figures(rows, run.pairs, drawn=[1, 3])


def test_scores_of_other_regions_or_of_classes_are_not_compared() -> None:
    classes = {"1": {"name": "1"}}
    common = {"definition": "default", "ignore": None, "tolerance_mm": 1.0, "classes": classes}
    whole = {**common, "regions": REGIONS, "labels": {}}
    other = {**whole, "regions": {**REGIONS, "core": [1]}}
    of_classes = {**common, "labels": {}}
    assert check_terms([("a", whole), ("b", whole)]) == ""
    assert "core (1)," in refusal(check_terms, [("a", whole), ("b", other)])
    assert "b by classes" in refusal(check_terms, [("a", whole), ("b", of_classes)])


# --- may two runs be compared?


def terms(
    folder: Path, *, labels: tuple[str, str] = ("a", "b"), mm: float = 20.0, **choices: Any
) -> tuple[str, dict[str, Any]]:
    """What `eval.py score` leaves beside scores.csv, of two cases whose label maps hold this."""
    rows = [row("s1", 1, 0.5), row("s2", 1, 0.6), row("s1", 2, 0.5), row("s2", 2, 0.6)]
    summary = summarise(rows, diagonals={"s1": mm, "s2": 30.0}, **choices)
    summary["labels"] = dict(zip(("s1", "s2"), labels))
    folder.mkdir()
    write_summary(summary, folder / "summary.json")
    return str(folder), terms_of(folder / "scores.csv")


@pytest.mark.parametrize(
    "other, message",
    [
        ({"definition": "medpy"}, "different --definition: default and medpy"),
        ({"ignore": 9}, "different --ignore: None and 9"),
        ({"tolerance": 2.0}, "different --tolerance: 1.0 and 2.0 mm for organ 1"),
        ({"tolerance": {1: 1.0, 2: 3.0}}, "different --tolerance: 1.0 and 3.0 mm for organ 2"),
        ({"labels": ("a", "x")}, "against different label maps of case s2"),
        ({"mm": 40.0}, "against different label maps of case s1"),
    ],
)
def test_scores_made_in_another_way_are_not_compared(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    a = terms(tmp_path / "a")
    b = terms(tmp_path / "b", **other)
    same_as_a = terms(tmp_path / "same")
    for runs in ([a, b], [a, same_as_a, b]):
        with pytest.raises(InputError, match=message) as error:
            check_terms(runs)
        assert str(error.value).startswith(f"{tmp_path / 'a'} and {tmp_path / 'b'}")


def test_scores_of_one_number_under_two_names_are_not_compared() -> None:
    """A name that is the number alone, as of labels without a list, is none."""
    kidney = {"1": {"name": "kidney"}}
    tumour = {"1": {"name": "tumour"}}
    message = "a and b: label 1 is kidney in one and tumour in the other"
    with pytest.raises(InputError, match=message):
        check_names("a", "b", kidney, tumour)
    check_names("a", "c", kidney, {"1": {"name": "1"}})
    check_names("a", "d", kidney, {"1": {"name": "Kidney"}})
    check_names("a", "e", kidney, {"2": {"name": "tumour"}})


def test_names_are_those_of_the_scores_where_no_summary_has_any() -> None:
    liver = [row("s1", 1, 0.9) | {"name": "liver"}]
    spleen = [row("s1", 1, 0.9) | {"name": "spleen"}]
    with pytest.raises(InputError, match="a and b: label 1 is liver in one and spleen in the"):
        check_classes([("a", liver), ("b", spleen)])
    check_classes([("a", liver), ("b", liver), ("c", spleen[:0])])


def test_a_summary_that_counts_more_distances_than_the_tables_is_named(tmp_path: Path) -> None:
    one, other = terms(tmp_path / "a"), terms(tmp_path / "b", policy="diagonal")
    assert about_policy([one]) == ""
    assert about_policy([one, other]).startswith(f"warning: {other[0]}: scored with --policy diag")


def test_scores_made_in_one_way_are_compared_without_a_word(tmp_path: Path) -> None:
    one = terms(tmp_path / "a", tolerance=2.0)
    other = terms(tmp_path / "b", tolerance={1: 2.0, 2: 2.0}, policy="diagonal")
    assert check_terms([one, other]) == ""  # the policy changes no row

    one = terms(tmp_path / "c")
    rounded = terms(tmp_path / "d", mm=20.0001)
    assert check_terms([one, rounded]) == ""

    name, fold = terms(tmp_path / "e", labels=("x", "y"))
    fold["labels"] = {"s3": "x", "s4": "y"}
    assert check_terms([one, (name, fold)]) == ""  # folds have other cases
    assert check_terms([one]) == ""


def test_scores_that_do_not_tell_how_they_were_made_are_named_in_one_line(tmp_path: Path) -> None:
    known = terms(tmp_path / "a")
    without_labels = {key: value for key, value in known[1].items() if key != "labels"}
    for unknown in (without_labels, terms_of(tmp_path / "nowhere" / "scores.csv")):
        warning = check_terms([known, ("old", unknown)])
        assert warning.startswith("warning: old: ")
        assert "\n" not in warning

    with pytest.raises(InputError, match="--definition"):
        check_terms([("old", {**without_labels, "definition": "medpy"}), known])
    damaged = [{**known[1], "regions": regions} for regions in ([1], 5, {"a": 1})]
    for content in ("{", "[]", '{"cases": 2}', *map(json.dumps, damaged)):
        (tmp_path / "summary.json").write_text(content)
        assert terms_of(tmp_path / "scores.csv") == {}


# --- tables of a comparison


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_text_of_a_comparison_is_an_aligned_table_for_each_metric() -> None:
    lines = compare(rows_of(A), rows_of(B))
    text = comparison_text(lines, a="runs/a", b="runs/b")
    first, *tables = text.strip().split("\n\n")
    assert first == "A is runs/a, B is runs/b."
    assert [columns(table)[0] for table in tables] == list(SHOWN.values())
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
        assert re.fullmatch(r"\| -+ (\| -+: )+\|", table.splitlines()[1])

    head, _, *body = map(columns, tables[0].splitlines())
    assert head[:5] == ["Dice", "n", "A", "B", "B - A"]
    assert [cells[0] for cells in body] == ["organ 1", "organ 2", "organ 3", OVERALL_NAME]

    (line,) = [line for line in lines if (line["metric"], line["class"]) == ("dice", 3)]
    assert body[2][1:6] == [
        "12",
        f"{line['mean_a']:.3f}",
        f"{line['mean_b']:.3f}",
        f"{line['difference']:.3f}",
        f"{line['low']:.3f} to {line['high']:.3f}",
    ]
    assert body[2][6] == "<0.001"
    assert line["t_p"] < 0.001


def test_what_could_not_be_tested_is_a_dash_and_its_reason() -> None:
    a = [row("s0", 1, 0.5), row("s1", 1, nan, nan, "absent")]
    b = [row("s0", 1, 0.4996), row("s1", 1, 0.5)]
    rule, line = comparison_text(compare(a, b)).splitlines()[3:5]
    assert rule.split()[3] == "-:"  # a colon alone is no column to Markdown
    expected = ["organ 1", "1", "0.500", "0.500", "0.000", *"–––––––", "1 absent in A"]
    assert columns(line) == expected


def test_a_comparison_is_written_as_csv_and_as_json(tmp_path: Path) -> None:
    b = rows_of(B)
    b[0] |= {"dice": 0.0, "hd95": inf, "status": "missed"}
    lines = compare(rows_of(A), b)
    write_table(lines, tmp_path / "compare.csv")
    write_lines(lines, tmp_path / "compare.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["compare.csv", "compare.json"]

    found = strict((tmp_path / "compare.json").read_text())
    assert [line["class"] for line in found[:4]] == [1, 2, 3, OVERALL]
    assert [line["metric"] for line in found[::4]][:3] == ["dice", "hd", "msd"]
    assert found[3]["t_p_holm"] is None
    assert (found[0]["t_p"], found[0]["better"]) == (lines[0]["t_p"], lines[0]["better"])

    with (tmp_path / "compare.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(lines)
    assert list(table[0]) == list(lines[0])
    assert [float(line["difference"]) for line in table] == [line["difference"] for line in lines]
    hd95 = next(line for line in table if line["metric"] == "hd95")
    assert strict(hd95["left_out"]) == {"missed in B": 1}
    assert hd95["n"] == "11"


def test_a_fold_table_is_text_csv_and_json(tmp_path: Path) -> None:
    lines = fold_table([("fold0", rows_of({1: [0.9, 0.7]})), ("fold1", [row("s2", 1, 0.6)])])
    table = fold_text(lines).split("\n\n")[0].splitlines()
    assert columns(table[0])[:4] == ["Dice", "fold0", "fold1", "mean of folds"]
    assert columns(table[2])[:6] == ["organ 1", "0.800", "0.600", "0.700", "0.141", "0.733"]
    assert columns(table[2])[-1] == "3"

    write_table(lines, tmp_path / "folds.csv")
    write_lines(lines, tmp_path / "folds.json")
    fold0 = strict((tmp_path / "folds.json").read_text())[0]["folds"]["fold0"]
    assert fold0 == {"mean": pytest.approx(0.8), "n": 2}
    assert (tmp_path / "folds.csv").read_text().count("\n") == 1 + len(lines)


def test_no_file_is_ever_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    write_summary(summarise(run.rows), tmp_path / "summary.json")
    before = (tmp_path / "summary.json").read_bytes()
    lines = compare(run.rows, run.rows)

    def stopped(self: Path, target: Path) -> None:
        raise OSError("stopped here")

    monkeypatch.setattr(Path, "replace", stopped)
    writes: list[Callable[[], None]] = [
        lambda: write_summary({}, tmp_path / "summary.json"),
        lambda: write_table(lines, tmp_path / "compare.csv"),
        lambda: write_lines(lines, tmp_path / "compare.json"),
    ]
    for write in writes:
        with pytest.raises(OSError, match="stopped here"):
            write()
    assert (tmp_path / "summary.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
