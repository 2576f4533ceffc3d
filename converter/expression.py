"""Small formulas over config.json, as the architectures' YAMLs write them: "int(head_dim * partial_rotary_factor)".

A formula is arithmetic, comparisons, a choice (`a if b else c`), membership, list elements (`layer_types[layer]`) and a
few functions over dotted names of config.json. It is parsed by Python's own parser and evaluated here, so nothing else
of Python is within reach. A name that config.json lacks, or holds null for, makes the whole formula None, and so does a
division by zero. The alternative, a list of named rules, would need Python for every family that multiplies two values.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARED: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "bool": bool,
    "min": min,
    "max": max,
    "len": len,
    "sqrt": math.sqrt,
    "log": math.log,
    "ceil": math.ceil,
}


class _AbsentError(Exception):
    """A name that config.json has no value for."""


def evaluate(formula: str, config: Mapping[str, Any], layer: int | None = None) -> Any:
    """The value of `formula` over config.json, and `layer` if it is given; None when config.json cannot answer it."""
    try:
        return _value(_parsed(formula), {**config, "layer": layer})
    except (_AbsentError, ArithmeticError, LookupError, TypeError, ValueError):  # of whatever config.json holds
        return None


@cache
def _parsed(formula: str) -> ast.expr:
    return ast.parse(formula, mode="eval").body


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() | ast.Attribute():
            return _found(ast.unparse(node), names)
        case ast.Subscript():
            return _value(node.value, names)[_value(node.slice, names)]
        case ast.BinOp() if type(node.op) in BINARY:
            return BINARY[type(node.op)](_value(node.left, names), _value(node.right, names))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, names)
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, names)
        case ast.BoolOp():
            values = (_value(item, names) for item in node.values)
            return all(values) if isinstance(node.op, ast.And) else any(values)
        case ast.Compare(ops=[op], comparators=[other]) if type(op) in COMPARED:
            return COMPARED[type(op)](_value(node.left, names), _value(other, names))
        case ast.IfExp():
            return _value(node.body if _value(node.test, names) else node.orelse, names)
        case ast.List():
            return [_value(item, names) for item in node.elts]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(item, names) for item in node.args))
    raise AssertionError(f"an architecture's YAML uses what formulas do not have: {ast.unparse(node)}")


def _found(path: str, names: Mapping[str, Any]) -> Any:
    value: Any = names
    for step in path.split("."):
        if not isinstance(value, Mapping) or value.get(step) is None:
            raise _AbsentError(path)
        value = value[step]
    return value
