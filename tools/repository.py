"""Sphinx extension: where this copy of the book has its repository and its pages, and all that follows from it.

The address is looked up in one place, so that a fork changes nothing: ``$BOOK_REPOSITORY`` if it is set, else
``repository.url`` of ``_config.yml``, else the Git remote ``origin`` if that is on GitHub or GitLab. From it come the
buttons of every page (repository, source, edit, a report of a mistake, and for notebooks Binder and, on GitHub, Colab)
and, as substitutions in the text, the commands that fetch the repository. Without an address there are no buttons, and
the text says how else to get the repository. ``$BOOK_BRANCH``, else ``repository.branch``, is the branch that links lead to.
The version and its date, those of the package, stand at the foot of every page and in the entry to cite.

Where the pages are served nobody can guess: ``$BOOK_URL`` says it, else ``html.baseurl`` of ``_config.yml``. Without it
the pages name no address of their own, and there is no sitemap.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from docutils import nodes  # type: ignore[import-untyped]
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

from dsv2_ref import __date__, __version__

HOSTS = ("github.com", "gitlab.com")
COLAB = "https://colab.research.google.com"
BINDER = "https://mybinder.org"


def web_address(remote: str) -> str | None:
    """The https address of a Git remote, without credentials and ``.git``; None if a browser could not open it.

    Understood are ``https://host/owner/name.git``, ``ssh://git@host/owner/name`` and ``git@host:owner/name.git``, on
    the hosts that the theme has buttons for.
    """
    short = re.fullmatch(r"(?:[^@/]+@)?([^:/@]+):(?!/)(.+)", remote)  # git@host:owner/name
    host, path = short.groups() if short else (urlsplit(remote).hostname or "", urlsplit(remote).path)
    path = path.strip("/").removesuffix(".git")
    parts = path.split("/")
    # GitLab has groups within groups, GitHub owner and name alone.
    fits = len(parts) == 2 or (host == "gitlab.com" and len(parts) > 2)
    fits = fits and all(re.fullmatch(r"[\w.-]+", part) for part in parts)
    return f"https://{host}/{path}" if host in HOSTS and fits else None


def origin(folder: Path) -> str | None:
    """The web address of the Git remote ``origin`` of the repository whose root is ``folder``, or None."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "config", "--get", "remote.origin.url"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no Git here
        return None
    return web_address(found)


def find(folder: Path, configured: str) -> str | None:
    """The web address of the book's repository, or None where it has none.

    Args:
        folder: the root of the repository. configured: ``repository.url`` of ``_config.yml``, or an empty string.

    Raises:
        ConfigError: for an address that was given and that no buttons can be made of.
    """
    given = os.environ.get("BOOK_REPOSITORY")
    if given is None and not configured:
        return origin(folder)
    given = configured if given is None else given
    if given and web_address(given) is None:
        raise ConfigError(
            f"the address of the repository is {given!r}; wanted https://github.com/OWNER/NAME, the like on "
            "gitlab.com, or an empty one for a book without buttons ($BOOK_REPOSITORY, or repository.url in _config.yml)"
        )
    return web_address(given)


def site(configured: str) -> str:
    """The address of the folder that the pages are served from, with a slash at its end; empty if nobody said it.

    Args:
        configured: ``html.baseurl`` of ``_config.yml``, or an empty string.

    Raises:
        ConfigError: for what is no address.
    """
    given = os.environ.get("BOOK_URL", configured)
    if given and not re.fullmatch(r"https?://[^\s?#]+", given):
        raise ConfigError(
            f"the address of the pages is {given!r}; wanted https://HOST/FOLDER/, or an empty one ($BOOK_URL, or "
            "html.baseurl in _config.yml)"
        )
    return f"{given.rstrip('/')}/" if given else ""


def theme_options(address: str | None, branch: str) -> dict[str, Any]:
    """What the theme needs for its buttons: all of them, or none that leads nowhere."""
    if address is None:
        return {"repository_url": ""}
    buttons = dict.fromkeys(
        ("use_repository_button", "use_source_button", "use_edit_page_button", "use_issues_button"), True
    )
    launch = {"notebook_interface": "jupyterlab", "binderhub_url": BINDER}
    launch |= {"colab_url": COLAB} if address.startswith("https://github.com/") else {}
    return {"repository_url": address, "repository_branch": branch, **buttons, "launch_buttons": launch}


def report(address: str, page: str) -> str:
    """Where a reader says what is wrong on a page, which the report names together with the book's version."""
    title, body = f"Mistake on {page}", f"Version {__version__}, {__date__}.\n\nWhat is wrong, and where on the page?\n"
    if address.startswith("https://github.com/"):
        return f"{address}/issues/new?{urlencode({'title': title, 'body': body})}"
    return f"{address}/-/issues/new?{urlencode({'issue[title]': title, 'issue[description]': body})}"


def citation(title: str, address: str | None, site: str) -> str:
    """A BibTeX entry for this version of the book, with the address of its pages or else of its repository, if any."""
    fields = {
        "title": title.replace("DeepSeek-V2", "{DeepSeek-V2}"),
        "author": "{The authors of the DeepSeek-V2 layer book}",
        "year": __date__[:4],
        "note": f"Version {__version__}, {__date__}",
    }
    fields |= {"url": site or address or ""} if site or address else {}
    lines = ",\n".join(f"  {name:6} = {{{value}}}" for name, value in fields.items())
    return f"```bibtex\n@misc{{dsv2layerbook,\n{lines}\n}}\n```"


def commands(address: str | None, branch: str) -> dict[str, str]:
    """Substitutions for the pages: how to fetch the repository, here, in Colab and in Binder."""
    if address is None:
        by_hand = (
            "This copy of the book was built without a public address of the repository. The repository is the folder "
            "that it was built from, with `Makefile`, `book/` and `dsv2_ref/` in it: ask for it where you got these pages"
        )
        return {
            "repository": "",
            "fetch": f"{by_hand}.",
            "fetch_in_colab": "Get the repository's folder as above, and upload it to Colab beside the notebook.",
            "launch": "Download a chapter with the arrow at the top of its page, and upload it to Colab or to another Jupyter.",
        }
    name = address.rsplit("/", 1)[1]
    clone = f"!git clone --quiet --depth 1 --branch {branch} {address}"
    places = "Colab or Binder" if address.startswith("https://github.com/") else "Binder"
    return {
        "repository": f"The repository is [{address}]({address}).",
        "fetch": f"```bash\ngit clone {address}\ncd {name}\n```",
        "fetch_in_colab": f'```\n{clone}\n!pip install --quiet "./{name}[notebooks]"\n```',
        "launch": f"The rocket at the top of a chapter opens it in {places}. Binder starts a machine that has the "
        "package installed, which takes some minutes the first time.",
    }


def configure(app: Sphinx, config: Config) -> None:
    """Give the address to the theme and to the text, before either reads its settings."""
    options = config.html_theme_options
    address = find(Path(app.srcdir), options.get("repository_url", ""))
    branch = os.environ.get("BOOK_BRANCH") or options.get("repository_branch") or "main"
    options.update(theme_options(address, branch))
    config.html_baseurl = config.ogp_site_url = site(config.html_baseurl)
    config.ogp_use_first_image = bool(config.html_baseurl)  # its address must be a full one
    config.version = config.release = __version__
    options["footer_content_items"] = ["author.html", "copyright.html", "version.html"]
    told = {**commands(address, branch), "citation": citation(config.project, address, config.html_baseurl)}
    config.myst_substitutions = {**config.myst_substitutions, **told}


def tell(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """The version, and where to report a mistake on the page, for the page's foot and the theme's button."""
    context |= {"version_date": __date__, "report_url": "", "edit_url": ""}
    address = app.config.html_theme_options["repository_url"]
    if not address or doctree is None:
        return
    url = report(address, f"{pagename}.html")
    groups = [button["buttons"] for button in context["header_buttons"] if button.get("label") == "source-buttons"]
    for button in (button for group in groups for button in group):
        if button["label"] == "source-issues-button":
            button |= {"url": url, "text": "Report a mistake", "tooltip": "Report a mistake on this page"}
        elif button["label"] == "source-edit-button":
            button |= {"text": "Edit", "tooltip": "Edit this page"}
            context["edit_url"] = button["url"]
    context["report_url"] = url


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("config-inited", configure)
    app.connect("html-page-context", tell, priority=502)  # after the theme, which makes the buttons
    return {"parallel_read_safe": True, "parallel_write_safe": True}
