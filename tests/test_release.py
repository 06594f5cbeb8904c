"""What a release consists of: one version everywhere, what is committed and no more, checksums; and the workflows that make it."""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import dsv2_ref
from tools import release

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SAYING = ("dsv2_ref/__init__.py", "CITATION.cff", "CHANGELOG.md")


def git(folder: Path, *arguments: str) -> None:
    name = ["-c", "user.name=a reader", "-c", "user.email=reader@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with all that a wheel is made of and that says a version, committed."""
    folder = tmp_path / "clone"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dsv2_ref", folder / "dsv2_ref", ignore=ignored)
    for name in (*SAYING[1:], "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "LICENSE-text", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_release.py").write_text("")
    git(folder.parent, "init", "--quiet", "--initial-branch=main", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=all")
    return folder


def test_this_version_is_said_alike_everywhere() -> None:
    """What is not committed, and a tag, are the business of who releases."""
    found = [
        problem for problem in release.problems(ROOT, dsv2_ref.__version__) if "say" in problem or "has no" in problem
    ]
    assert found == []
    assert dsv2_ref.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_a_clean_clone_may_be_released(clone: Path) -> None:
    assert release.problems(clone, dsv2_ref.__version__) == []
    git(clone, "tag", f"v{dsv2_ref.__version__}")  # as where a pushed tag is being released
    assert release.problems(clone, dsv2_ref.__version__) == []


@pytest.mark.parametrize("wanted", ["", "1.2", "v1.2.3", "1.2.3rc1"])
def test_a_version_is_three_numbers(clone: Path, wanted: str) -> None:
    assert release.problems(clone, wanted) == [
        f"VERSION is {wanted!r}; wanted three numbers, as in make release VERSION=1.2.3"
    ]


def test_each_place_with_another_version_is_named(clone: Path) -> None:
    found = "\n".join(release.problems(clone, "9.9.9"))
    assert all(place in found for place in (*SAYING, "preferred-citation"))


def test_another_date_is_named(clone: Path) -> None:
    path = clone / "dsv2_ref" / "__init__.py"
    path.write_text(path.read_text().replace(dsv2_ref.__date__, "2031-01-01"))
    git(clone, "commit", "--quiet", "--all", "--message=later")
    found = release.problems(clone, dsv2_ref.__version__)
    assert [problem.split()[0] for problem in found] == ["CITATION.cff", "CITATION.cff", "CHANGELOG.md"]


def test_what_is_not_committed_is_named(clone: Path) -> None:
    (clone / "left.py").write_text("")
    with (clone / "README.md").open("a") as file:
        file.write("more")
    assert release.problems(clone, dsv2_ref.__version__) == ["not committed: README.md, left.py"]


def test_a_version_is_tagged_once(clone: Path) -> None:
    git(clone, "tag", f"v{dsv2_ref.__version__}")
    git(clone, "commit", "--quiet", "--allow-empty", "--message=after")
    (found,) = release.problems(clone, dsv2_ref.__version__)
    assert found.startswith(f"there is a tag v{dsv2_ref.__version__} already, on ")


def test_the_command_line_says_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "dsv2_ref", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"dsv2_ref {dsv2_ref.__version__}, {dsv2_ref.__date__}\n"
    assert done.returncode == 0


def test_wheel_and_source_hold_what_is_committed(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clone / "dsv2_ref" / "lying_about.py").write_text("")
    built = [f"{release.NAME}.pdf", f"{release.NAME}-site.zip"]
    (clone / "_build").mkdir()
    for file in (*built, "dsv2-layer-book-9.9.9.pdf", "assignments-instructors.zip"):
        (clone / "_build" / file).write_bytes(b"built before")
    monkeypatch.setattr(release, "ROOT", clone)
    dist = tmp_path / "dist"
    release.build(dist, "true")  # the program that says yes to any package
    name = f"dsv2_ref-{dsv2_ref.__version__}"
    with zipfile.ZipFile(dist / f"{name}-py3-none-any.whl") as wheel:
        files = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dsv2_ref").rglob("*.py")}
    assert sources | {"dsv2_ref/py.typed", "dsv2_ref/published.json"} <= files
    assert all(file.startswith(("dsv2_ref/", f"{name}.dist-info/")) for file in files)
    assert "dsv2_ref/lying_about.py" not in files
    with tarfile.open(dist / f"{name}.tar.gz") as source:
        found = {
            member.removeprefix(f"{name}/") for member in source.getnames() if not source.getmember(member).isdir()
        }
    found = {member for member in found if not member.startswith("dsv2_ref.egg-info/")}
    packed = {"pyproject.toml", "MANIFEST.in", "setup.cfg", "PKG-INFO", "README.md", "LICENSE", "LICENSE-text"}
    assert found == {member for member in files if member.startswith("dsv2_ref/")} | packed
    packages = [f"{name}-py3-none-any.whl", f"{name}.tar.gz"]
    wanted = {*built, *packages, f"{release.NAME}-assignments.zip", "SHA256SUMS"}
    assert {path.name for path in dist.iterdir()} == wanted
    with zipfile.ZipFile(dist / f"{release.NAME}-assignments.zip") as archive:
        assert not [file for file in archive.namelist() if "solutions" in file]


def test_the_site_is_one_file_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    site = tmp_path / "html"
    (site / "book").mkdir(parents=True)
    (site / "book" / "page.html").write_text("a page")
    release.archive_site(site, tmp_path / "one.zip")
    (site / "book" / "page.html").touch()
    release.archive_site(site, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read(f"{release.NAME}/book/page.html") == b"a page"


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"a")
    (tmp_path / "SHA256SUMS").write_text("of an earlier release")
    release.write_checksums(tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text() == f"{hashlib.sha256(b'a').hexdigest()}  a.zip\n"


# Workflows


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The linter as `make lint` calls it, found beside this Python."""
    (command,) = re.findall(r"\$\(BIN\)(zizmor .*) \S+$", (ROOT / "Makefile").read_text(), re.M)
    program = Path(sys.executable).with_name("zizmor")
    return subprocess.run([program, *command.split()[1:], folder], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kept", "planted"),
    [
        ("uses: actions/checkout@08c6903cd8c0fde910a37f88322edcfb5dd907a8 # v5.0.0", "uses: actions/checkout@v5"),
        ("    steps:", "    stepz:"),
        ("  pull_request:", "  pull_request_target:"),
        ("run: .ci/run", "run: echo ${{ github.head_ref }}"),
    ],
)
def test_the_linter_sees_faults(tmp_path: Path, kept: str, planted: str) -> None:
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (folder / "tests.yml").write_text(text)
    assert lint(folder).returncode == 0
    assert kept in text
    (folder / "tests.yml").write_text(text.replace(kept, planted))
    assert lint(folder).returncode != 0


def test_there_is_a_workflow_for_each_occasion() -> None:
    # YAML 1.1 reads the key `on` as true.
    occasions = {path.stem: yaml.safe_load(path.read_text())[True] for path in WORKFLOWS}
    assert set(occasions) == {"tests", "pages", "release", "notebooks"}
    assert {"push", "pull_request"} == set(occasions["tests"])
    assert occasions["pages"]["push"] == {"branches": ["main"]}
    assert occasions["release"] == {"push": {"tags": ["v*"]}}
    (weekly,) = occasions["notebooks"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", weekly["cron"])
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "notebooks.yml").read_text())["jobs"]
    assert jobs["newest"]["continue-on-error"] is True
    assert jobs["thorough"]["steps"][-1] == {"run": "make test-thorough"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_in_a_fork(path: Path) -> None:
    """It names no repository but those of its actions, pinned, and calls commands that exist."""
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"run: .*", text)))) <= targets
    assert all(
        re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in re.findall(r"uses: (.*)", text)
    )
    assert not re.search(r"https?://|github\.(com|io)", text)


def test_no_action_runs_on_a_node_that_runners_have_no_longer() -> None:
    """GitHub's runners have no Node 20 since 2026-09-16; these are the first versions of the actions with Node 24."""
    first = {"checkout": 5, "setup-python": 6, "upload-artifact": 6}
    first |= {"configure-pages": 6, "upload-pages-artifact": 5, "deploy-pages": 5}
    used = re.findall(r"uses: actions/([\w-]+)@\S+ # v(\d+)", "".join(path.read_text() for path in WORKFLOWS))
    assert {name for name, _ in used} == first.keys()
    assert [name for name, version in used if int(version) < first[name]] == []


def test_binder_installs_what_a_notebook_needs_in_the_versions_of_the_book() -> None:
    folder = ROOT / ".binder"
    (pinned,) = (folder / "requirements.txt").read_text().split()
    assert f"UV := {pinned}\n" in (ROOT / "Makefile").read_text()
    script = (folder / "postBuild").read_text()
    assert "--torch-backend cpu --constraint requirements.txt" in script
    assert '".[notebooks]"' in script
    assert (folder / "postBuild").stat().st_mode & 0o111
    assert re.fullmatch(r"python-3\.\d+\n", (folder / "runtime.txt").read_text())
