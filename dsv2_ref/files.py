"""Where a checkpoint lies: a folder, or a folder at an address of which only the bytes asked for are read."""

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dsv2_ref.checks import describe

PATIENCE = 30  # seconds without a byte
ATTEMPTS = 5  # in a row that bring no byte
FIRST = 1 << 16  # bytes asked for to learn how long a file is: all of a small one, most headers
SKIPPED = 1 << 20  # bytes that are read and dropped rather than asked around


class File(Protocol):
    """A file of which parts are read."""

    name: str
    size: int

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Say which bytes (first, and one after the last) are read next, so that neighbours come in one answer."""

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""


class Place(Protocol):
    """A folder of files."""

    def open(self, name: str) -> File:
        """The file of this name; FileNotFoundError if there is none."""

    def close(self) -> None:
        """End the connections of all files that were opened."""


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

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Nothing is gained by knowing ahead."""

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

    def close(self) -> None:
        """There are no connections: a file is closed with the last that holds it."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but do not tell a token to another host."""

    def redirect_request(self, request: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(request, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl)[:2] != urlsplit(request.full_url)[:2]:  # scheme and host
            new.remove_header("Authorization")
        return new


class _FinalError(ConnectionError):
    """What would not be another time either."""


class RemoteFile:
    """A file at an address, read by byte ranges.

    A connection that breaks is resumed where it broke. A server that does not know ranges is read from the start, and
    what was not asked for is dropped.

    Raises:
        FileNotFoundError: where there is none.
        OSError: for a server that says no, fails ATTEMPTS times in a row, or sends what was not asked for.
    """

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self.name, self._headers = address, headers
        self._opener = urllib.request.build_opener(_Redirects)
        self._stream: Any = None
        self._position, self._end = 0, 0  # of the bytes that the stream still gives
        self._by_ranges, self._runs = True, [(0, FIRST)]
        self.size, failures = -1, 0
        while self.size < 0:
            try:
                self._ask_from(0, 1)
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                self._give_up_or_wait(error, failures)

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Ask for these bytes in runs, which bridge gaps that are not worth a request of their own."""
        runs: list[tuple[int, int]] = []
        for first, last in sorted(spans):
            near = bool(runs) and first - runs[-1][1] <= SKIPPED
            begin, end = runs.pop() if near else (first, last)
            runs.append((begin, max(end, last)))
        self._runs = runs

    def _ask_from(self, start: int, end: int) -> None:
        """Open a stream of these bytes and those expected with them, or of the whole file where the server knows no
        ranges."""
        self.close()
        end = max([end, *(last for first, last in self._runs if first <= start < last)])
        asked = {**self._headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            self._stream = self._opener.open(urllib.request.Request(self.name, headers=asked), timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            code, reason = error.code, error.reason
            error.close()
            if code == 404:
                raise FileNotFoundError(f"{self.name} does not exist: the server says 404") from None
            passing = code >= 500 or code in (408, 429)
            raise (ConnectionError if passing else _FinalError)(f"the server says {code} {reason}") from None
        self._by_ranges = self._stream.status == 206
        told = self._stream.headers.get("Content-Range" if self._by_ranges else "Content-Length", "nothing")
        numbers = [int(number) for number in re.findall(r"\d+", told)]
        if len(numbers) != (3 if self._by_ranges else 1):
            raise _FinalError(f"it is sent with the length {told!r}; wanted how many bytes it has")
        first, last, size = numbers if self._by_ranges else (0, numbers[0] - 1, numbers[0])
        if self._by_ranges and not (first == start <= last < size):
            raise _FinalError(f"it is sent as {told!r}; wanted its bytes from {start} on")
        if self.size not in (-1, size):
            raise _FinalError(f"it has {size} bytes; wanted {self.size}, as before")
        self.size, self._position, self._end = size, first, last + 1

    def _give_up_or_wait(self, error: Exception, failures: int) -> None:
        self.close()
        if isinstance(error, FileNotFoundError):
            raise error
        if isinstance(error, _FinalError) or failures == ATTEMPTS:
            raise OSError(f"{self.name} cannot be read: {_in_a_line(error)}") from error
        time.sleep(failures / 5)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""
        failures = 0
        if start + len(view) > self.size:
            raise ValueError(f"{self.name} has {self.size} bytes; wanted at least {start + len(view)}")
        while view:
            try:
                ahead = start - self._position
                if self._stream is None or ahead < 0 or start >= self._end or (self._by_ranges and ahead > SKIPPED):
                    self._ask_from(start, start + len(view))
                self._drop(start - self._position)
                count = self._stream.readinto(view[: self._end - start])
                if not count:
                    raise ConnectionError(f"the connection ended after {self._position} bytes")
            except (OSError, http.client.HTTPException) as error:
                failures += 1
                self._give_up_or_wait(error, failures)
                continue
            failures = 0
            start, self._position, view = start + count, self._position + count, view[count:]

    def _drop(self, count: int) -> None:
        while count > 0:
            dropped = len(self._stream.read(min(count, SKIPPED)))
            if not dropped:
                raise ConnectionError(f"the connection ended after {self._position} bytes")
            count, self._position = count - dropped, self._position + dropped

    def close(self) -> None:
        """End the connection; reading on opens another."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Address:
    """A folder at an http or https address."""

    def __init__(self, address: str, headers: dict[str, str] | None = None) -> None:
        self.address, self.headers = address.rstrip("/"), headers or {}
        self._opened: list[RemoteFile] = []

    def open(self, name: str) -> RemoteFile:
        """The file of this name; FileNotFoundError if there is none."""
        self._opened.append(RemoteFile(f"{self.address}/{name}", self.headers))
        return self._opened[-1]

    def close(self) -> None:
        """End the connections of all files that were opened."""
        for file in self._opened:
            file.close()


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

    def close(self) -> None:
        """End the connections to the address."""
        self.address.close()


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def place_of(source: str | Path, revision: str | None, token: str | None, whole: bool) -> Place:
    """Where ``source`` lies: a folder, an address, or a name on the Hugging Face Hub.

    A whole model goes through the Hub's cache. Of a part, what the cache has is read there, the rest from the Hub.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        return Folder(Path(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            host = urlsplit(source).hostname
        except ValueError:
            host = None
        if not host:
            raise ValueError(f"source is {describe(source)}; wanted an address with a host, as http://host/folder")
        if not re.fullmatch(r"[!-~]+", source):
            raise ValueError(f"source is {describe(source)}; wanted spaces and what is not ASCII percent-encoded")
        return Address(source, _bearer(token))
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        shown = describe(str(source) if isinstance(source, Path) else source)
        wanted = "a folder, an http or https address, or a name on the Hugging Face Hub such as owner/model"
        raise FileNotFoundError(f"source is {shown}; wanted {wanted}")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        instead = "pip install huggingface_hub, or a folder or an address"
        raise ImportError(f"source is {source!r}, which looks like a name on the Hub; wanted {instead}") from error

    def snapshot(**settings: Any) -> Folder:
        asked: Any = {"revision": revision, "token": token, "allow_patterns": ["*.json", "*.safetensors"]}
        return Folder(Path(hub.snapshot_download(source, **asked, **settings)))

    def address(revision: str | None) -> Address:
        config = hub.hf_hub_url(source, "config.json", revision=revision)
        return Address(config.rpartition("/")[0], _bearer(token or hub.get_token()))

    try:
        if whole:
            return snapshot()
        try:
            cached = snapshot(local_files_only=True)
        except hub.errors.LocalEntryNotFoundError:
            return address(revision)
        return Cached(cached, address(cached.path.name))  # a snapshot is called after its commit
    except Exception as error:  # of the libraries that the Hub's client uses, too
        raise OSError(f"{source} cannot be read from the Hugging Face Hub: {_in_a_line(error)}") from error
