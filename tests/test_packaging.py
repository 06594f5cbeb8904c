"""What the package needs, declares and documents: imports, requirements, docstrings, annotations."""

import ast
import importlib.util
import inspect
import json
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
from tools import gpu, notebooks

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


OPTIONAL = {
    "matplotlib": {"plots"},
    "numpy": {"plots"},
    "IPython": {"plots"},
    "flash_attn": {"checks"},
    "triton": {"triton"},
    "huggingface_hub": {"files"},
    "safetensors": {"saving"},
    "tqdm": {"loading"},
}
"""Where what the package does not require may be imported: the names of modules or their folders."""


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_modules_import_only_what_the_package_requires(path: Path) -> None:
    """torch and jaxtyping; the rest only where it is asked for."""
    others = {name for name in imports_of(path) if not name.startswith("dsv2_ref")} - sys.stdlib_module_names
    here = {path.stem, path.parent.name}
    assert others <= {"torch", "jaxtyping"} | {name for name, places in OPTIONAL.items() if places & here}


def test_the_configuration_imports_neither_torch_nor_more_than_its_checks() -> None:
    assert imports_of(ROOT / "dsv2_ref" / "config.py") <= sys.stdlib_module_names | {"dsv2_ref", "dsv2_ref.checks"}


def first_imports(path: Path) -> set[str]:
    """The modules of the package that are imported when this one is: at its top, and not only for the type checker."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("dsv2_ref"):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).exists()}
            found |= known or {node.module}
    return found


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    arrows = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): first_imports(path)
        for path in SOURCES
        if path.stem != "__init__"
    }
    while free := {name for name, known in arrows.items() if not known & arrows.keys()}:
        arrows = {name: known for name, known in arrows.items() if name not in free}
    assert arrows == {}


def test_the_accounting_knows_nothing_but_the_configuration() -> None:
    for path in SOURCES:
        if "accounting" in path.parts:
            if path.stem == "activations":  # runs the layer itself, and is imported when it is asked for
                continue
            known = {"dsv2_ref", "dsv2_ref.config", "dsv2_ref.checks", "dsv2_ref.training_checks"}
            ours = {name for name in imports_of(path) if name.startswith("dsv2_ref")} - known
            assert all(name.startswith("dsv2_ref.accounting") for name in ours), path.name
            assert imports_of(path) <= sys.stdlib_module_names | known | ours, path.name


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
    """In an environment that holds these two, what they bring (Triton, if torch is built with CUDA), and nothing else.
    The compiler, which is torch's, would double the time of the import: it waits until someone compiles."""
    for name in with_what_they_require({"torch", "jaxtyping"}):
        distribution = metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (tmp_path / part).exists():  # torch with CUDA brings many distributions that share a folder
                (tmp_path / part).symlink_to(str(distribution.locate_file(part)))
    code = f"""
import sys
sys.path += [{str(tmp_path)!r}, {str(ROOT)!r}]
import torch, dsv2_ref
layer = dsv2_ref.DeepseekV2DecoderLayer(dsv2_ref.DeepseekV2Config.tiny(), 1)
layer(torch.randn(1, 3, 64))[0].sum().backward()
print(*(name for name in ("numpy", "matplotlib", "flash_attn", "transformers", "torch._dynamo") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# Requirements


def pinned(path: Path = ROOT / "requirements.txt") -> dict[str, Version]:
    lines = [line.split("#")[0].split(";")[0].strip() for line in path.read_text().splitlines()]
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
    if not line.startswith(("dsv2-ref", "flash-attn"))
]


@pytest.mark.parametrize("requirement", DIRECT)
def test_the_environment_pins_what_the_project_requires(requirement: Requirement) -> None:
    version = pinned().get(canonicalize_name(requirement.name))
    assert version is not None
    assert requirement.specifier.contains(version)


def test_what_runs_here_is_what_is_pinned() -> None:
    """By `requirements.txt`, or by the copy from which an environment for another torch was made."""
    copy = Path(sys.prefix) / "requirements.txt"
    different = {
        name: (version, metadata.version(name))
        for name, version in pinned(copy if copy.exists() else ROOT / "requirements.txt").items()
        if version.release != Version(metadata.version(name)).release
    }
    assert different == {}


def test_the_package_requires_torch_and_jaxtyping_alone() -> None:
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", "jaxtyping"}
    assert set(PROJECT["optional-dependencies"]) == {
        *("plots", "pretrained", "notebooks", "book", "test", "test-cuda", "gpu")
    }
    assert {Requirement(line).name for line in PROJECT["optional-dependencies"]["gpu"]} == {
        "flash-attn",
        "torch",
        "triton",
    }


def test_every_place_that_looks_at_torch_wants_the_same_version() -> None:
    (oldest,) = (Requirement(line).specifier for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert str(oldest) == f">={gpu.OLDEST_TORCH}"
    assert f"< [{gpu.OLDEST_TORCH.replace('.', ', ')}]:" in notebooks.LOADER
    assert f"wanted {gpu.OLDEST_TORCH} or newer" in notebooks.LOADER


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
    assert module.__doc__.strip().split("\n\n")[0].endswith((".", ":", ","))


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


# Makefile


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-s", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["test-cuda", "bench-cuda"])
def test_a_command_for_gpus_says_at_once_where_there_is_none(command: str) -> None:
    """With the Python at hand, whether `make` set it up or not."""
    done = make(command, "VENV=", f"PYTHON={sys.executable}")
    assert done.returncode != 0
    assert done.stderr.startswith(f"make {command}: torch sees no CUDA GPU here: torch {torch.__version__} was built ")
    assert done.stdout == ""


def test_a_python_that_cannot_make_an_environment_is_named_with_what_helps(tmp_path: Path) -> None:
    """As on Debian without the package python3-venv, and in Colab: ensurepip is missing."""
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError(\"No module named 'ensurepip'\")")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = make("lint", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == (
        f"{python} cannot make an environment: install venv and ensurepip (on Debian and Ubuntu: apt install "
        "python3-venv), or use a Python that has the packages already: make VENV= …"
    )
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),
        ((7, 0), "sm_50 sm_60 sm_70 sm_80", True),
        ((8, 9), "sm_75 sm_80 sm_86 sm_90", True),
        ((8, 0), "sm_86", False),
        ((12, 1), "sm_90a compute_120", True),
        ((9, 0), "compute_120", False),
    ],
)
def test_whether_a_build_of_torch_has_code_for_a_gpu(
    capability: tuple[int, int], architectures: str, runs: bool
) -> None:
    assert gpu.has_code(capability, architectures.split()) == runs


TEXTS = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "book").glob("*.ipynb"))]


def commands_in(path: Path) -> list[str]:
    """Lines of code blocks and code within lines, of a page's text."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    blocks = re.findall(r"^```.*?^```|^    \S.*?$", text, re.M | re.S)
    return [line.strip() for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_command_in_a_text_exists(path: Path) -> None:
    """Targets of make, modules of ours, paths given to pytest, and the project's extras."""
    targets = set(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.M))
    targets = {target for line in targets for target in line.split()}
    for command in commands_in(path):
        named = re.match(r"!?make ([a-z][\w-]*)", command)
        assert not named or named[1] in targets, command
        named = re.search(r"-m ((?:dsv2_ref|bench|tools|experiments)[\w.]*)", command)
        assert not named or importlib.util.find_spec(named[1]), command
        named = re.search(r"-m pytest (tests\S*)", command)
        assert not named or (ROOT / named[1]).exists(), command
        named = re.search(r"pip install .*\.[\w/{}]*\[(\w[\w-]*)\]", command)
        assert not named or named[1] in PROJECT["optional-dependencies"], command


@pytest.mark.parametrize("imported", ["", "import torch; torch.__version__ = '2.10.1+cu128'; "])
@pytest.mark.parametrize(("version", "enough"), [("2.10.1+cu128", False), ("2.9.0", False), ("2.11.0a0+nv26.2", True)])
def test_an_older_torch_is_refused_at_import_in_one_line(
    version: str, enough: bool, imported: str, tmp_path: Path
) -> None:
    installed = tmp_path / f"torch-{version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; {imported.replace('2.10.1+cu128', version)}"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program + "import dsv2_ref"], capture_output=True, text=True, cwd=tmp_path
    )
    said = done.stderr.splitlines()[-1:]
    assert said == ([] if enough else [f"ImportError: torch {version} is here; wanted 2.11 or newer"])


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])


def test_what_an_environment_lacks_for_a_gpu_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "[test-cuda]" in str(gpu.lacking(["torch", "no_such_module"]))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
        assert gpu.lacking(["torch"]) == "torch 2.10.0 is too old: torch 2.11 or newer is needed"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.version, "cuda", "13.0")
        assert "driver 580 or newer" in str(gpu.lacking(["torch"]))
    with monkeypatch.context() as patch:
        pretend_gpu(patch, (7, 0))
        assert "has no code for Tesla (sm_70)" in str(gpu.lacking(["torch"]))
    with monkeypatch.context() as patch:
        pretend_gpu(patch, (8, 0))
        patch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
        lacks_headers = gpu.lacking(["torch"])
        assert lacks_headers is None or str(tmp_path / "Python.h") in lacks_headers
        assert (lacks_headers is None) == (importlib.util.find_spec("triton") is None)
