"""Syntax-tree mutants of a function: one change each, or two."""

import ast
import copy
import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

SWAPS = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add, ast.Div),
    ast.Mult: (ast.Add, ast.Div),
    ast.Div: (ast.Mult, ast.Sub),
    ast.Pow: (ast.Mult,),
    ast.Gt: (ast.Lt, ast.GtE),
}

# what may stand for a method or function of torch
NAMES = {
    "sum": ("mean", "cumsum"),
    "mean": ("sum",),
    "softmax": ("log_softmax", "sigmoid"),
    "log_softmax": ("softmax",),
    "logsigmoid": ("sigmoid", "softplus"),
    "sigmoid": ("tanh", "exp"),
    "exp": ("log", "expm1"),
    "log": ("exp", "log2"),
    "logsumexp": ("sum", "amax"),
    "logcumsumexp": ("cumsum",),
    "maximum": ("minimum",),
    "xlogy": ("mul", "sub"),
    "zeros_like": ("ones_like",),
    "index_add_": ("index_copy_",),
}


def mutants(function: ast.FunctionDef) -> Iterator[ast.FunctionDef]:
    """Copies of a function, each with one change in its body."""
    for change in _changes(function):
        yield change.made(function)


def mutants_of_mutants(
    function: ast.FunctionDef, n: int, seed: int = 0
) -> Iterator[ast.FunctionDef]:
    """`n` copies with two changes drawn at random."""
    rng = random.Random(seed)
    first = list(_changes(function))
    for _ in range(n):
        once = rng.choice(first).made(function)
        yield rng.choice(list(_changes(once))).made(once)


def _nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """The nodes of the body, in an order that copies share."""
    return list(itertools.chain.from_iterable(ast.walk(part) for part in function.body[1:]))


def _changes(function: ast.FunctionDef) -> Iterator["_Change"]:
    """Every single change."""
    arguments = [a.arg for a in function.args.args]
    for place, node in enumerate(_nodes(function)):
        for field, value in _alternatives(node, arguments):
            yield _Change(place, field, value)
        for field, child in ast.iter_fields(node):
            if isinstance(child, ast.expr):
                yield from (_Change(place, field, new) for new in _unwrapped(child))


class _Change(NamedTuple):
    """One field of one node gets another value."""

    place: int
    field: str
    value: Any

    def made(self, function: ast.FunctionDef) -> ast.FunctionDef:
        """A copy of the function with this change."""
        changed = copy.deepcopy(function)
        setattr(_nodes(changed)[self.place], self.field, copy.deepcopy(self.value))
        return changed


def _alternatives(node: ast.AST, arguments: list[str]) -> Iterator[tuple[str, Any]]:
    """Fields of a node with what may stand there instead."""
    if isinstance(node, ast.BinOp):
        yield from (("op", new()) for new in SWAPS.get(type(node.op), ()))
        yield "left", node.right
        yield "right", node.left
    elif isinstance(node, ast.Compare):
        yield from (("ops", [new()]) for new in SWAPS.get(type(node.ops[0]), ()))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "op", ast.UAdd()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield from (("value", new) for new in (node.value + 1, node.value - 1))
    elif isinstance(node, ast.Attribute):
        yield from (("attr", new) for new in NAMES.get(node.attr, ()))
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in arguments:
        yield from (("id", new) for new in arguments if new != node.id)
    elif isinstance(node, ast.Slice):
        yield from ((side, None) for side in ("lower", "upper") if getattr(node, side))


def _unwrapped(child: ast.expr) -> Iterator[ast.expr]:
    """An expression with an operation left out, or with a sign in front."""
    if isinstance(child, ast.Call):
        yield from child.args[:1]
        if isinstance(child.func, ast.Attribute) and not isinstance(child.func.value, ast.Name):
            yield child.func.value
    elif isinstance(child, ast.BinOp):
        yield child.left
        yield child.right
    if isinstance(child, ast.Call | ast.BinOp | ast.Subscript):
        yield ast.UnaryOp(ast.USub(), child)
