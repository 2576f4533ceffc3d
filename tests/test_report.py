"""The report: what it says, what it lets through, and the choices and charts in it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.compare import charts, choice, wording
from converter.compare.choice import Candidate
from converter.compare.report import COLUMNS, comparison_svg, report_html
from measured_rows import HOSTILE, Page, comparison_of, output_of, row_of, rows

SVG = "{http://www.w3.org/2000/svg}"


def tensors_of(model: str, targets: tuple[str, ...], known: bool = True) -> list[dict[str, Any]]:
    """Rows of tensors.parquet for six tensors; the fourth is three times as hard to round as the others."""
    return [
        {
            "model": model,
            "target": target,
            "name": f"model.layers.{place}.mlp.down_proj.weight",
            "block": place,
            "shape": [8, 8],
            "type": "int4",
            "size_bytes": 64,
            "bits_per_weight": 8.0,
            "cosine": 0.99,
            "relative_mse": coarse * (1 + place / 100) * (3 if place == 3 else 1),
            "output_relative_mse": coarse * (1 + place / 100) * (3 if place == 3 else 1) if known else None,
            "note": "",
        }
        for coarse, target in zip((1e-6, 1e-4, 1e-1), targets, strict=False)
        for place in range(6)
    ]


def blocks_of(model: str, targets: tuple[str, ...]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    return {
        (model, target): [{"block": block, "relative_mse": 10.0 ** -(place + 2), "cosine": 0.9} for block in range(4)]
        for place, target in enumerate(targets)
    }


def page_of(artifacts: list[dict[str, Any]], model: str = "small", known: bool = True) -> Page:
    targets = tuple(row["target"] for row in artifacts if row["status"] == "done")
    blocks = blocks_of(model, targets) if known else {}
    found = comparison_of(artifacts, model, known)
    return Page(report_html(found, tensors_of(model, targets, known), blocks))


def test_page_is_well_formed_and_its_links_lead_somewhere() -> None:
    page = page_of(rows())
    assert page.crossed == [] and page.open == []
    anchors = page.attributes("id")
    assert len(anchors) == len(set(anchors))
    assert {link.removeprefix("#") for link in page.attributes("href")} <= set(anchors)
    assert set(page.attributes("aria-labelledby")) <= set(anchors)


def test_page_asks_for_nothing_from_anywhere() -> None:
    text = report_html(comparison_of(rows()), [], {})
    page = Page(text)
    assert page.tags.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    assert page.attributes("src") == []
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert not re.search(r"@import|url\(|//[a-z]+\.[a-z]|fetch\(|XMLHttp", text)


def test_only_the_reports_own_script_may_run() -> None:
    page = page_of(rows())
    (policy,) = [found["content"] for _, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_names_are_shown_and_do_nothing() -> None:
    artifacts = [row | {"model": HOSTILE} for row in rows()]
    artifacts[0] |= {"target": HOSTILE, "scheme": HOSTILE, "method": [HOSTILE], "notes": {HOSTILE: HOSTILE}}
    artifacts[0] |= {"warnings": [HOSTILE]}
    artifacts[-1] |= {"error": HOSTILE, "format": HOSTILE}
    done = tuple(row["target"] for row in artifacts if row["status"] == "done")
    tensors = [tensor | {"name": HOSTILE, "type": HOSTILE} for tensor in tensors_of(HOSTILE, done)]
    found = comparison_of(artifacts, HOSTILE) | {"name": HOSTILE}
    found["texts"]["evaluation"]["text"] = f"hub:{HOSTILE}"
    page = Page(report_html(found, tensors, blocks_of(HOSTILE, done)))
    harmless = [row_of("q8-0", "gguf", "Q8_0", 8.5, 0.1, notes={"a": "b"}, warnings=["c"]), *rows()[1:]]
    assert page.tags == page_of(harmless).tags
    assert len(page.scripts) == 1
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert page.crossed == [] and page.open == []
    assert page.text.count("<script>alert(1)</script>") > 5


def test_every_figure_of_every_finished_artifact_is_in_the_table() -> None:
    page = page_of(rows())
    original = {"original": comparison_of([])["sources"][0]}
    for row in rows():
        if row["status"] == "done":
            for column in COLUMNS:
                value = column.value(row | original)
                assert value is None or column.text(value) in page.text
    for head in (
        "bits per weight",
        "KL mean",
        "KL p99",
        "same top token",
        "perplexity",
        "weight cosine",
        "peak memory",
    ):
        assert head in page.text


def test_artifacts_stand_smallest_first_and_missing_ones_last_with_the_reason() -> None:
    page = page_of(rows())
    anchors = [found["data-target"] for tag, found in page.elements if tag == "tr" and "data-target" in found]
    assert anchors == ["int2", "q4-k-m", "w4a16", "q8-0", "w8a8", "broken", "later"]
    assert "failed : block 3: not finite" in page.text
    assert "skipped : left out by --only" in page.text
    assert "1 failed" in page.text


def test_figures_say_how_they_were_measured_without_naming_folders() -> None:
    page = page_of(rows())
    assert "4,080 predicted tokens: 16 rows of 256 tokens from the file held-out.txt" in page.text
    assert "32 rows of 256 tokens from the built-in calibration text" in page.text
    assert "someone" not in page.text


def test_model_that_could_not_be_run_is_compared_by_its_weights() -> None:
    page = page_of(rows(known=False), known=False)
    assert "relative squared error of the weights" in page.text
    assert "could not be run" in page.text
    heads = [found["title"] for tag, found in page.elements if tag == "th" and "title" in found]
    assert not any("perplexity" in head for head in heads)
    assert "what the tensor computes" not in page.text


def test_what_readers_do_otherwise_is_told_by_target() -> None:
    warned = row_of("q8-0", "gguf", "Q8_0", 8.5, 0.1, warnings=["tokens are left out: <picture>"])
    assert "Not as asked q8-0: tokens are left out: <picture>." in page_of([warned, *rows()[1:]]).text
    assert "Not as asked" not in page_of(rows()).text


def test_run_without_any_artifact_still_has_a_report() -> None:
    gone = [row for row in rows() if row["status"] != "done"]
    found = comparison_of(gone) | {"sources": [{"model": "small", "source": "hub"}], "texts": {}}
    page = Page(report_html(found, [], {}))
    assert page.crossed == []
    assert "0 of 2 artifacts are done" in page.text
    ElementTree.fromstring(comparison_svg(found))


def test_unfinished_rows_of_another_model_stay_with_it() -> None:
    found = comparison_of(rows())
    found["sources"].append({"model": "other", "source": "hub"})
    found["artifacts"].append(
        {"model": "other", "target": "q8", "format": "gguf", "status": "skipped", "error": "none"}
    )
    page = Page(report_html(found, [], {}))
    links = [found["id"] for tag, found in page.elements if tag == "tr" and "id" in found]
    assert links.count("m1-t0") == 1 and len(links) == 8


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
    return [
        Candidate(
            target=f"t{place}",
            format="gguf",
            scheme="Q4_0",
            size_bytes=size,
            bits_per_weight=float(size),
            loss=loss / 10,
        )
        for place, (size, loss) in enumerate(sizes)
    ]


@given(candidates())
def test_front_is_what_nothing_beats_and_beats_all_the_rest(found: list[Candidate]) -> None:
    def at_least(one: Candidate, other: Candidate) -> bool:
        return one.size_bytes <= other.size_bytes and one.loss <= other.loss

    front = choice.front(found)
    inside = [one for one in found if one.target in front]
    for one in found:
        better = [other for other in inside if at_least(other, one) and not at_least(one, other)]
        assert bool(better) == (one.target not in front)


@given(candidates(), st.sampled_from([0.05, 0.3, 2.0]))
def test_picks_keep_to_their_rules(found: list[Candidate], limit: float) -> None:
    measure = choice.Measure(name="loss", short="loss", unit="nats", near=limit, usable=10 * limit)
    first = choice.picks(measure, found)[0]
    within = [one for one in found if one.loss <= limit]
    assert first.fits == bool(within)
    expected = min(one.size_bytes for one in within) if within else None
    assert first.chosen.size_bytes == expected if within else first.chosen.loss == min(one.loss for one in found)


def test_each_need_gets_its_artifact() -> None:
    measure, found = choice.candidates(rows())
    chosen = {pick.need: (pick.chosen.target, pick.fits) for pick in choice.picks(measure, found)}
    assert chosen == {
        "Close to the original": ("w4a16", True),
        "Small and still usable": ("q4-k-m", True),
        "Best with 4 bits": ("w4a16", True),
        "On a CPU, laptop or phone": ("q8-0", True),
        "On a GPU server": ("w4a16", True),
        "For data analysis in SQL": ("int2", False),
    }
    assert choice.front(found) == {"int2", "q4-k-m", "w4a16", "q8-0"}


def test_every_format_has_a_home_and_every_scheme_its_bits() -> None:
    from converter.schemes import SCHEMES, STORES

    at_home = [format for formats in choice.HOMES.values() for format in formats]
    assert sorted(at_home) == sorted(STORES) and set(charts.SHAPES) <= set(STORES)
    for schemes in SCHEMES.values():
        for name, scheme in schemes.items():
            assert choice.bits_of(name) == scheme.bits
    assert [choice.bits_of(name) for name in ("Q4_K_M", "Q8_0", "BF16", "odd")] == [4, 8, 16, None]


def test_artifact_whose_loss_is_not_finite_is_never_chosen() -> None:
    made = [row_of("bad", "gguf", "Q4_0", 1.0, math.nan), row_of("good", "gguf", "Q8_0", 9.0, 0.001)]
    measure, found = choice.candidates(made)
    assert [one.target for one in found] == ["good"]
    assert {pick.chosen.target for pick in choice.picks(measure, found)} == {"good"}
    assert Page(report_html(comparison_of(made), [], {})).crossed == []


def test_tensor_that_is_hard_to_round_comes_first_whatever_the_targets_scale() -> None:
    tensors = tensors_of("small", ("fine", "middle", "coarse"))
    worst = choice.fragile(tensors, choice.error_key(tensors))[0]
    assert worst.name == "model.layers.3.mlp.down_proj.weight"
    assert worst.times == pytest.approx(3.09 / 1.03, rel=1e-6)
    assert list(worst.errors) == ["fine", "middle", "coarse"]


def test_tensors_that_were_kept_are_not_fragile() -> None:
    tensors = tensors_of("small", ("fine",))
    tensors[0] |= {"output_relative_mse": 0.0}
    tensors[1] |= {"output_relative_mse": None}
    names = [one.name for one in choice.fragile(tensors, "output_relative_mse")]
    assert len(names) == 4


def marks(svg: str) -> dict[str, tuple[float, float]]:
    """Where each artifact's mark stands, by its target."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        said, mark = group.find(f"{SVG}title"), group.find(f"{SVG}path")
        if said is not None and mark is not None:
            at = re.match(r"M([\d.]+) ([\d.]+)", mark.attrib["d"])
            assert at and said.text
            found[said.text.split(":")[0]] = (float(at[1]), float(at[2]))
    return found


def test_picture_stands_alone_and_shows_every_finished_artifact() -> None:
    svg = comparison_svg(comparison_of(rows()))
    assert set(marks(svg)) == {"q8-0", "q4-k-m", "w4a16", "w8a8", "int2"}
    assert "href" not in svg and "<script" not in svg and "var(--" in svg
    for colour in re.findall(r"var\((--\w+)\)", svg):
        assert f"{colour}:#" in svg


def test_larger_is_further_right_and_worse_is_higher() -> None:
    made = {row["target"]: row for row in rows() if row["status"] == "done"}
    places = marks(comparison_svg(comparison_of(rows())))
    for one, other in itertools.permutations(made, 2):
        if made[one]["bits_per_weight"] < made[other]["bits_per_weight"]:
            assert places[one][0] < places[other][0]
        if made[one]["output"]["kl_mean"] > made[other]["output"]["kl_mean"]:
            assert places[one][1] < places[other][1]


def test_hostile_names_leave_the_picture_well_formed() -> None:
    artifacts = [row | {"model": HOSTILE, "target": f"{place}{HOSTILE}"} for place, row in enumerate(rows())]
    picture = ElementTree.fromstring(comparison_svg(comparison_of(artifacts, HOSTILE)))
    assert {element.tag.removeprefix(SVG) for element in picture.iter()} <= {
        "svg", "style", "rect", "text", "line", "path", "g", "title", "circle", "polyline"
    }  # fmt: skip


def test_artifact_without_any_loss_lies_on_the_bottom_line() -> None:
    made = [row_of("bf16", "gguf", "BF16", 16.0, 0.0), row_of("q8", "gguf", "Q8_0", 8.5, 0.001)]
    places = marks(comparison_svg(comparison_of(made)))
    assert places["bf16"][1] > places["q8"][1]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_axis_holds_what_is_not_too_small(values: list[float]) -> None:
    low, high = charts.decades(values)
    assert 0 < high - low <= charts.MOST_DECADES
    assert max(values) <= 10.0**high * (1 + 1e-9) or max(values) == 0


@given(st.lists(st.floats(0, 300), min_size=1, max_size=10))
def test_labels_of_lines_keep_apart_in_order(wanted: list[float]) -> None:
    found = charts.spread(wanted, 14, 0, 300)
    pairs = sorted(zip(wanted, found, strict=True))
    assert [place for _, place in pairs] == sorted(found)
    assert all(after - before >= 14 - 1e-6 for before, after in itertools.pairwise(sorted(found)))
    assert min(found) >= -1e-6 and max(found) <= 300 + 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3805.88, "3,806"), (5.5069, "5.51"), (0.00118935, "0.00119"), (2.3426e-5, "2.34e-5"), (0, "0"), (16, "16.0"),
        (999.6, "1,000"), (None, "–"), (math.inf, "–"), (math.nan, "–"), (-0.5, "-0.500"),
    ],
)  # fmt: skip
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert wording.figure(value) == text


def test_only_an_exact_cosine_is_written_as_one() -> None:
    assert (wording.cosine(1.0), wording.cosine(0.9999999), wording.cosine(0.99868)) == ("1", "0.99999", "0.99868")


def test_spans_and_sizes_read_naturally() -> None:
    assert [wording.duration(s) for s in (0.907, 31.9, 725, 12_000)] == [
        "0.907 s",
        "31.9 s",
        "12 min 5 s",
        "3 h 20 min",
    ]
    assert [wording.bytes_text(b) for b in (7, 2_888_960, 999_600, 5e13)] == ["7.00 B", "2.89 MB", "1.00 MB", "50.0 TB"]
    assert wording.change(0.00123) == "+0.12 %" and wording.change(-0.34) == "-34 %"


@given(st.text(max_size=300))
def test_shown_text_has_no_line_ends_and_no_control_marks(text: str) -> None:
    shown = wording.one_line(text)
    assert len(shown) <= 200
    assert shown.isprintable()


def test_perplexity_change_is_against_the_models_own_original() -> None:
    made = [row_of("q8", "gguf", "Q8_0", 8.5, 0.25)]
    assert output_of(0.25)["perplexity"] == 25.0
    assert "+25 %" in page_of(made).text
