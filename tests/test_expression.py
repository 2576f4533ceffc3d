"""Formulas over config.json: what they can say, and that nothing else of Python is within their reach."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from converter.expression import evaluate

CONFIG: dict[str, Any] = {
    "hidden_size": 96,
    "heads": 8,
    "partial": 0.5,
    "nothing": None,
    "zero": 0,
    "layer_types": ["full", "sliding"],
    "rope": {"theta": 1e4, "inner": {"factor": 4}},
}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("hidden_size // heads", 12),
        ("int(hidden_size // heads * partial)", 6),
        ("rope.inner.factor ** 2", 16),
        ("2 * heads + 1", 17),
        ("heads if layer_types[layer] == 'sliding' else 0", 8),
        ("layer in [0, 2]", False),
        ("not zero and heads > 1", True),
        ("-heads", -8),
    ],
)
def test_a_formula_has_the_value_that_it_says(formula: str, value: object) -> None:
    assert evaluate(formula, CONFIG, 1) == value


@pytest.mark.parametrize(
    "formula",
    [
        "missing",
        "nothing",
        "hidden_size // zero",
        "rope.absent + 1",
        "layer_types[7]",
        "heads + layer_types",
        "rope.theta.x",
    ],
)
def test_a_formula_that_config_json_cannot_answer_is_none(formula: str) -> None:
    assert evaluate(formula, CONFIG) is None


@pytest.mark.parametrize(
    "formula", ["__import__('os')", "heads.bit_length()", "[x for x in layer_types]", "(lambda: 1)()"]
)
def test_a_formula_cannot_reach_the_rest_of_python(formula: str) -> None:
    with pytest.raises(AssertionError, match="what formulas do not have"):
        evaluate(formula, CONFIG)


def formulas(part: object) -> list[str]:
    if isinstance(part, dict):
        return [text for value in part.values() for text in formulas(value)]
    return [step for step in part if isinstance(step, str)] if isinstance(part, list) else []


def test_every_formula_of_every_family_is_one() -> None:
    for path in (resources.files("converter") / "architectures").iterdir():
        section = yaml.safe_load(path.read_text("utf-8")).get("gguf") or {}
        for kind in ("integers", "floats", "booleans", "texts", "by_layer"):
            for formula in formulas(section.get(kind, {})):
                evaluate(formula, {}, 0)  # raises AssertionError for what formulas do not have
