"""What the report shows layer by layer: heat maps of errors, and channels that stand out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import torch

from converter import manifest as manifests
from converter.compare import heat
from converter.compare.metrics import MOST_CHANNELS, outliers
from converter.progress import Event
from jobs.convert import Run, convert
from small_run import TARGETS, write_manifest, write_model

SVG = "{http://www.w3.org/2000/svg}"


class Quiet:
    """A display of nothing."""

    def show(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


def row(name: str, block: int | None, error: float | None) -> dict[str, Any]:
    return {"name": name, "block": block, "error": error}


def test_a_channel_far_above_the_others_is_named_with_its_ratio() -> None:
    inputs_NI = torch.ones(50, 32) * torch.linspace(0.5, 1.5, 32)
    inputs_NI[7, 3], inputs_NI[9, 20] = -40.0, 10.0
    found = outliers(inputs_NI)
    middle = float(inputs_NI.abs().amax(0).median())
    assert found.channels == (3, 20)
    assert found.ratio == pytest.approx(40 / middle)


def test_even_channels_name_none_and_dark_inputs_are_no_outliers() -> None:
    assert outliers(torch.ones(4, 16)).channels == ()
    assert outliers(torch.ones(4, 16)).ratio == 1
    nothing = outliers(torch.zeros(4, 16))
    assert (nothing.ratio, nothing.channels) == (1.0, ())
    lonely = torch.zeros(4, 16)
    lonely[0, 5] = 1
    assert math.isinf(outliers(lonely).ratio) and outliers(lonely).channels[0] == 5
    assert len(outliers(torch.cat([torch.ones(4, 30), 100 * torch.ones(4, 14)], 1)).channels) == MOST_CHANNELS


def test_experts_share_a_row_in_which_the_worst_stands() -> None:
    tensors = [
        row("model.layers.1.mlp.experts.0.up_proj.weight", 1, 0.1),
        row("model.layers.1.mlp.experts.11.up_proj.weight", 1, 0.3),
        row("model.layers.0.self_attn.q_proj.weight", 0, 0.2),
        row("model.embed_tokens.weight", None, 0.9),
        row("model.layers.0.self_attn.k_proj.weight", 0, None),
    ]
    grid = heat.grid_of(tensors, "error")
    assert grid.rows == ("mlp.experts.*.up_proj", "self_attn.q_proj")
    assert grid.cells == {("mlp.experts.*.up_proj", 1): 0.3, ("self_attn.q_proj", 0): 0.2}


def test_rows_with_the_same_figures_are_merged() -> None:
    tensors = [row(f"h.{b}.attn.{name}.weight", b, 2.0 + b) for b in range(3) for name in ("q", "k", "v")]
    tensors += [row(f"h.{b}.mlp.up.weight", b, 1.0) for b in range(3)]
    grid = heat.merged(heat.grid_of(tensors, "error"))
    assert grid.rows == ("attn.q, attn.k, attn.v", "mlp.up")
    assert grid.cells["attn.q, attn.k, attn.v", 2] == 4.0


def test_a_map_has_a_cell_for_each_value_and_stronger_ones_for_larger() -> None:
    tensors = [row(f"h.{b}.{name}.weight", b, 10.0 ** -(b + 1)) for b in range(4) for name in ("a<b", "c")]
    picture = ElementTree.fromstring(heat.heat_map(heat.grid_of(tensors, "error"), "errors <&> more"))
    cells = [one for one in picture.iter() if one.tag.endswith("rect") and len(one)]
    assert len(cells) == 8
    strengths = [float(one.attrib["fill-opacity"]) for one in cells[:4]]
    assert strengths == sorted(strengths, reverse=True) and len(set(strengths)) == 4
    assert "block 0 a<b: 0.100" in [one[0].text for one in cells]
    assert heat.heat_map(heat.Grid(rows=(), blocks=(), cells={}), "nothing") == ""


def test_a_run_tells_its_outliers_and_blocks_in_the_table_and_in_pictures(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_manifest(tmp_path, {name: TARGETS[name] for name in ("w4a16", "int8")})
    run = Run(manifest=manifests.load(tmp_path / "small.yaml"), out=tmp_path / "out", executor="inprocess")
    assert convert(run, Quiet()).exit_code == 0
    out = tmp_path / "out" / "small"
    rows = pq.read_table(out / "tensors.parquet").to_pylist()
    linears = [one for one in rows if one["block"] is not None and len(one["shape"]) == 2]
    assert len(linears) == 2 * 2 * 7
    assert all(one["outlier_ratio"] >= 1 and one["block_relative_mse"] > 0 for one in linears)
    assert all(one["outlier_ratio"] is None and one["outlier_channels"] == [] for one in rows if one["block"] is None)
    shared = {
        (one["target"], one["block"], one["outlier_ratio"]) for one in linears if "self_attn.o" not in one["name"]
    }
    assert len({key[2] for key in shared if key[0] == "int8"}) == 2 * 3, (
        "q, k and v read one hidden state, gate and up too"
    )
    page = (out / "report.html").read_text()
    assert page.count('class="heat"') > 2 * 14
    assert "Outlier channels" in page
    assert json.loads((out / "comparison.json").read_text())["artifacts"][0]["status"] == "done"
