"""What a reader of the core meets: how many files, calls and lines, and that a page can print them."""

import ast
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dsv2_ref
from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer

PACKAGE = pathlib.Path(dsv2_ref.__file__).parent
CORE = ("layer", "rmsnorm", "rope", "masks", "attention", "mla", "mha", "cache", "moe", "balance", "model", "config")
ONE_SITTING = ("layer", "rmsnorm", "rope", "attention", "mla", "mha", "moe")


def travelled(run: Callable[[], Any]) -> tuple[set[str], int, int]:
    """Files of the package that a call opens, its calls of functions there, and changes of file."""
    files: set[str] = set()
    stack: list[str | None] = [None]
    calls = changes = 0

    def on_event(frame: Any, event: str, _: Any) -> Any:
        nonlocal calls, changes
        file = frame.f_code.co_filename
        if not file.startswith(str(PACKAGE)):
            return None
        if event in ("call", "return"):
            if event == "return":
                stack.pop()
            changes += stack[-1] not in (None, file)
        if event == "call":
            calls += 1
            files.add(file)
            stack.append(file)
        return on_event

    sys.settrace(on_event)
    try:
        run()
    finally:
        sys.settrace(None)
    return files, calls, changes


def walk() -> dict[str, tuple[int, int, int]]:
    """Files, calls and changes of file of a prompt and of a decoded token."""
    layer = DeepseekV2DecoderLayer(DeepseekV2Config.tiny(), layer_idx=1).eval()
    prompt, token, found = torch.randn(1, 6, 64), torch.randn(1, 1, 64), {}
    with torch.no_grad():
        _, cache = layer(prompt, use_cache=True)
        for name, x, past in (("prompt", prompt, None), ("token", token, cache)):
            files, calls, changes = travelled(lambda x=x, past=past: layer(x, past_key_value=past, use_cache=True))
            found[name] = len(files), calls, changes
    return found


def test_one_forward_is_a_short_walk() -> None:
    """In a process of its own: here the checker of signatures puts a call around every function."""
    command = [sys.executable, "-m", "tests.test_reading"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    for name, (files, calls, changes) in json.loads(done.stdout).items():
        assert files <= 10, name
        assert calls <= 50, name
        assert changes <= 52, name


def test_the_core_fits_one_sitting() -> None:
    lines = {name: len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in ONE_SITTING}
    assert sum(lines.values()) <= 1000, lines


@pytest.mark.parametrize("name", CORE)
def test_a_page_can_print_it(name: str) -> None:
    wide = [line for line in (PACKAGE / f"{name}.py").read_text().splitlines() if len(line) > 88]
    assert wide == []


@pytest.mark.parametrize("name", [*CORE, "ops", "checks", "training_checks", "checkpoint", "linear"])
def test_the_core_does_not_know_the_faster_ways(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imported = {
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not [module for module in imported if module.startswith("dsv2_ref.fast")]


if __name__ == "__main__":
    print(json.dumps(walk()))
