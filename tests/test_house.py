"""The shape of the house: who may import whom, which vendor enters by which door, what stays pure."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("converter", "jobs", "kernels/quantkernels") for path in (ROOT / folder).rglob("*.py")
)
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

# Vendor -> the files, or folders, by which it enters.
DOORS = {
    "ray": ("jobs/cluster.py",),
    "rich": ("converter/progress.py",),
    "typer": ("converter/cli.py",),
    "pydantic": ("converter/manifest_fields.py", "converter/manifest_target.py"),
    "pydantic_core": ("converter/manifest_fields.py",),
    "yaml": ("converter/marks.py", "converter/architecture.py"),
    "huggingface_hub": (
        "converter/hub.py",
        "converter/hub_calls.py",
        "converter/hub_publish.py",
        "converter/hub_rights.py",
    ),
    "model_signing": ("converter/signing.py",),
    "cryptography": ("converter/signing.py",),
    "transformers": ("converter/skeleton.py", "converter/tokenizer.py"),
    "safetensors": ("converter/tensor_file.py", "converter/source.py", "converter/containers/"),
    "tokenizers": ("converter/containers/gguf/vocabulary/",),
    "sentencepiece": ("converter/containers/gguf/vocabulary/sentencepiece.py",),
    "google": ("converter/containers/gguf/vocabulary/sentencepiece.py",),
    "gguf": ("converter/containers/gguf/", "kernels/quantkernels/ggml/lattice.py"),
    "pyarrow": ("converter/containers/", "converter/compare/tables.py", "converter/dataset.py"),
    "jinja2": ("converter/compare/report.py",),
    "numba": ("kernels/quantkernels/",),
    "triton": ("kernels/quantkernels/",),
}
PURE = (
    "converter/architecture.py",
    "converter/expression.py",
    "converter/views.py",
    "converter/usual.py",
    "converter/provenance.py",
    "converter/adapt.py",
    "converter/stats.py",
    "converter/schemes.py",
    "converter/manifest_rules.py",
    "converter/grids/",
    "converter/methods/",
    "converter/compare/metrics.py",
    "converter/containers/packing.py",
    "converter/containers/parquet_layout.py",
    "converter/containers/parquet_rows.py",
    "converter/containers/selection.py",
    "converter/containers/gguf/choice.py",
    "converter/containers/gguf/mixing.py",
    "converter/containers/gguf/mixture.py",
    "converter/containers/gguf/operations.py",
    "jobs/task.py",
    "jobs/work.py",
    "jobs/needs.py",
    "jobs/planner.py",
    "kernels/quantkernels/",
)
IMPURE = re.compile(
    r"\bopen\(|\bos\.environ|\btime\.(time|monotonic|perf_counter)|\bdatetime\.now|\bsocket\b|\brequests\b"
    r"|\.(read_text|write_text|read_bytes|write_bytes|unlink|rename|mkdir)\(|^\s*global |\brandom\.(random|randint)"
)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("name", NAMES)
def test_vendors_enter_by_their_doors(name: str) -> None:
    for module in imports(ROOT / name):
        doors = DOORS.get(module.split(".")[0])
        assert doors is None or name.startswith(doors), f"{name} imports {module}, whose door is {doors}"


@pytest.mark.parametrize("name", NAMES)
def test_floors_know_only_what_lies_below(name: str) -> None:
    ours = {module.split(".")[0] for module in imports(ROOT / name)} & {"converter", "jobs", "quantkernels"}
    if name.startswith("kernels/"):
        assert ours <= {"quantkernels"}
    elif name.startswith("converter/") and name != "converter/cli.py":
        assert "jobs" not in ours


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(PURE)])
def test_pure_code_has_no_side_effects(name: str) -> None:
    for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), start=1):
        code = line.split("#")[0]
        if name == "converter/architecture.py" and "(folder / name).read_text" in code:
            continue  # the package's own data files
        assert not IMPURE.search(code), f"{name}:{number}: {line.strip()}"


@pytest.mark.parametrize("name", NAMES)
def test_only_progress_prints(name: str) -> None:
    if name != "converter/progress.py":
        calls = [node for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_kernels_folder_is_no_package_of_that_name() -> None:
    """transformers imports a package named kernels, Hugging Face's; ours must never be found in its place."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_that_are_installed_are_those_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = {path.parent for path in FILES if path.name == "__init__.py"} | {ROOT / "converter" / "architectures"}
    packages |= {ROOT / "converter" / "texts"}  # two folders of data
    names = {path.relative_to(ROOT).as_posix().removeprefix("kernels/").replace("/", ".") for path in packages}
    assert set(project["tool"]["setuptools"]["packages"]) == names


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: Path) -> None:
    for link, place in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text("utf-8")):
        if "://" not in link:
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name} links to {link}, which is not there"
            assert not place or place in headings(target), f"{page.name} links to {link}#{place}, which is no heading"


def headings(page: Path) -> set[str]:
    """The headings of a page as links name them; lines of examples that begin alike are taken for some."""
    found = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_readme_tree_names_what_is_there_and_nothing_else() -> None:
    tree = (ROOT / "README.md").read_text("utf-8")
    for name in ("converter", "jobs", "kernels", "manifests", "tests", "benchmarks", "docs"):
        assert f"{name}/" in tree
        assert (ROOT / name).is_dir()
    for folder in ("converter", "jobs"):
        files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        part = re.search(rf"^{folder}/ .*\n(?:  .*\n)+", tree, flags=re.MULTILINE)
        assert part and set(re.findall(r"^  ([a-z_]+\.py) ", part[0], flags=re.MULTILINE)) == files
