"""dae/evaluation/report.py: what is written is strict, whole, and says every number that it was given."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dae.demo.phantom import body_ct
from dae.errors import InputError
from dae.evaluation import report
from dae.evaluation.cases import Case, Pair, pair, score
from dae.evaluation.report import (
    COLOURS,
    check_names,
    check_terms,
    comparison_text,
    distribution,
    figures,
    fold_text,
    overlay,
    terms_of,
    write_lines,
    write_page,
    write_summary,
    write_table,
)
from dae.evaluation.statistics import OVERALL, OVERALL_NAME, compare, fold_table, summarise
from tests.test_statistics import A, B, row, rows_of

pytestmark = pytest.mark.filterwarnings("error")
CLASSES = {1: "liver & bile", 2: "<b>spleen</b>", 3: "aorta", 4: 'vena "cava"', 5: "never there"}


def strict(text):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def picture(png):
    """(height, width, 4) in [0, 1]."""
    from matplotlib.image import imread

    return imread(io.BytesIO(png))


def colour(n):
    return [int(COLOURS[n][k : k + 2], 16) / 255 for k in (1, 3, 5)]


def places(pixels, wanted, within=0.12):
    """Where the pixels of about this colour lie: (n, 2) as shares of the height and the width."""
    return np.argwhere(np.abs(pixels[..., :3] - wanted).max(-1) < within) / pixels.shape[:2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five cases of five classes: good, missed, spurious and absent ones; rows, pairs, diagonals and the folder."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for n in range(5):
        truth = np.zeros((20, 16, 12), np.uint8)
        for cls in (1, 2, 3):
            truth[2 + 6 * (cls - 1) : 6 + 6 * (cls - 1), 4:11, 2:9] = cls
        prediction = np.roll(truth, rng.integers(-1, 2, 3) * (n > 0), (0, 1, 2))
        if n == 1:
            prediction[prediction == 3], prediction[0:2, 0:2, 0:2] = 0, 4
        for name, labels in (("labels", truth), ("predictions", prediction)):
            path = folder / name / f"case_{n}&co.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(labels, np.diag([1.5, 2.0, 3.0, 1.0])), path)
    pairs = pair(folder / "predictions", folder / "labels")
    rows, diagonals, _ = score(pairs, CLASSES)
    return rows, diagonals, pairs, folder


@pytest.fixture(scope="module")
def page(run):
    """The page's text, and where it lies."""
    rows, diagonals, pairs, folder = run
    pictures = figures(rows, pairs)
    write_page(
        rows, summarise(rows, diagonals=diagonals, tolerance=1.0), pictures, folder / "report.html"
    )
    return (folder / "report.html").read_text(encoding="utf-8"), pictures


class Reader(HTMLParser):
    """All texts, tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.attributes, self.cells = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.cells and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data.strip()


# summary.json


def test_a_summary_is_json_without_nan_or_infinity(run, tmp_path):
    rows, diagonals, _, _ = run
    summary = summarise(rows, diagonals=diagonals, tolerance={1: 1.0, 2: inf})
    write_summary(summary, tmp_path / "summary.json")
    found = strict((tmp_path / "summary.json").read_text())
    assert found["classes"]["5"]["dice"] == {
        "mean": None,
        "median": None,
        "std": None,
        "n": 0,
        "left_out": 5,
        "low": None,
        "high": None,
    }
    assert found["classes"]["3"]["status"] == {"ok": 4, "missed": 1, "spurious": 0, "absent": 0}
    assert found["classes"]["4"]["status"] == {"ok": 0, "missed": 0, "spurious": 1, "absent": 4}
    assert found["classes"]["1"]["dice"]["mean"] == summary["classes"][1]["dice"]["mean"]
    assert (found["policy"], found["definition"], found["tolerance_mm"]) == (
        "exclude",
        "default",
        {"1": 1.0, "2": None},
    )
    assert found["diagonals_mm"] == diagonals and found["cases"] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


# figures


def test_there_is_a_picture_of_all_cases_and_one_of_each_of_the_worst(page):
    pictures = page[1]
    assert (
        len(pictures) == 4 and "worst-case_1&co" in pictures and "worst-case_0&co" not in pictures
    )


def test_the_distribution_shows_a_dot_for_every_case_and_the_numbers(monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(report, "png", lambda figure, **how: kept.append(figure) or b"")
    rows = [
        row("a", 1, 0.9, 2.0),
        row("b", 1, 0.0, inf, "missed"),
        row("c", 1, nan, nan, "absent"),
        row("a", 2, 0.5, 30.0),
        row("b", 2, 0.6, 0.0),
        row("c", 2, 0.7, 500.0),
    ]
    distribution(rows)
    (figure,) = kept
    assert isinstance(figure, Figure)
    dots = [
        [
            sorted(line.get_xdata())
            for line in axes.lines
            if line.get_marker() == "o" and len(line.get_xdata())
        ]
        for axes in figure.axes
    ]
    assert dots == [[[0.0, 0.9], [0.5, 0.6, 0.7]], [[2.0], [0.0, 30.0, 500.0]]]
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [["n 2", "n 3"], ["n 1, 1 ∞", "n 3"]]
    assert figure.axes[1].get_xlim()[1] > 500
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "organ 1",
        "organ 2",
    ]


def test_a_distribution_of_nothing_is_drawn_without_a_warning():
    assert (
        picture(
            distribution([row("a", 1, nan, nan, "absent"), row("a", 2, 0.0, inf, "missed")])
        ).std()
        > 0
    )
    assert distribution([row("a", 1, 0.9)]) == distribution([row("a", 1, 0.9)])


def test_truth_is_filled_and_the_prediction_a_line():
    truth = np.zeros((30, 30, 30), np.uint8)
    truth[5:25, 5:25, 5:25] = 1
    both = picture(overlay(Case("a", truth, truth, (1.0, 1.0, 1.0)), [1]))
    missed = picture(overlay(Case("a", 0 * truth, truth, (1.0, 1.0, 1.0)), [1]))
    spurious = picture(overlay(Case("a", truth, 0 * truth, (1.0, 1.0, 1.0)), [1]))
    line = np.array(colour(0))
    assert (
        len(places(both, line)) > 300
        and len(places(spurious, line)) > 300
        and not len(places(missed, line))
    )
    blue = [(pixels[..., 2] - pixels[..., 0] > 0.1).mean() for pixels in (both, missed, spurious)]
    height, width = spurious.shape[:2]
    assert (
        spurious[height // 2, width // 6, :3].min() > 0.1 and spurious[2, 2, :3].max() == 0
    )  # organs on black
    assert blue[0] > 0.3 and blue[1] > 0.3 and blue[2] < 0.05  # what is filled takes the colour on


def test_right_and_front_of_the_patient_are_on_the_left_of_axial_coronal_and_sagittal_planes():
    truth = np.zeros((40, 40, 40), np.uint8)
    truth[2:38, 2:38, 2:38] = 1
    prediction = truth.copy()
    prediction[30:36, 4:10, 30:36] = 2  # right, posterior, superior
    found = places(
        picture(overlay(Case("a", prediction, truth, (1.0, 1.0, 1.0)), [1, 2])), colour(1)
    )
    sides = []
    for left in (0, 1 / 3, 2 / 3):
        panel = found[(found[:, 1] >= left) & (found[:, 1] < left + 1 / 3)]
        down, across = panel.mean(0)
        sides.append(
            ("top" if down < 0.5 else "bottom", "left" if across < left + 1 / 6 else "right")
        )
    assert sides == [("bottom", "left"), ("top", "left"), ("top", "right")]


def test_each_plane_is_where_most_voxels_are_wrong(monkeypatch):
    """Only there is the second class predicted at all."""
    truth = np.zeros((24, 24, 24), np.uint8)
    truth[4:20, 4:20, 4:20] = 1
    prediction = truth.copy()
    prediction[17, 5:19, 6], prediction[17, 6, 5:19], prediction[5:19, 6, 6] = 2, 2, 2
    pixels = picture(overlay(Case("a", prediction, truth, (1.0, 1.0, 1.0)), [1, 2]))
    found = places(pixels, colour(1))
    assert all(
        ((found[:, 1] >= low) & (found[:, 1] < low + 1 / 3)).sum() > 20 for low in (0, 1 / 3, 2 / 3)
    )


def test_planes_have_the_shape_they_have_in_mm():
    truth = np.zeros((40, 40, 10), np.uint8)
    truth[10:30, 10:30, 2:8] = 1
    flat, cube = (
        places(picture(overlay(Case("a", truth, truth, (1.0, 1.0, mm)), [1])), colour(0))
        for mm in (1.0, 4.0)
    )
    pixel = {}
    for name, mm in (("flat", 1.0), ("cube", 4.0)):
        image = picture(overlay(Case("a", truth, truth, (1.0, 1.0, mm)), [1]))
        at = np.argwhere(np.abs(image[..., :3] - colour(0)).max(-1) < 0.12)
        middle = at[(at[:, 1] > image.shape[1] * 0.36) & (at[:, 1] < image.shape[1] * 0.64)]
        pixel[name] = np.ptp(middle[:, 0]) / np.ptp(middle[:, 1])
    assert len(flat) and len(cube)
    assert pixel["flat"] == pytest.approx(6 / 20, rel=0.15) and pixel["cube"] == pytest.approx(
        24 / 20, rel=0.15
    )


def test_a_perfect_case_and_an_empty_one_are_drawn_too():
    image, labels = body_ct(np.random.default_rng(0), size=(32, 32, 32))
    assert (
        picture(overlay(Case("a", labels, labels, (1.5, 1.5, 1.5)), range(1, 9), image)).std()
        > 0.05
    )
    assert overlay(Case("a", 0 * labels, 0 * labels, (1.5, 1.5, 1.5)), [1])


def test_an_image_lies_under_its_overlay_if_it_is_on_the_labels_grid(run, tmp_path):
    rows, _, pairs, _ = run
    case = "case_1&co"
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None], (20, 16, 12))
    drawn = {}
    for name, affine in (
        ("same", np.diag([1.5, 2.0, 3.0, 1.0])),
        ("other", np.diag([1.0, 2.0, 3.0, 1.0])),
    ):
        nib.save(nib.Nifti1Image(ramp, affine), tmp_path / f"{name}.nii")
        found = figures(rows, pairs, images={case: tmp_path / f"{name}.nii"})
        drawn[name] = found[f"worst-{case}"]
    assert drawn["same"] != drawn["other"] == figures(rows, pairs)[f"worst-{case}"]


# the page


def test_the_page_needs_nothing_beside_itself(page):
    text, pictures = page
    reader = Reader(text)
    sources = [
        value
        for name, value in reader.attributes
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert len(sources) == len(pictures) and all(
        value.startswith("data:image/png;base64,") for value in sources
    )
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    without = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\(|file:", without)


def test_the_page_names_every_case_and_every_class_as_text(page, run):
    text, _ = page
    reader = Reader(text)
    shown = " ".join(reader.texts)
    for name in (*CLASSES.values(), *(each.case for each in run[2])):
        assert name in shown
    assert "b" not in [tag for tag in reader.tags if tag == "spleen"] and "<b>spleen" not in text
    assert "&lt;b&gt;spleen&lt;/b&gt;" in text and "liver &amp; bile" in text


def test_the_page_has_the_numbers_of_the_summary(page, run):
    rows = run[0]
    summary, cells = summarise(rows), Reader(page[0]).cells
    for cls in (1, 2, 3):
        scores = summary["classes"][cls]
        at = cells.index(CLASSES[cls])
        statuses, dice, median, n, hd95, _, n_hd95 = cells[at + 1 : at + 8]
        assert statuses == ", ".join(f"{n} {status}" for status, n in scores["status"].items() if n)
        assert (
            dice
            == f"{scores['dice']['mean']:.3f}\n{scores['dice']['low']:.3f} to {scores['dice']['high']:.3f}"
        )
        assert (median, n) == (f"{scores['dice']['median']:.3f}", str(scores["dice"]["n"]))
        assert hd95.startswith(f"{scores['hd95']['mean']:.2f}\n") and n_hd95 == str(
            scores["hd95"]["n"]
        )
    assert (
        cells[cells.index("aorta") + 1] == "4 ok, 1 missed"
        and cells[cells.index("aorta") + 7] == "4"
    )
    assert cells[cells.index("never there") + 1 :][:4] == ["5 absent", "–\n–", "–", "0"]
    overall = f"{summary['mean_of_cases']['dice']['mean']:.3f}"
    assert overall in cells[cells.index(OVERALL_NAME) + 2] and overall in "".join(
        Reader(page[0]).texts[:20]
    )


def test_the_page_has_the_dice_of_every_case(page, run):
    cells = Reader(page[0]).cells
    for case in (each.case for each in run[2]):
        its = [each for each in run[0] if each["case"] == case]
        expected = [
            f"{each['dice']:.3f}" if each["status"] == "ok" else each["status"] for each in its
        ]
        assert cells[cells.index(case) + 1 :][:5] == expected


def test_the_lowest_cases_come_first_and_say_what_is_wrong(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page[0])
    means = [float(re.search(r"mean Dice ([\d.]+)", caption)[1]) for caption in captions]
    assert len(captions) == 3 and means == sorted(means)
    assert captions[0].startswith("<b>case_1&amp;co</b>") and "aorta missed" in captions[0]
    assert "vena &quot;cava&quot; spurious" in captions[0]


@pytest.mark.parametrize(
    "policy, words", [("exclude", "no distance: n is how many"), ("diagonal", "volume's diagonal")]
)
def test_the_page_says_how_its_numbers_were_taken(run, page, policy, words, tmp_path):
    rows, diagonals, _, _ = run
    summary = summarise(rows, policy=policy, diagonals=diagonals, definition="medpy", tolerance=2.5)
    write_page(rows, summary, page[1], tmp_path / "page.html")
    shown = " ".join(" ".join(Reader((tmp_path / "page.html").read_text()).texts).split())
    for phrase in (
        f"definition medpy, averages by policy {policy}",
        words,
        "within 2.5 mm",
        "both directions pooled",
        "5 cases, 5 classes",
        "percentile bootstrap",
    ):
        assert phrase in shown


def test_the_page_is_legible_in_light_and_in_dark(page):
    """Contrast (WCAG 2) of both inks on both grounds is at least 4.5, and of the figure's on each at least 3."""
    style = re.search(r"<style>(.*?)</style>", page[0], re.S)[1]
    light, dark = (
        dict(re.findall(r"--(\w+):(#\w+)", part))
        for part in style.split("@media(prefers-color-scheme:dark)")
    )
    dark = {name: dark[name] for name in light}

    def luminance(code):
        code = code if len(code) == 7 else "#" + "".join(2 * digit for digit in code[1:])
        parts = np.array([int(code[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        assert (
            min(
                contrast(theme[ink], theme[ground])
                for ink in ("ink", "soft")
                for ground in ("back", "card")
            )
            > 4.4
        )
        assert contrast(report.INK, theme["back"]) > 3


def test_one_perfect_case_makes_a_page(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    for name in ("p.nii", "t.nii"):
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / name)
    pairs = [Pair("p", tmp_path / "p.nii", tmp_path / "t.nii")]
    rows = score(pairs, {1: "a", 2: "b"}).rows
    write_page(rows, summarise(rows), figures(rows, pairs), tmp_path / "page.html")
    assert "1.000\n–" in Reader((tmp_path / "page.html").read_text()).cells


# a comparison


def columns(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def terms(folder, *, labels=("a", "b"), mm=20.0, **other):
    """What `eval.py score` leaves beside scores.csv, of two cases whose label maps have these contents."""
    rows = [row("s1", 1, 0.5), row("s2", 1, 0.6), row("s1", 2, 0.5), row("s2", 2, 0.6)]
    summary = summarise(rows, diagonals={"s1": mm, "s2": 30.0}, **other)
    folder.mkdir()
    write_summary({**summary, "labels": dict(zip(("s1", "s2"), labels))}, folder / "summary.json")
    return str(folder), terms_of(folder / "scores.csv")


@pytest.mark.parametrize(
    "a, b, word",
    [
        ({}, {"definition": "medpy"}, "different --definition: default and medpy"),
        ({}, {"ignore": 9}, "different --ignore: None and 9"),
        ({}, {"tolerance": 2.0}, "different --tolerance: 1.0 and 2.0 mm for organ"),
        ({}, {"tolerance": {1: 1.0, 2: 3.0}}, "different --tolerance: 1.0 and 3.0 mm for organ 2"),
        ({}, {"labels": ("a", "x")}, "against different label maps of case s2"),
        ({}, {"mm": 40.0}, "against different label maps of case s1"),
    ],
)
def test_scores_made_in_another_way_are_not_compared(tmp_path, a, b, word):
    runs = [terms(tmp_path / "a", **a), terms(tmp_path / "b", **b)]
    for some in (runs, [terms(tmp_path / "first", **a), *runs]):
        with pytest.raises(InputError, match=word) as error:
            check_terms(some)
        assert str(tmp_path / "a") in str(error.value) or str(tmp_path / "first") in str(
            error.value
        )


def test_scores_of_one_number_under_two_names_are_not_compared(tmp_path):
    """A name that is the number alone, as of labels without a list, is none."""
    named = [("kidney", "a"), ("tumour", "b"), ("1", "c"), ("Kidney", "d")]
    runs = {at: (at, {"classes": {"1": {"name": name}}, "labels": {}}) for name, at in named}
    with pytest.raises(
        InputError, match="a and b: label 1 is kidney in one and tumour in the other"
    ):
        check_names("a", "b", runs["a"][1]["classes"], runs["b"][1]["classes"])
    for other in "cd":
        check_names("a", other, runs["a"][1]["classes"], runs[other][1]["classes"])


def test_scores_made_in_one_way_are_compared_without_a_word(tmp_path):
    same = [
        terms(tmp_path / "a", tolerance=2.0),
        terms(tmp_path / "b", tolerance={1: 2.0, 2: 2.0}, policy="diagonal"),
    ]
    assert check_terms(same) == ""  # the policy changes no row
    rounded = [terms(tmp_path / "c"), terms(tmp_path / "d", mm=20.0001)]
    assert check_terms(rounded) == ""
    one, other = terms(tmp_path / "e"), terms(tmp_path / "f", labels=("x", "y"))
    elsewhere = {**other[1], "labels": {"s3": "x", "s4": "y"}}
    assert check_terms([one, ("other cases", elsewhere)]) == ""  # folds have other cases
    assert check_terms([one]) == ""


def test_scores_that_do_not_tell_how_they_were_made_are_named_in_one_line(tmp_path):
    told = terms(tmp_path / "a")
    silent = {
        key: value for key, value in told[1].items() if key != "labels"
    }  # as summaries of before
    for unknown in (silent, terms_of(tmp_path / "nowhere" / "scores.csv")):
        warning = check_terms([told, ("old", unknown)])
        assert warning.startswith("warning: old: ") and "\n" not in warning
    with pytest.raises(InputError, match="--definition"):
        check_terms([("old", {**silent, "definition": "medpy"}), told])
    for content in ("{", "[]", '{"cases": 2}'):
        (tmp_path / "summary.json").write_text(content)
        assert terms_of(tmp_path / "scores.csv") == {}


def test_the_text_of_a_comparison_is_an_aligned_table_for_each_metric():
    lines = compare(rows_of(A), rows_of(B))
    text = comparison_text(lines, a="runs/a", b="runs/b")
    first, *tables = text.strip().split("\n\n")
    assert first == "A is runs/a, B is runs/b." and len(tables) == 4
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
        assert re.fullmatch(r"\| -+ (\| -+: )+\|", table.splitlines()[1])
    head, _, *body = map(columns, tables[0].splitlines())
    assert head[:5] == ["Dice", "n", "A", "B", "B - A"] and [line[0] for line in body[-1:]] == [
        OVERALL_NAME
    ]
    line = next(line for line in lines if (line["metric"], line["class"]) == ("dice", 3))
    cells = next(cells for cells in body if cells[0] == "organ 3")
    assert cells[1:6] == [
        "12",
        f"{line['mean_a']:.3f}",
        f"{line['mean_b']:.3f}",
        f"{line['difference']:.3f}",
        f"{line['low']:.3f} to {line['high']:.3f}",
    ]
    assert cells[6] == "<0.001" and line["t_p"] < 0.001


def test_what_could_not_be_tested_is_a_dash_and_its_reason():
    lines = compare(
        [row("s0", 1, 0.5), row("s1", 1, nan, nan, "absent")],
        [row("s0", 1, 0.4996), row("s1", 1, 0.5)],
    )
    rule, line = comparison_text(lines).splitlines()[3:5]
    assert rule.split()[3] == "-:"  # a colon alone is no column to Markdown
    cells = columns(line)
    assert cells == [
        "organ 1",
        "1",
        "0.500",
        "0.500",
        "0.000",
        "–",
        "–",
        "–",
        "–",
        "–",
        "1 absent in A",
    ]


def test_a_comparison_is_written_as_csv_and_as_json(tmp_path):
    b = rows_of(B)
    b[0] |= {"dice": 0.0, "hd95": inf, "status": "missed"}
    lines = compare(rows_of(A), b)
    write_table(lines, tmp_path / "compare.csv")
    write_lines(lines, tmp_path / "compare.json")
    found = strict((tmp_path / "compare.json").read_text())
    assert [line["class"] for line in found[:4]] == [1, 2, 3, OVERALL] and found[3][
        "t_p_holm"
    ] is None
    assert found[0]["t_p"] == lines[0]["t_p"] and found[0]["better"] == lines[0]["better"]
    with (tmp_path / "compare.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(lines) and list(table[0]) == list(lines[0])
    assert [float(line["difference"]) for line in table] == [line["difference"] for line in lines]
    hd95 = next(line for line in table if line["metric"] == "hd95")
    assert strict(hd95["left_out"]) == {"missed in B": 1} and hd95["n"] == "11"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["compare.csv", "compare.json"]


def test_a_fold_table_is_text_csv_and_json(tmp_path):
    lines = fold_table([("fold0", rows_of({1: [0.9, 0.7]})), ("fold1", [row("s2", 1, 0.6)])])
    table = fold_text(lines).split("\n\n")[0].splitlines()
    assert columns(table[0])[:4] == ["Dice", "fold0", "fold1", "mean of folds"]
    assert columns(table[2])[:6] == ["organ 1", "0.800", "0.600", "0.700", "0.141", "0.733"]
    assert columns(table[2])[-1] == "3"
    write_table(lines, tmp_path / "folds.csv")
    write_lines(lines, tmp_path / "folds.json")
    assert strict((tmp_path / "folds.json").read_text())[0]["folds"]["fold0"] == {
        "mean": pytest.approx(0.8),
        "n": 2,
    }
    assert (tmp_path / "folds.csv").read_text().count("\n") == 1 + len(lines)


def test_no_file_is_ever_half_written(tmp_path, monkeypatch, run):
    rows, _, _, _ = run
    write_summary(summarise(rows), tmp_path / "summary.json")
    before = (tmp_path / "summary.json").read_bytes()

    def stopped(self, target):
        raise OSError("stopped here")

    monkeypatch.setattr(Path, "replace", stopped)
    for write in (
        lambda: write_summary({}, tmp_path / "summary.json"),
        lambda: write_table(compare(rows, rows), tmp_path / "compare.csv"),
        lambda: write_lines(compare(rows, rows), tmp_path / "compare.json"),
    ):
        with pytest.raises(OSError, match="stopped here"):
            write()
    assert (tmp_path / "summary.json").read_bytes() == before and not (
        tmp_path / "compare.csv"
    ).exists()
