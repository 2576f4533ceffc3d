"""The comparison as files: comparison.json for programs, two Parquet tables for SQL.

comparison.json is the contract other programs rely on. The Parquet files hold the same facts flat: one row an artifact,
one row a tensor. Nothing here measures; every number comes from what a finished task recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from converter.errors import SourceError, said
from converter.folder import check_path

FORMAT_VERSION = 1
BATCH_ROWS = 64  # of a table that is looked at: it may unfold to more than memory
TABLES = ("comparison.parquet", "tensors.parquet")
ARTIFACT_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("target", pa.string()),
        ("format", pa.string()),
        ("scheme", pa.string()),
        ("method", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("bits_per_weight", pa.float64()),
        ("size_bytes", pa.int64()),
        ("compression_ratio", pa.float64()),
        ("weight_cosine", pa.float64()),
        ("weight_relative_mse", pa.float64()),
        ("perplexity", pa.float64()),
        ("original_perplexity", pa.float64()),
        ("kl_mean", pa.float64()),
        ("kl_median", pa.float64()),
        ("kl_p99", pa.float64()),
        ("top1_agreement", pa.float64()),
        ("embedding_cosine", pa.float64()),
        ("embedding_cosine_min", pa.float64()),
        ("neighbour_agreement", pa.float64()),
        ("hidden_relative_mse", pa.float64()),
        ("seconds", pa.float64()),
        ("peak_rss_bytes", pa.int64()),
    ]
)
# What is measured of a model's output: of one that continues text, and of one that makes embeddings.
OUTPUT = (
    *("perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement"),
    *("embedding_cosine", "embedding_cosine_min", "neighbour_agreement", "hidden_relative_mse"),
)
TENSOR_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("target", pa.string()),
        ("name", pa.string()),
        ("block", pa.int32()),
        ("shape", pa.list_(pa.int64())),
        ("type", pa.string()),
        ("size_bytes", pa.int64()),
        ("bits_per_weight", pa.float64()),
        ("cosine", pa.float64()),
        ("relative_mse", pa.float64()),
        ("output_relative_mse", pa.float64()),
        ("block_relative_mse", pa.float64()),
        ("outlier_ratio", pa.float64()),
        ("outlier_channels", pa.list_(pa.int32())),
        ("calibration_rows", pa.int64()),
        ("note", pa.string()),
    ]
)


def comparison(
    name: str, sources: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of comparison.json: `rows` in the contract's form, one a job, whatever became of it."""
    return {
        "format_version": FORMAT_VERSION,
        "name": name,
        "sources": list(sources),
        "artifacts": [{key: value for key, value in row.items() if key != "source"} for row in rows],
        "texts": dict(texts),
    }


def artifact_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """comparison.parquet: one row an artifact."""
    flat = []
    for row in rows:
        weight, output = row.get("weight", {}), row.get("output", {})
        flat.append(
            {
                **{name: row.get(name) for name in ARTIFACT_SCHEMA.names},
                "method": " + ".join(row.get("method", ())),
                "weight_cosine": weight.get("cosine"),
                "weight_relative_mse": weight.get("relative_mse"),
                **{name: output.get(name) for name in OUTPUT},
                "original_perplexity": row.get("source", {}).get("perplexity"),
            }
        )
    return pa.Table.from_pylist(flat, schema=ARTIFACT_SCHEMA)


def tensor_table(tensors: Sequence[Mapping[str, Any]]) -> pa.Table:
    """tensors.parquet: one row a tensor of an artifact; note says what was not as asked."""
    return pa.Table.from_pylist([dict(row) for row in tensors], schema=TENSOR_SCHEMA)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as Parquet under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(table, temporary, compression="zstd", write_page_index=True)
    temporary.rename(path)


def read_table(path: Path) -> int:
    """The number of rows of a table that `write_table` wrote, all of them read. Raises ValueError or OSError."""
    with pq.ParquetFile(path) as file:
        return sum(batch.num_rows for batch in file.iter_batches(BATCH_ROWS))


def read_comparison(run: Path) -> dict[str, Any] | None:
    """The comparison.json of a run; None when there is none yet. Raises SourceError when it is none of ours."""
    path = run / "comparison.json"
    if not path.is_file():
        return None
    try:
        data: Any = json.loads(path.read_text("utf-8"))
        what = "" if data["format_version"] == FORMAT_VERSION else f"it is not of format version {FORMAT_VERSION}"
        for row in () if what else data["artifacts"]:
            check_path(f"{row['model']}/{row['target']}", str(path))
            texts, numbers = [row["model"], row["target"], row["format"], row["status"]], []
            for file in row.get("files", ()):
                texts += [file["path"], file["sha256"]]
                numbers.append(file["bytes"])
            if {*map(type, texts)} - {str} or {*map(type, numbers)} - {int}:
                what = "a row of it is of another form"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"it is damaged: {said(error)}"
    if what:
        raise SourceError(str(path), what, "Run hubmill convert again, which writes it anew")
    comparison: dict[str, Any] = data
    return comparison
