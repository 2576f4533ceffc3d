"""report.html: one page to decide from, which works from a memory stick: no request leaves it, no script has to run.

The template holds words and layout, `charts` draws, `choice` chooses; here figures become cells. jinja2 escapes every
value, the page forbids all loading by a content security policy, and only the one script whose hash stands in that
policy may run: a model can be named `<script>` and nothing happens.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from converter.compare import charts, choice, heat, wording
from converter.compare.charts import Point, Series

Blocks = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]

PICTURE_WIDTH, PICTURE_HEIGHT = 720.0, 420.0
ORDER = {"done": 0, "failed": 1, "skipped": 2}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table to decide from: its head, what it means, and how a row's figure is found and written."""

    head: str
    meaning: str
    value: Callable[[Mapping[str, Any]], float | None]
    text: Callable[[float | None], str]


def _output(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda row: row["output"].get(name)


def _perplexity_change(row: Mapping[str, Any]) -> float | None:
    mine, original = row["output"].get("perplexity"), row["original"].get("perplexity")
    return mine / original - 1 if mine and original else None


COLUMNS = (
    Column(
        head="bits per weight",
        meaning="8 × bytes of the weight files / number of weights",
        value=lambda row: row["bits_per_weight"],
        text=wording.figure,
    ),
    Column(
        head="size",
        meaning="the weight files, 1 MB = 1,000,000 bytes",
        value=lambda row: row["size_bytes"],
        text=wording.bytes_text,
    ),
    Column(
        head="ratio",
        meaning="bytes of the original's tensors / bytes of the weight files",
        value=lambda row: row["compression_ratio"],
        text=wording.ratio,
    ),
    Column(
        head="KL mean",
        meaning="mean KL divergence from the original, nats per token; 0 is best",
        value=_output("kl_mean"),
        text=wording.figure,
    ),
    Column(
        head="KL p99",
        meaning="KL divergence that 99 of 100 tokens stay below, nats",
        value=_output("kl_p99"),
        text=wording.figure,
    ),
    Column(
        head="same top token",
        meaning="share of positions at which the likeliest next token is the original's",
        value=_output("top1_agreement"),
        text=wording.share,
    ),
    Column(head="perplexity", meaning="per token; lower is better", value=_output("perplexity"), text=wording.figure),
    Column(
        head="change",
        meaning="of the perplexity, against the original's",
        value=_perplexity_change,
        text=wording.change,
    ),
    Column(
        head="embedding cosine",
        meaning="mean cosine between the original's embedding of a text and this one's",
        value=_output("embedding_cosine"),
        text=wording.cosine,
    ),
    Column(
        head="lowest",
        meaning="lowest of these cosines",
        value=_output("embedding_cosine_min"),
        text=wording.cosine,
    ),
    Column(
        head="same neighbour",
        meaning="share of texts whose nearest other text is the same as with the original",
        value=_output("neighbour_agreement"),
        text=wording.share,
    ),
    Column(
        head="hidden error",
        meaning="squared error of the final hidden states, relative to the original's squares",
        value=_output("hidden_relative_mse"),
        text=wording.figure,
    ),
    Column(
        head="weight cosine",
        meaning="cosine between the original's weights and the decoded ones, all matrices as one vector",
        value=lambda row: row["weight"]["cosine"],
        text=wording.cosine,
    ),
    Column(
        head="time",
        meaning="rounding and writing, without calibration and measuring",
        value=lambda row: row["seconds"],
        text=wording.duration,
    ),
    Column(
        head="peak memory",
        meaning="largest resident memory of a process that rounded, wrote or measured it",
        value=lambda row: row["peak_rss_bytes"],
        text=wording.bytes_text,
    ),
)


def report_html(comparison: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]], blocks: Blocks) -> str:
    """The report as one HTML page.

    comparison: what comparison.json holds; tensors: rows of tensors.parquet; blocks: per model and target the errors
    of each block's output.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("converter", "compare"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _script_hash
    rows, texts = comparison["artifacts"], comparison.get("texts", {})
    page: str = environment.get_template("report.html").render(
        name=wording.one_line(comparison["name"]),
        counts={status: sum(row["status"] == status for row in rows) for status in ORDER},
        models=[_model(number, source, rows, tensors, blocks) for number, source in enumerate(comparison["sources"])],
        columns=COLUMNS,
        calibration=wording.rows_of(texts.get("calibration"), "calibration"),
        evaluation=wording.rows_of(texts.get("evaluation"), "evaluation"),
        style=charts.CHART_STYLE,
        light=charts.colour_variables(charts.LIGHT),
        dark=charts.colour_variables(charts.DARK),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # half a character, which JSON can spell, is in no file


def comparison_svg(comparison: Mapping[str, Any]) -> str:
    """Size against loss as a standalone SVG picture, one chart a model; fits light and dark pages."""
    drawn, heights = [], []
    for source in comparison["sources"]:
        rows = _rows_of(source, comparison["artifacts"])
        measure, found = choice.candidates(rows)
        title = f"{wording.one_line(source['model'], 60)}: size against what is lost"
        svg = charts.scatter(
            _points(rows, found), measure, title, width=PICTURE_WIDTH, height=PICTURE_HEIGHT, title=title
        )
        if svg:
            drawn.append(svg)
            heights.append(PICTURE_HEIGHT)
    return charts.standalone(drawn, heights, PICTURE_WIDTH, "Size of each artifact against what it loses")


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _rows_of(source: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The model's rows with the original's figures in each: finished ones by size, then those that are not there."""
    rows = [{**row, "original": source} for row in artifacts if row["model"] == source["model"]]
    return sorted(rows, key=lambda row: (ORDER[row["status"]], row.get("size_bytes", 0), row["target"]))


def _points(rows: Sequence[Mapping[str, Any]], found: Sequence[choice.Candidate], links: str = "") -> list[Point]:
    """The scatter's points; colours go by the target's place in the table."""
    best = choice.front(found)
    places = {row["target"]: number for number, row in enumerate(rows)}
    return [
        Point(
            candidate=one,
            colour=places[one.target],
            on_front=one.target in best,
            link=f"#{links}{places[one.target]}" if links else "",
        )
        for one in found
    ]


def _model(
    number: int,
    source: Mapping[str, Any],
    artifacts: Sequence[Mapping[str, Any]],
    tensors: Sequence[Mapping[str, Any]],
    blocks: Blocks,
) -> dict[str, Any]:
    """What the template shows of one model."""
    name, anchor = source["model"], f"m{number}"
    shown = wording.one_line(name)
    rows = _rows_of(source, artifacts)
    measure, found = choice.candidates(rows)
    done = [row for row in rows if row["status"] == "done"]
    best = choice.front(found)
    own_tensors = [tensor for tensor in tensors if tensor["model"] == name]
    series = [
        Series(
            name=row["target"],
            colour=place,
            errors={
                block["block"]: block["relative_mse"]
                for block in blocks.get((name, row["target"]), ())
                if math.isfinite(block["relative_mse"])
            },
        )
        for place, row in enumerate(rows)
    ]
    return {
        "anchor": anchor,
        "name": shown,
        "facts": _facts(source),
        "measure": measure,
        "picks": [_pick(pick, measure) for pick in choice.picks(measure, found)],
        "scatter": charts.scatter(
            _points(rows, found, f"{anchor}-t"), measure, f"{shown}: size against {measure.name}, one mark a target"
        ),
        "lines": charts.block_lines(series, f"{shown}: error of each block's output, one line a target"),
        "columns": [
            place for place, column in enumerate(COLUMNS) if any(column.value(row) is not None for row in done)
        ],
        "rows": [_row(place, row, f"{anchor}-t{place}", best) for place, row in enumerate(rows)],
        "layers": _layer_maps(shown, [row["target"] for row in done], own_tensors),
        "outliers": _outlier_map(shown, own_tensors),
        "fragile": _fragile_table([row["target"] for row in done], own_tensors),
        "notes": [
            (row["target"], text, names)
            for row in done
            for text, names in wording.group_notes(row.get("notes", {})).items()
        ],
        "warnings": [(row["target"], text) for row in done for text in row.get("warnings", ())],
        "tokens": source.get("tokens"),
        "embeds": any("embedding_cosine" in row["output"] for row in done),
        "done": len(done),
    }


def _facts(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The original's figures, as (name, value); those that are not known are left out."""
    parameters, size = source.get("parameters"), source.get("size_bytes")
    facts = [
        ("source", wording.one_line(source.get("repo", source["source"]))),
        ("commit", wording.one_line(source.get("commit", ""))[:12]),
        ("parameters", f"{parameters:,}" if parameters else ""),
        ("size", f"{wording.bytes_text(size)}, {wording.figure(8 * size / parameters)} bits per weight")
        if size and parameters
        else ("size", ""),
        ("perplexity", f"{wording.figure(source['perplexity'])} per token" if "perplexity" in source else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _pick(pick: choice.Pick, measure: choice.Measure) -> dict[str, Any]:
    one = pick.chosen
    figures = [
        wording.bytes_text(one.size_bytes),
        f"{wording.figure(one.bits_per_weight)} bits per weight",
        f"{measure.short} {wording.figure(one.loss)}",
    ]
    return {"need": pick.need, "rule": pick.rule, "target": one.target, "figures": figures, "fits": pick.fits}


def _row(place: int, row: Mapping[str, Any], anchor: str, best: frozenset[str]) -> dict[str, Any]:
    done = row["status"] == "done"
    cells = []
    for column in COLUMNS if done else ():
        value = column.value(row)
        known = value is not None and math.isfinite(value)
        cells.append({"text": column.text(value), "sort": repr(float(value)) if known and value is not None else ""})
    made = " · ".join([str(row.get("scheme") or ""), " + ".join(row.get("method", ()))]) if done else ""
    return {
        "anchor": anchor,
        "colour": place % charts.COLOURS,
        "target": row["target"],
        "format": row["format"],
        "made": made.strip(" ·"),
        "status": row["status"],
        "error": row.get("error", ""),
        "best": row["target"] in best,
        "cells": cells,
    }


def _layer_maps(model: str, targets: Sequence[str], tensors: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    """Per target a map of the errors of its linears by block, (target, SVG), all in the same colours."""
    key = choice.error_key(tensors)
    grids = {target: heat.grid_of([one for one in tensors if one["target"] == target], key) for target in targets}
    values = [value for grid in grids.values() for value in grid.cells.values()]
    ends = charts.decades(values)
    maps = [
        (target, heat.heat_map(grid, f"{model} as {target}: error of every linear by block", ends=ends))
        for target, grid in grids.items()
    ]
    return [(target, picture) for target, picture in maps if picture]


def _outlier_map(model: str, tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far single channels of the original stand out, by block, as a picture, and the worst of them in words."""
    first = next((one["target"] for one in tensors if one.get("outlier_ratio") is not None), None)
    own = [one for one in tensors if one["target"] == first and one.get("outlier_ratio") is not None]
    grid = heat.merged(heat.grid_of(own, "outlier_ratio"))
    worst: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
    for one in sorted(own, key=lambda one: -one["outlier_ratio"]):
        channels = tuple(one["outlier_channels"])
        if channels and (one["block"], channels) not in worst and len(worst) < 5:
            worst[one["block"], channels] = {
                "name": one["name"],
                "ratio": wording.figure(one["outlier_ratio"]),
                "channels": ", ".join(map(str, channels)),
            }
    return {
        "picture": heat.heat_map(grid, f"{model}: largest channel over the median channel, by block"),
        "worst": list(worst.values()),
    }


def _fragile_table(targets: Sequence[str], tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors that rounding hurts most, and how warm each cell is: 0 at the target's median, 1 at 4 times that."""
    key = choice.error_key(tensors)
    found = choice.fragile(tensors, key)
    measured = [target for target in targets if any(target in tensor.errors for tensor in found)]
    types = {(tensor["target"], tensor["name"]): tensor["type"] for tensor in tensors}
    rows = []
    for tensor in found:
        cells = []
        for target in measured:
            times = tensor.times_by_target.get(target)
            cells.append(
                {
                    "text": wording.figure(tensor.errors.get(target)),
                    "title": f"{types.get((target, tensor.name), '')}: {wording.figure(times)} times the median"
                    if times
                    else "not rounded",
                    "warmth": round(min(1.0, max(0.0, math.log(times, 4))), 2) if times else 0,
                }
            )
        rows.append({"name": tensor.name, "times": wording.figure(tensor.times), "cells": cells})
    return {"targets": measured, "rows": rows, "of_output": key == "output_relative_mse"}
