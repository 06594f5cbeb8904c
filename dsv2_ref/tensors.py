"""Tensors in safetensors files, one file or shards with an index: what is there, and one of them read.

A file begins with 8 bytes, the length of a JSON header (little-endian), which tells each tensor's dtype, shape and
place after it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dsv2_ref import files, strict_json
from dsv2_ref.checks import describe, is_int, reject, require_object

WEIGHTS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
DTYPES = WEIGHTS | {"I8": torch.int8, "U8": torch.uint8}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is, and where its bytes lie."""

    name: str
    file: files.File
    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of this code; uint8 for codes that hold no weights."""
        return DTYPES.get(self.code, torch.uint8)


def read_header(file: files.File) -> dict[str, Entry]:
    """The tensors that a safetensors file holds, by name.

    Raises:
        ValueError: for a file of another kind, one that is cut short or too long, and a tensor whose bytes do not fit
            its shape.
    """

    def check(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{file.name} is not a safetensors file that can be read: {what}")

    check(file.size >= 8, f"it has {file.size} bytes")
    length = int.from_bytes(files.read(file, 0, 8), "little")
    check(2 <= length <= min(LONGEST_HEADER, file.size - 8), f"its header would have {length} bytes of {file.size}")
    header: Any = None
    found = "is not a JSON object"
    try:
        header = strict_json.loads(files.read(file, 8, length))
    except ValueError as error:
        found = str(error)
    check(isinstance(header, dict), f"its header {found}")
    entries = {}
    for name, told in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (start, end) = told["dtype"], tuple(told["shape"]), told["data_offsets"]
            known = all(is_int(n, 0) for n in (*shape, start, end)) and isinstance(code, str)
        except (TypeError, KeyError, ValueError):
            known = False
        check(name.isprintable(), f"a tensor has the name {describe(name)}")
        check(known, f"tensor {name} has no dtype, shape and place")
        size = end - start if code not in DTYPES else math.prod(shape) * DTYPES[code].itemsize
        check(end - start == size, f"tensor {name} has {end - start} bytes for {size}")
        entries[name] = Entry(name, file, code, shape, 8 + length + start, 8 + length + end)
    reached = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        check(entry.start == reached <= entry.end, f"tensor {entry.name} begins at {entry.start}, not at {reached}")
        reached = entry.end
    check(reached == file.size, f"it has {file.size} bytes, and its tensors end at {reached}")
    return entries


def read_headers(place: files.Place, prefixes: tuple[str, ...]) -> dict[str, Entry]:
    """All tensors in the files that hold names with one of these prefixes."""
    try:
        index = files.read(place.open(INDEX))
    except FileNotFoundError:
        return read_header(place.open(SINGLE))
    try:
        names = require_object(require_object(strict_json.loads(index), "it").get("weight_map"), "weight_map")
        for name, shard in names.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+", shard):
                reject(f"the file of {name}", shard, "the name of a file beside it")
    except ValueError as error:
        raise ValueError(f"{INDEX} is not the index of a checkpoint: {error}") from error
    wanted = {name: shard for name, shard in names.items() if name.startswith(prefixes)}
    entries: dict[str, Entry] = {}
    for shard in sorted(set(wanted.values())):
        try:
            found = read_header(place.open(shard))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {INDEX} names it") from None
        lost = [name for name, where in wanted.items() if where == shard and name not in found]
        if lost:
            raise ValueError(f"{shard} has no tensor {', '.join(lost[:3])}; wanted what {INDEX} says it holds")
        entries |= {name: entry for name, entry in found.items() if names.get(name, shard) == shard}
    return entries


def expect(entries: Iterable[Entry]) -> None:
    """Tell each file which tensors of it are read next, so that neighbours come together."""
    spans: dict[files.File, list[tuple[int, int]]] = {}
    for entry in entries:
        spans.setdefault(entry.file, []).append((entry.start, entry.end))
    for file, own in spans.items():
        file.expect(own)


def read_tensor(entry: Entry) -> Shaped[Tensor, "..."]:
    """A tensor, as it is stored."""
    held = bytearray(math.prod(entry.shape) * entry.dtype.itemsize)
    if not held:
        return torch.empty(entry.shape, dtype=entry.dtype)
    entry.file.read_into(entry.start, memoryview(held))
    return torch.frombuffer(held, dtype=entry.dtype).view(entry.shape)


def dequantize(
    stored: Shaped[Tensor, "rows columns"],
    scales: Float[Tensor, "row_blocks column_blocks"],
    block: tuple[int, int],
    out: Float[Tensor, "rows columns"],
) -> None:
    """Write float8 values times the scale of their block into ``out``.

    Blocks at the edges may be cut.

    Source: ``weight_dequant`` of DeepSeek-V3's published inference code.
    """
    for row, scale in zip(range(0, len(stored), block[0]), scales.float(), strict=True):
        rows = slice(row, row + block[0])
        wide = scale.repeat_interleave(block[1])[: stored.shape[1]]
        out[rows].copy_(stored[rows].float() * wide)
