"""The small trained model on texts that are longer than it was trained for.

python -m experiments.longer        draws the texts anew, from what the package and the book's chapters say today
"""

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2_ref import DeepseekV2ForCausalLM
from experiments import router
from experiments.corpus import KINDS, split_source, sums, to_bytes, windows

FILE = router.DATA / "long_sample.safetensors"
PER_KIND, LENGTH, LAST = 4, 1024, 64


def texts(file: Path = FILE) -> Tensor:
    """Twelve connected texts of 1,024 bytes, four of each kind; none was trained on."""
    stored = load_file(file)
    return torch.cat([stored[kind].long() for kind in KINDS])


def stretched(**fields: Any) -> DeepseekV2ForCausalLM:
    """The trained model with other fields in its configuration, such as ``rope_theta``, and no other weight."""
    model = DeepseekV2ForCausalLM(replace(router.CONFIG, **router.RUNS["expert"], **fields))
    model.load_state_dict(router.load("expert").state_dict())
    return model.requires_grad_(False).eval()


def bits_after(model: DeepseekV2ForCausalLM, length: int, window: int | None = None) -> float:
    """Bits per byte of the last 64 bytes of each text, in one call over its last ``length`` bytes.

    The bytes that count are the same for each length. With a ``window`` a byte attends to so many bytes, itself included.
    """
    like = next(model.parameters())
    tokens = texts().to(like.device)[:, -length:]
    mask = None
    if window is not None:
        place = torch.arange(length, device=like.device)
        distance = place[:, None] - place
        mask = ((distance >= 0) & (distance < window))[None, None]
    logits, _ = model(tokens, attention_mask=mask)
    loss = F.cross_entropy(logits[:, -LAST - 1 : -1].flatten(0, 1), tokens[:, -LAST:].flatten())
    return float(loss / torch.tensor(2.0).log())


def draw() -> Mapping[str, Tensor]:
    """Random pieces of this package's code, of its docstrings and the chapters' text, and of sums with a new seed."""
    import nbformat  # only here: a chapter that reads the stored texts needs no notebooks

    package, book = router.DATA.parents[1] / "dsv2_ref", router.DATA.parent
    parts = [split_source(ast.parse(path.read_text())) for path in sorted(package.rglob("*.py"))]
    pages = [nbformat.read(book / f"{name}.ipynb", 4) for name in ("mla", "decoding", "experts", "overview")]
    said = [cell.source for page in pages for cell in page.cells if cell.cell_type == "markdown"]
    kinds = ("\n".join(code for code, _ in parts), "\n".join([prose for _, prose in parts] + said), sums(20_000, 3))
    generator = torch.Generator().manual_seed(3)
    return {
        kind: windows(to_bytes(text), PER_KIND, LENGTH, generator).to(torch.uint8)
        for kind, text in zip(KINDS, kinds, strict=True)
    }


if __name__ == "__main__":
    save_file(dict(draw()), FILE)
