"""Where a checkpoint lies: a folder, or a folder behind an address of which only the bytes asked for are read."""

import http.client
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dsv2_ref.checks import require

PATIENCE = 30  # seconds without a byte
ATTEMPTS = 5  # in a row that bring no byte
SKIPPED = 1 << 20  # bytes that are read and dropped rather than asked around


class File(Protocol):
    """A file of which parts are read."""

    name: str
    size: int

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""


class Place(Protocol):
    """A folder of files."""

    def open(self, name: str) -> File:
        """The file of this name; FileNotFoundError if there is none."""


def read(file: File, start: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file, to its end if ``length`` is None."""
    found = bytearray(file.size - start if length is None else length)
    file.read_into(start, memoryview(found))
    return bytes(found)


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        self.name, self.size = str(path), path.stat().st_size
        self._stream = path.open("rb", buffering=0)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""
        self._stream.seek(start)
        while view:
            count = self._stream.readinto(view)
            if not count:
                raise ValueError(f"{self.name} ends after {self._stream.tell()} bytes; wanted {len(view)} more")
            view = view[count:]

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.close()


class Folder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, name: str) -> LocalFile:
        """The file of this name; FileNotFoundError if there is none."""
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return LocalFile(path)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but do not tell a token to another host."""

    def redirect_request(self, request: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(request, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl).netloc != urlsplit(request.full_url).netloc:
            new.remove_header("Authorization")
        return new


class RemoteFile:
    """A file behind an address, read by byte ranges.

    A connection that breaks is resumed where it broke. A server that does not know ranges is read from the start, and
    what was not asked for is dropped.
    """

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self.name, self._headers = address, headers
        self._opener = urllib.request.build_opener(_Redirects)
        self._stream: Any = None
        self._position, self._by_ranges = 0, False
        self.size = -1
        self._ask_from(0)

    def _ask_from(self, start: int) -> None:
        """Open a stream at ``start``, or before it where the server knows no ranges."""
        self._close()
        asked = {**self._headers, "Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        request = urllib.request.Request(self.name, headers=asked)
        try:
            stream = self._opener.open(request, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            code, reason = error.code, error.reason
            error.close()
            if code == 404:
                raise FileNotFoundError(f"{self.name} does not exist: the server says 404") from None
            raise ConnectionError(f"the server says {code} {reason}") from None
        length = stream.headers.get("Content-Length")
        self._by_ranges = stream.status == 206
        if self._by_ranges:
            total = stream.headers.get("Content-Range", "").rpartition("/")[2]
            self._position = start
        else:
            total, self._position = length, 0
        require(total is not None and total.isdigit(), "the length of", self.name, "known from the server's answer")
        require(self.size in (-1, int(total)), self.name, f"of {total} bytes", f"{self.size}, as before")
        self.size, self._stream = int(total), stream

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""
        end, failures = start + len(view), 0
        require(end <= self.size, self.name, f"of {self.size} bytes", f"at least {end}")
        while view:
            try:
                ahead = start - self._position
                if self._stream is None or ahead < 0 or (self._by_ranges and ahead > SKIPPED):
                    self._ask_from(start)
                self._drop(start - self._position)
                count = self._stream.readinto(view)
                if not count:
                    raise ConnectionError(f"the connection ended after {self._position} bytes")
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                self._close()
                again = not isinstance(error, FileNotFoundError) and failures < ATTEMPTS
                if not again:
                    raise OSError(f"{self.name} cannot be read: {_in_a_line(error)}") from error
                time.sleep(failures / 5)
                continue
            failures = 0
            start, self._position, view = start + count, self._position + count, view[count:]

    def _drop(self, count: int) -> None:
        while count > 0:
            dropped = len(self._stream.read(min(count, SKIPPED)))
            if not dropped:
                raise ConnectionError(f"the connection ended after {self._position} bytes")
            count, self._position = count - dropped, self._position + dropped

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Address:
    """A folder behind an http or https address."""

    def __init__(self, address: str, headers: dict[str, str] | None = None) -> None:
        self.address, self.headers = address.rstrip("/"), headers or {}

    def open(self, name: str) -> RemoteFile:
        """The file of this name; FileNotFoundError if there is none."""
        try:
            return RemoteFile(f"{self.address}/{name}", self.headers)
        except FileNotFoundError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{self.address}/{name} cannot be read: {_in_a_line(error)}") from error


class Cached:
    """A folder of which files may be missing here, and the address that has them."""

    def __init__(self, folder: Folder, address: Address) -> None:
        self.folder, self.address = folder, address

    def open(self, name: str) -> File:
        """The file of this name; FileNotFoundError if there is none."""
        try:
            return self.folder.open(name)
        except FileNotFoundError:
            return self.address.open(name)


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def place_of(source: str | Path, revision: str | None, token: str | None, whole: bool) -> Place:
    """Where ``source`` lies: a folder, an address, or a name on the Hugging Face Hub.

    A whole model goes through the Hub's cache. Of a part, what the cache has is read there, the rest from the Hub.
    """
    if Path(source).is_dir():
        return Folder(Path(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return Address(source, _bearer(token))
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        wanted = "a folder, an http or https address, or a name on the Hugging Face Hub such as owner/model"
        raise FileNotFoundError(f"source is {str(source)!r}; wanted {wanted}")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        instead = "pip install huggingface_hub, or a folder or an address"
        raise ImportError(f"source is {source!r}, which looks like a name on the Hub; wanted {instead}") from error
    asked: Any = {"revision": revision, "token": token, "allow_patterns": ["*.json", "*.safetensors"]}
    if whole:
        return Folder(Path(hub.snapshot_download(source, **asked)))
    address = Address(
        hub.hf_hub_url(source, "config.json", revision=revision).rpartition("/")[0], _bearer(token or hub.get_token())
    )
    try:
        return Cached(Folder(Path(hub.snapshot_download(source, local_files_only=True, **asked))), address)
    except hub.errors.LocalEntryNotFoundError:
        return address
