"""What a release consists of, and whether one may be made.

    python -m tools.release check 1.2.3    that every place says this version, and nothing is left to commit
    python -m tools.release site           the built book as one file that opens offline
    python -m tools.release build TWINE    dist/: PDF, site, assignments, wheel, source, and checksums
    python -m tools.release tag            the tag, on this machine only

`make release` does all of it, the tests included. The wheel and the source come from what is committed, in a folder of
their own, so that nothing that lies about gets into them.
"""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml

from dsv2_ref import __date__, __version__
from tools import assignments

ROOT = Path(__file__).resolve().parent.parent
NAME = f"dsv2-layer-book-{__version__}"
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"


def git(root: Path, *arguments: str) -> str:
    """What Git says; empty where it knows no answer."""
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False).stdout.strip()


def problems(root: Path, wanted: str) -> list[str]:
    """Why the repository at ``root`` is not ready to be released as the version ``wanted``, a line each."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", wanted):
        return [f"VERSION is {wanted!r}; wanted three numbers, as in make release VERSION=1.2.3"]
    found = []
    source = (root / "dsv2_ref" / "__init__.py").read_text(encoding="utf-8")
    version, date = (re.search(rf'^__{name}__ = "(.+?)"', source, re.M) for name in ("version", "date"))
    assert version
    assert date
    said = {"dsv2_ref/__init__.py": version[1]}
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    for place, cited in (("", citation), (" (preferred-citation)", citation["preferred-citation"])):
        said[f"CITATION.cff{place}"] = str(cited["version"])
        if str(cited["date-released"]) != date[1]:
            found.append(f"CITATION.cff{place} is dated {cited['date-released']}; dsv2_ref/__init__.py {date[1]}")
    found += [f"{place} says version {has}; wanted {wanted}" for place, has in said.items() if has != wanted]
    if f"\n## {wanted}, {date[1]}\n" not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        found.append(f'CHANGELOG.md has no heading "## {wanted}, {date[1]}"')
    if changed := git(root, "status", "--porcelain"):
        found.append(f"not committed: {', '.join(line[3:] for line in (' ' + changed).splitlines())}")
    tagged = git(root, "rev-parse", "--quiet", "--verify", f"v{wanted}^{{commit}}")
    if tagged and tagged != git(root, "rev-parse", "HEAD"):
        found.append(f"there is a tag v{wanted} already, on {tagged[:10]}")
    return found


def archive_site(site: Path, path: Path) -> None:
    """The built book as one ZIP file with one folder in it, the same bytes for the same pages."""
    day = tuple(int(part) for part in __date__.split("-"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for file in site.rglob("*") if file.is_file()):
            entry = zipfile.ZipInfo(f"{NAME}/{file.relative_to(site).as_posix()}", (day[0], day[1], day[2], 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file.read_bytes())


def build_package(root: Path, folder: Path) -> None:
    """The wheel and the source distribution of what is committed at ``root``, without a network."""
    committed = subprocess.run(["git", "-C", root, "archive", "HEAD"], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as clean:
        with tarfile.open(fileobj=io.BytesIO(committed)) as files:
            files.extractall(clean, filter="data")
        command = [sys.executable, "-c", BUILD, str(folder.resolve())]
        subprocess.run(command, cwd=clean, check=True, capture_output=True)


def write_checksums(folder: Path) -> None:
    """SHA256SUMS of all other files of a folder, as `sha256sum --check` reads it."""
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def build(folder: Path, twine: str) -> None:
    """Fill ``folder`` with all that a release has.

    Raises:
        subprocess.CalledProcessError: where the package cannot be built, or `twine check` finds fault with it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in sorted((ROOT / "_build").glob("*.pdf")) + sorted((ROOT / "_build").glob("*.zip")):
        if __version__ in file.name:
            shutil.copy(file, folder)
    assignments.write(folder / f"{NAME}-assignments.zip", assignments.for_students())
    build_package(ROOT, folder)
    packages = [str(file) for file in sorted(folder.iterdir()) if file.suffix in (".whl", ".gz")]
    subprocess.run([twine, "check", "--strict", *packages], check=True)
    write_checksums(folder)
    for file in sorted(folder.iterdir()):
        print(f"dist/{file.name}  {file.stat().st_size / 1e6:.2f} MB")


def main(arguments: list[str]) -> int:
    """Run one of the commands; 1, and a line for each thing that is in the way."""
    match arguments:
        case ["check", version]:
            found = problems(ROOT, version)
            print(*(f"make release: {problem}" for problem in found), sep="\n", end="\n" * bool(found), file=sys.stderr)
            return bool(found)
        case ["site"]:
            path = ROOT / "_build" / f"{NAME}-site.zip"
            archive_site(ROOT / "_build" / "html", path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")
        case ["build", twine]:
            try:
                build(ROOT / "dist", twine)
            except subprocess.CalledProcessError as error:
                print(f"make release: {(error.stderr or b'twine check failed').decode()}", file=sys.stderr)
                return 1
        case ["tag"]:
            tag = f"v{__version__}"
            if not git(ROOT, "tag", "--list", tag):
                subprocess.run(
                    ["git", "-C", ROOT, "tag", "--annotate", tag, "--message", f"Version {__version__}"], check=True
                )
            print(f"tag {tag} is on this commit; git push origin {tag} releases it")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
