"""Bytes to train on, made from what every machine has: Python's own library, and sums. The kind of each is known."""

import ast
import random
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = (
    "argparse ast asyncio/base_events bisect calendar collections/__init__ configparser contextlib copy csv "
    "dataclasses datetime difflib doctest email/message enum fractions functools heapq html/parser http/client inspect "
    "json/decoder json/encoder locale logging/__init__ pathlib pickle pprint random shutil socketserver statistics "
    "string subprocess tempfile textwrap threading typing unittest/case urllib/parse uuid zipfile"
)
"""Modules of Python's standard library that explain themselves at length."""

KINDS = ("code", "prose", "sums")


def _trees() -> Iterator[ast.Module]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY.split():
        path = library / f"{name}.py"
        if path.is_file():  # versions of Python differ in what is a file and what a folder
            yield ast.parse(path.read_text(encoding="utf-8"))


def split_source(tree: ast.Module) -> tuple[str, str]:
    """A module's code without docstrings and comments, and its docstrings."""
    prose = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            prose.append(text)
            node.body[0] = ast.Pass()
    return ast.unparse(tree), "\n\n".join(prose)


def sums(lines: int, seed: int) -> str:
    """Lines such as ``47+8=55``."""
    draw = random.Random(seed)
    made = []
    for _ in range(lines):
        left, right, sign = draw.randrange(100), draw.randrange(100), draw.choice("+-*")
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        made.append(f"{left}{sign}{right}={value}")
    return "\n".join(made)


def to_bytes(text: str) -> Tensor:
    """A tensor of byte values."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def corpus() -> Mapping[str, Tensor]:
    """Some hundred thousand bytes of each kind; the same on every machine with the same version of Python."""
    parts = [split_source(tree) for tree in _trees()]
    texts = ("\n".join(code for code, _ in parts), "\n".join(prose for _, prose in parts), sums(60_000, seed=0))
    return {kind: to_bytes(text) for kind, text in zip(KINDS, texts, strict=True)}


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random pieces of a text, (count, length) as integers."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()
