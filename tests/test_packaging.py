"""What the package needs, declares and documents: imports, requirements, docstrings, annotations."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

import jaxtyping
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import dsv2_ref

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "dsv2_ref").rglob("*.py"))
MODULES = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in SOURCES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# Imports


def imports_of(path: Path) -> set[str]:
    """Modules imported anywhere in a file, functions included; ours with their own name, others by their first part."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name if name.startswith("dsv2_ref") else name.split(".")[0] for name in names}


OPTIONAL = {"matplotlib": "plots", "numpy": "plots", "flash_attn": "attend_flash", "triton": "kernels"}


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_modules_import_only_what_the_package_requires(path: Path) -> None:
    """torch and jaxtyping; plots also NumPy and matplotlib; flash-attn where it is asked for; kernels also Triton."""
    others = {name for name in imports_of(path) if not name.startswith("dsv2_ref")} - sys.stdlib_module_names
    allowed = {"torch", "jaxtyping"} | {
        name for name, place in OPTIONAL.items() if place in (path.stem, path.parent.name)
    }
    assert others <= allowed


def test_the_configuration_imports_neither_torch_nor_anything_of_ours() -> None:
    assert imports_of(ROOT / "dsv2_ref" / "config.py") <= sys.stdlib_module_names


ORDER = [
    {"config", "checks"},
    {"rmsnorm", "rope", "cache", "masks", "projection", "grouped", "balance"},
    {"attend_cpu", "mlp", "experts"},
    {"attend", "moe"},
    {"attend_flash"},
    {"attention_base"},
    {"multi_head"},
    {"attention"},
    {"layer", "packed"},
    {"model"},
    {"__main__"},
]
"""Arrows point up only: a module may import those of the rows above its own."""


def test_modules_know_only_those_that_come_before_them() -> None:
    placed = {name: row for row, names in enumerate(ORDER) for name in names}
    reference = [path for path in SOURCES if path.parent.name == "dsv2_ref" and path.stem != "__init__"]
    assert placed.keys() == {path.stem for path in reference}
    for path in reference:
        ours = {name.removeprefix("dsv2_ref.") for name in imports_of(path) if name.startswith("dsv2_ref.")}
        ours = {name for name in ours if name.split(".")[0] not in ("kernels", "accounting")}
        assert {name for name in ours if placed[name] >= placed[path.stem]} == set(), path.name


def test_kernels_know_nothing_of_the_reference_but_its_checks() -> None:
    for path in SOURCES:
        if path.parent.name == "kernels":
            ours = {name for name in imports_of(path) if name.startswith("dsv2_ref")} - {"dsv2_ref.checks"}
            assert all(name.startswith("dsv2_ref.kernels") for name in ours), path.name


def test_the_accounting_knows_nothing_but_the_configuration() -> None:
    for path in SOURCES:
        if "accounting" in path.parts:
            ours = {name for name in imports_of(path) if name.startswith("dsv2_ref")} - {"dsv2_ref.config"}
            assert all(name.startswith("dsv2_ref.accounting") for name in ours), path.name
            assert imports_of(path) <= sys.stdlib_module_names | {"dsv2_ref.config"} | ours, path.name


def test_plots_know_nothing_of_the_reference() -> None:
    for path in SOURCES:
        if path.parent.name == "plots":
            assert all(name.startswith("dsv2_ref.plots") for name in imports_of(path) if name.startswith("dsv2_ref"))


def with_what_they_require(names: set[str]) -> set[str]:
    """Distributions of this environment that installing ``names`` without extras brings along."""
    found: set[str] = set()
    while names:
        found |= names
        lines = [Requirement(line) for name in names for line in metadata.requires(name) or []]
        needed = {canonicalize_name(r.name) for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})}
        installed = {canonicalize_name(distribution.name) for distribution in metadata.distributions()}
        names = needed & installed - found
    return found


def test_the_package_runs_on_torch_and_jaxtyping_alone(tmp_path: Path) -> None:
    """In an environment that holds these two, what they bring, and nothing else: no NumPy, no matplotlib."""
    brought = with_what_they_require({"torch", "jaxtyping"})
    for name in brought:
        distribution = metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (tmp_path / part).symlink_to(str(distribution.locate_file(part)))
    code = f"""
import sys
sys.path += [{str(tmp_path)!r}, {str(ROOT)!r}]
import torch, dsv2_ref
layer = dsv2_ref.DeepseekV2DecoderLayer(dsv2_ref.DeepseekV2Config.tiny(), 1)
layer(torch.randn(1, 3, 64))[0].sum().backward()
print(*(name for name in ("numpy", "matplotlib", "triton", "flash_attn", "transformers") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# Requirements


def pinned() -> dict[str, Version]:
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins: dict[str, Version] = {}
    for line in filter(None, lines):
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
        assert canonicalize_name(name) not in pins, f"{name} is pinned twice"
        pins[canonicalize_name(name)] = Version(version)
    return pins


DIRECT = [
    pytest.param(Requirement(line), id=f"{group}: {line}")
    for group, lines in {"package": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
    for line in lines
    if group != "gpu" and not line.startswith("dsv2-ref")
]


@pytest.mark.parametrize("requirement", DIRECT)
def test_the_environment_pins_what_the_project_requires(requirement: Requirement) -> None:
    version = pinned().get(canonicalize_name(requirement.name))
    assert version is not None
    assert requirement.specifier.contains(version)


def test_what_runs_here_is_what_is_pinned() -> None:
    different = {
        name: (version, metadata.version(name))
        for name, version in pinned().items()
        if version.release != Version(metadata.version(name)).release
    }
    assert different == {}


def test_the_package_requires_torch_and_jaxtyping_alone() -> None:
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", "jaxtyping"}
    assert set(PROJECT["optional-dependencies"]) == {"plots", "book", "test", "gpu"}
    assert {Requirement(line).name for line in PROJECT["optional-dependencies"]["gpu"]} == {"flash-attn", "triton"}


def test_every_directory_is_a_package_and_so_is_installed() -> None:
    assert {path.parent for path in SOURCES} == {path.parent for path in SOURCES if path.name == "__init__.py"}


def test_the_package_says_its_version_and_that_it_is_typed() -> None:
    assert Version(dsv2_ref.__version__)
    assert (ROOT / "dsv2_ref" / "py.typed").exists()


def test_public_names_are_those_of_the_card() -> None:
    card = {
        "DeepseekV2Config", "DeepseekV2RMSNorm", "DeepseekV2MLP", "MoEGate", "DeepseekV2MoE", "DeepseekV2Attention",
        "DeepseekV2FlashAttention2", "ATTENTION_CLASSES", "DeepseekV2DecoderLayer",
    }  # fmt: skip
    assert card <= set(dsv2_ref.__all__)
    assert all(hasattr(dsv2_ref, name) for name in dsv2_ref.__all__)


# Documentation


def public_members(holder: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Public functions and classes of ours in a module or class, those of the classes included."""
    for name, member in vars(holder).items():
        unbound = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        unbound = unbound.fget if isinstance(unbound, property) else unbound
        if name.startswith("_") or not getattr(unbound, "__module__", "").startswith("dsv2_ref"):
            continue
        if inspect.isclass(unbound) and unbound.__module__ == prefix:
            yield f"{prefix}.{name}", unbound
            yield from ((f"{prefix}.{inner}", m) for inner, m in public_members(unbound, prefix))
        elif inspect.isfunction(unbound) and unbound.__module__ == prefix:
            yield f"{prefix}.{name}", unbound


def modules() -> list[ModuleType]:
    return [importlib.import_module(name.removesuffix(".__init__")) for name in MODULES]


PUBLIC = [
    pytest.param(member, id=name) for module in modules() for name, member in public_members(module, module.__name__)
]


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_every_module_says_what_it_holds(module: ModuleType) -> None:
    assert module.__doc__
    assert module.__doc__.splitlines()[0].endswith((".", ":", ","))


@pytest.mark.parametrize("member", PUBLIC)
def test_every_public_name_is_documented(member: Any) -> None:
    assert member.__doc__
    assert not member.__doc__.startswith(f"{member.__name__}(")  # what a dataclass writes of itself


CALLABLES = [pytest.param(p.values[0], id=p.id) for p in PUBLIC if inspect.isfunction(p.values[0])]


@pytest.mark.parametrize("function", CALLABLES)
def test_tensors_carry_their_shapes(function: Any) -> None:
    """A bare Tensor is left only where the shape is any: conditions on values, masks read by `Visibility.of`."""
    bare = {
        name
        for name, hint in function.__annotations__.items()
        if hint is torch.Tensor or (isinstance(hint, UnionType) and torch.Tensor in hint.__args__)
    }
    without_shape = {
        "require_values": {"condition"},
        "of": {"attention_mask"},
        "block": {"return"},
        "require_features": {"hidden_states", "weight"},
    }
    assert bare <= without_shape.get(function.__name__, set())


MODULE_CLASSES = [
    c for c in map(dsv2_ref.__dict__.get, dsv2_ref.__all__) if inspect.isclass(c) and issubclass(c, torch.nn.Module)
]


@pytest.mark.parametrize("module", MODULE_CLASSES, ids=lambda module: module.__name__)
def test_forward_says_the_shape_of_what_it_takes(module: type[torch.nn.Module]) -> None:
    taken = "input_ids" if "input_ids" in module.forward.__annotations__ else "hidden_states"
    assert issubclass(module.forward.__annotations__[taken], jaxtyping.AbstractArray)


def test_the_command_for_a_gpu_says_at_once_where_there_is_none() -> None:
    if torch.cuda.is_available() or not (ROOT / ".venv" / "installed").exists():
        pytest.skip("there is a GPU, or these tests run outside the environment that make sets up")
    done = subprocess.run(["make", "-s", "test-cuda"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make test-cuda: torch sees no CUDA GPU here" in done.stderr
    assert done.stdout == ""
