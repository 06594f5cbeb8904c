"""The address of the repository comes from one place, and what is made of it fits the address."""

import subprocess
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sphinx.errors import ConfigError

import dsv2_ref
from tools import repository

GITHUB = "https://github.com/owner/name"


@pytest.fixture(autouse=True)
def not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOOK_REPOSITORY", raising=False)
    monkeypatch.delenv("BOOK_BRANCH", raising=False)
    monkeypatch.delenv("BOOK_URL", raising=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    return tmp_path


def add_origin(clone: Path, address: str) -> None:
    subprocess.run(["git", "-C", clone, "remote", "add", "origin", address], check=True)


@pytest.mark.parametrize(
    "remote",
    [
        GITHUB,
        f"{GITHUB}/",
        f"{GITHUB}.git",
        "http://github.com/owner/name",
        "ssh://git@github.com/owner/name.git",
        "ssh://git@github.com:22/owner/name.git",
        "git@github.com:owner/name.git",
        "github.com:owner/name",
        "https://someone:secret@github.com/owner/name.git",
    ],
)
def test_every_form_of_an_address_is_the_same_page(remote: str) -> None:
    """And what somebody signs in with is not printed on it."""
    assert repository.web_address(remote) == GITHUB


def test_groups_of_gitlab() -> None:
    assert repository.web_address("git@gitlab.com:a/b/name.git") == "https://gitlab.com/a/b/name"


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "/srv/git/owner/name.git",
        "../name",
        "file:///srv/owner/name",
        "C:\\owner\\name",
        "https://git.example.org/owner/name",
        "https://github.com.example.org/owner/name",
        "https://github.com/owner",
        "https://github.com/owner/name/tree/main",
        "https://github.com/owner/na me",
    ],
)
def test_what_no_button_can_lead_to_is_no_address(remote: str) -> None:
    assert repository.web_address(remote) is None


def test_a_fork_changes_nothing(clone: Path) -> None:
    assert repository.find(clone, "") is None
    add_origin(clone, "git@github.com:someone/fork.git")
    assert repository.find(clone, "") == "https://github.com/someone/fork"


def test_the_configuration_goes_before_the_remote_and_the_environment_before_both(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_origin(clone, "git@github.com:someone/fork.git")
    assert repository.find(clone, GITHUB) == GITHUB
    monkeypatch.setenv("BOOK_REPOSITORY", "https://github.com/from/environment")
    assert repository.find(clone, GITHUB) == "https://github.com/from/environment"
    monkeypatch.setenv("BOOK_REPOSITORY", "")
    assert repository.find(clone, GITHUB) is None


def test_a_folder_inside_another_repository_does_not_take_its_address(clone: Path) -> None:
    """An archive of the book, unpacked in somebody's project, is not in that project's repository."""
    add_origin(clone, f"{GITHUB}.git")
    (clone / "unpacked").mkdir()
    assert repository.find(clone / "unpacked", "") is None


def test_without_git_there_is_no_address(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_origin(clone, f"{GITHUB}.git")
    monkeypatch.setenv("PATH", "")
    assert repository.find(clone, "") is None


def test_an_address_that_was_given_and_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is 'https://example.org/x'; wanted https://github.com/OWNER/NAME"):
        repository.find(tmp_path, "https://example.org/x")


def test_no_button_without_an_address() -> None:
    assert repository.theme_options(None, "main") == {"repository_url": ""}


def test_colab_opens_notebooks_from_github_only_and_binder_from_both() -> None:
    options = [repository.theme_options(f"https://{host}/owner/name", "main") for host in repository.HOSTS]
    on_github, on_gitlab = (chosen["launch_buttons"] for chosen in options)
    assert on_github["binderhub_url"] == on_gitlab["binderhub_url"] == repository.BINDER
    assert on_github["colab_url"] == repository.COLAB
    assert "colab_url" not in on_gitlab
    texts = [repository.commands(f"https://{host}/owner/name", "main")["launch"] for host in repository.HOSTS]
    assert ["Colab" in text for text in texts] == [True, False]


@pytest.mark.parametrize(
    ("address", "fields"),
    [(GITHUB, ("title", "body")), ("https://gitlab.com/a/b/name", ("issue[title]", "issue[description]"))],
)
def test_a_report_names_the_page_and_the_version(address: str, fields: tuple[str, str]) -> None:
    parts = urlsplit(repository.report(address, "book/rope.html"))
    assert f"https://{parts.netloc}{parts.path}".removeprefix(address) in ("/issues/new", "/-/issues/new")
    told = parse_qs(parts.query)
    assert told[fields[0]] == ["Mistake on book/rope.html"]
    assert dsv2_ref.__version__ in told[fields[1]][0]


def test_the_entry_to_cite_has_an_address_only_where_there_is_one() -> None:
    title = "The DeepSeek-V2 layer"
    assert "url" not in repository.citation(title, None, "")
    assert f"  url    = {{{GITHUB}}}" in repository.citation(title, GITHUB, "")
    with_pages = repository.citation(title, GITHUB, "https://example.org/book/")
    assert "  url    = {https://example.org/book/}" in with_pages
    assert f"Version {dsv2_ref.__version__}, {dsv2_ref.__date__}" in with_pages
    assert "{The {DeepSeek-V2} layer}" in with_pages


def test_the_commands_name_the_repository_or_leave_nothing_to_fill_in() -> None:
    known = repository.commands(GITHUB, "dev")
    assert "git clone https://github.com/owner/name\ncd name\n" in known["fetch"]
    assert f"!git clone --quiet --depth 1 --branch dev {GITHUB}\n" in known["fetch_in_colab"]
    assert '"./name[notebooks]"' in known["fetch_in_colab"]
    unknown = repository.commands(None, "main")
    assert "without a public address" in unknown["fetch"]
    assert not any(place in "".join(unknown.values()) for place in ("rocket", "Binder"))
    assert not any(word in "".join(unknown.values()) for word in ("ADDRESS", "FOLDER", "git clone"))
    assert "github.com" not in "".join(unknown.values())


def test_the_pages_have_the_address_that_was_given_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repository.site("") == ""
    assert repository.site("https://example.org/book") == "https://example.org/book/"
    monkeypatch.setenv("BOOK_URL", "https://someone.github.io/fork/")
    assert repository.site("https://example.org/book") == "https://someone.github.io/fork/"
    monkeypatch.setenv("BOOK_URL", "")
    assert repository.site("https://example.org/book") == ""


@pytest.mark.parametrize(
    "address", ["example.org/book", "ftp://example.org/", "https://example.org/?page=", "https://"]
)
def test_what_is_no_address_of_pages_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="wanted https://HOST/FOLDER/"):
        repository.site(address)
