"""The latent cache in fewer bits: everything that a cache does, with records of bytes; errors by closed form."""

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers.cache_utils import QuantizedCache

from dsv2_ref import DeepseekV2Attention, DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, LatentCache
from dsv2_ref.cache import KeyValueCache, LayerCache
from dsv2_ref.mha import MultiHeadAttention
from dsv2_ref.records import CACHE_FORMATS, QuantizedLatentCache, Record
from tests.peers import SMALL, assert_close, native_config, randomised, tokens

every_format = pytest.mark.parametrize("form_of_cache", CACHE_FORMATS)
both_forms = pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
LARGEST = {"fp8": 448, "int8": 127, "int4": 7}
# Four tiles, two, one that is no multiple of 128, one that is short, an odd one, whose bytes lie at odd addresses
SIZES = [
    (name, latent) for name in CACHE_FORMATS for latent in (512, 256, 130, 16, 15) if (name, latent) != ("int4", 15)
]


def layer_of(dtype: torch.dtype = torch.float64, **fields: Any) -> DeepseekV2DecoderLayer:
    return randomised(DeepseekV2DecoderLayer(replace(SMALL, **fields), 1), dtype)


def random_tokens(record: Record, seq: int = 5, batch: int = 2, seed: int = 0) -> Tensor:
    """Sizes from about 2**-4 to 2**4, differing from token to token and from tile to tile."""
    generator = torch.Generator().manual_seed(seed)
    features = record.latent + record.rope
    spread = torch.randn(batch, seq, features, generator=generator, dtype=torch.float64)
    spread = spread * 2 ** (2 * torch.randn(batch, seq, 1, generator=generator, dtype=torch.float64))
    return (spread * torch.linspace(1, 3, features)).to(record.dtype)


def rounded(new: Tensor, latent: int, form_of_cache: str) -> Tensor:
    """What records of these tokens stand for, by a search through all codes, tile by tile; between two that are as
    near, the even one."""
    numbers = torch.arange(256) if form_of_cache == "fp8" else torch.arange(256) - 128
    every = numbers.byte().view(torch.float8_e4m3fn).double() if form_of_cache == "fp8" else numbers.double()
    known = every.abs() <= LARGEST[form_of_cache]
    every, odd = every[known], numbers[known] % 2
    out = new.clone()
    tile = latent if latent % 128 else 128
    for start in range(0, latent, tile):
        place = out[..., start : start + tile]
        wide = place.to(torch.promote_types(new.dtype, torch.float32))
        scale = (wide.abs().amax(-1, keepdim=True) / LARGEST[form_of_cache]).float()
        off = ((wide / scale.to(wide.dtype))[..., None].double() - every).abs()
        code = torch.where(off == off.amin(-1, keepdim=True), odd, 2).argmin(-1)
        place.copy_((every[code].float() * scale).to(new.dtype))
    return out


class RoundingCache(LatentCache):
    """Keeps floating-point numbers, of tokens that were rounded as they came."""

    form_of_cache = ""

    def append(self, new: Tensor) -> Any:
        return super().append(rounded(new, SMALL.kv_lora_rank, self.form_of_cache))


def rounding_cache(attention: Any, batch: int, form_of_cache: str) -> LatentCache:
    kind = type("RoundingCache", (RoundingCache,), {"form_of_cache": form_of_cache})
    return kind.of(attention, batch, 0)


# Bytes


@pytest.mark.parametrize(("form_of_cache", "size"), [("fp8", 656), ("int8", 656), ("int4", 400)])
def test_bytes_of_a_token_of_deepseek_v2(form_of_cache: str, size: int) -> None:
    """512 codes (or 256 bytes), four scales of 4 bytes, and 64 elements of rope key in 2."""
    with torch.device("meta"):
        attention = DeepseekV2Attention(DeepseekV2Config.deepseek_v2(), 0).bfloat16()
    plain = attention.empty_cache(3, capacity=100)
    cache = attention.empty_cache(3, 100, form_of_cache)
    assert plain.reserved_nbytes == 3 * 100 * 1152
    assert cache.reserved_nbytes == 3 * 100 * size
    assert cache.nbytes == 0
    assert sum(cache.record.parts) == size
    assert cache.append(torch.empty(3, 7, 576, dtype=torch.bfloat16, device="meta")).nbytes == 3 * 7 * size


def test_a_record_by_hand() -> None:
    """Codes 7, -3, 0 and 1, each plus 8, the first in the low half of a byte; 1.0 in float32; 1 and -2 in bfloat16."""
    record = Record("int4", 4, 2, torch.bfloat16)
    token = torch.tensor([[[7, -3, 0.5, 1.4, 1, -2]]], dtype=torch.bfloat16)
    written = record.encode(token)[0, 0].tolist()
    assert written == [0x5F, 0x98, 0, 0, 0x80, 0x3F, 0x80, 0x3F, 0x00, 0xC0]
    assert record.decode(record.encode(token)).tolist() == [[[7, -3, 0, 1, 1, -2]]]
    record = replace(record, format="int8")
    token[0, 0, 0] = 127
    assert record.encode(token)[0, 0].tolist() == [127, 253, 0, 1, 0, 0, 0x80, 0x3F, 0x80, 0x3F, 0x00, 0xC0]
    record = replace(record, format="fp8")
    token[0, 0, 0] = 448  # e4m3: 1.75 * 2**8, -1.5 * 2**1, 2**-1, 1.375 * 2**0
    assert record.encode(token)[0, 0, :4].tolist() == [0x7E, 0xC4, 0x30, 0x3B]


def check_records(latent: int, dtype: torch.dtype, form_of_cache: str) -> None:
    record = Record(form_of_cache, latent, 8, dtype)
    for batch, seq in ((2, 5), (1, 1), (1, 3), (3, 1)):
        new = random_tokens(record, seq, batch)
        records = record.encode(new)
        tiles = max(latent // 128, 1) if latent % 128 == 0 else 1
        codes = latent // 2 if form_of_cache == "int4" else latent
        assert records.shape == (batch, seq, codes + 4 * tiles + 8 * dtype.itemsize)
        assert records.dtype == torch.uint8
        for start in range(seq):  # parts of a storage begin at any byte
            back = record.decode(records[:, start:])
            assert torch.equal(back[..., latent:], new[:, start:, latent:]), "the rope key has changed"
            assert torch.equal(back, rounded(new, latent, form_of_cache)[:, start:])


@pytest.mark.parametrize(("form_of_cache", "latent"), SIZES)
@DTYPES
def test_records_hold_the_nearest_codes_and_the_rope_key_bit_by_bit(
    latent: int, dtype: torch.dtype, form_of_cache: str
) -> None:
    check_records(latent, dtype, form_of_cache)


@pytest.mark.parametrize(("form_of_cache", "latent"), SIZES)
@DTYPES
def test_no_element_is_farther_off_than_half_a_step(latent: int, dtype: torch.dtype, form_of_cache: str) -> None:
    """Of whole numbers; of e4m3 2**-4 of a normal number, and for those below 2**-6 of 448 half of 2**-9. What float32
    rounds in scale, quotient and product is 2**-24 of the largest each, what the dtype rounds half its eps."""
    record = Record(form_of_cache, latent, 8, dtype)
    new = random_tokens(record, 40)
    off = (record.decode(record.encode(new)).double() - new.double()).abs()[..., :latent]
    tiles = new.double()[..., :latent].unflatten(-1, (-1, record.tile))
    largest = tiles.abs().amax(-1, keepdim=True)
    half = largest / LARGEST[form_of_cache] / 2
    if form_of_cache == "fp8":
        half = torch.maximum(tiles.abs() * 2**-4, largest / 448 * 2**-10)
    half = half + 3 * 2**-24 * largest + torch.finfo(dtype).eps / 2 * tiles.abs()
    assert (off <= half.flatten(-2)).all()
    assert (off > 0.9 * half.flatten(-2)).any()  # and the bound is reached


@every_format
@DTYPES
def test_what_is_too_large_saturates_and_is_never_nan(dtype: torch.dtype, form_of_cache: str) -> None:
    record = Record(form_of_cache, 16, 8, dtype)
    largest = torch.finfo(dtype).max
    rows = [[0.0] * 24, [largest] * 24, [-largest] * 24, [1.0] * 15 + [largest] + [1.0] * 8, [math.inf] * 24]
    new = torch.tensor(rows, dtype=dtype)[None]
    back = record.decode(record.encode(new))
    latent = back[..., :16]
    assert latent.isfinite().all()
    assert torch.equal(back[..., 16:], new[..., 16:])
    assert (latent[0, 0] == 0).all()
    most = min(largest, torch.finfo(torch.float32).max)  # scales are in float32
    for row, sign in ((1, 1), (2, -1)):
        assert (sign * latent[0, row] >= most * (1 - 2**-20)).all()
    assert latent[0, 3, 15] >= most * (1 - 2**-20)
    smallest = torch.full((1, 1, 24), torch.finfo(dtype).smallest_normal / 8, dtype=dtype)
    assert record.decode(record.encode(smallest)).isfinite().all()


@every_format
def test_nan_stays_in_its_token(form_of_cache: str) -> None:
    record = Record(form_of_cache, 256, 8, torch.float32)
    new = random_tokens(record)
    new[0, 1, 3] = math.nan
    back = record.decode(record.encode(new))
    assert back[0, 1, :128].isnan().all()
    back[0, 1, :128] = 0
    assert back.isfinite().all()


# What a cache does


@every_format
@DTYPES
@both_forms
@torch.no_grad()
def test_a_layer_attends_to_what_the_records_stand_for(form: str, dtype: torch.dtype, form_of_cache: str) -> None:
    """In pieces, with padding on the left, over more tokens than there was room for."""
    layer, x = layer_of(dtype, mla_form=form), tokens(2, 9, dtype)
    mask = torch.arange(9) >= torch.tensor([[0], [3]])
    cache = layer.self_attn.empty_cache(2, 4, form_of_cache)
    other = rounding_cache(layer.self_attn, 2, form_of_cache)
    done = 0
    for piece in x.split([3, 1, 1, 4], dim=1):
        done += piece.shape[1]
        out, cache = layer(piece, mask[:, :done], past_key_value=cache, use_cache=True)
        expected, other = layer(piece, mask[:, :done], past_key_value=other, use_cache=True)
        assert torch.equal(cache.tokens, other.tokens)
        assert_close(out, expected, "output")
    assert type(cache) is QuantizedLatentCache
    assert len(cache) == cache.length == cache.seen == 9
    apart = (out - layer(x, mask)[0][:, 5:]).double().norm() / out.double().norm()
    assert 1e-5 < apart < 0.3


@every_format
@torch.no_grad()
def test_a_model_with_such_caches(form_of_cache: str) -> None:
    model = randomised(DeepseekV2ForCausalLM(SMALL))
    ids = torch.arange(9)[None] * 5
    caches, logits = [layer.self_attn.empty_cache(1, 9, form_of_cache) for layer in model.model.layers], []
    for piece in ids.split([4, 1, 4], dim=1):
        out, caches = model(piece, past_key_values=caches, use_cache=True)[:2]
        logits.append(out)
    others = [rounding_cache(layer.self_attn, 1, form_of_cache) for layer in model.model.layers]
    assert_close(torch.cat(logits, dim=1), model(ids, past_key_values=others, use_cache=True)[0], "logits")


def cache_with(form_of_cache: str, length: int = 3, capacity: int = 10, seed: int = 0) -> tuple[Any, Tensor]:
    attention = randomised(DeepseekV2Attention(SMALL, 1), torch.bfloat16)
    cache = attention.empty_cache(2, capacity, form_of_cache)
    new = random_tokens(cache.record, 20, seed=seed)
    return cache.append(new[:, :length]), new


def place_of(cache: LayerCache) -> int:
    return cache.stored.untyped_storage().data_ptr()


@every_format
def test_appending_within_the_room_copies_nothing(form_of_cache: str) -> None:
    cache, new = cache_with(form_of_cache)
    place, size = place_of(cache), sum(cache.record.parts)
    for length in range(3, 10):
        cache = cache.append(new[:, length : length + 1])
        assert place_of(cache) == place
        assert cache.nbytes == 2 * (length + 1) * size
        assert cache.reserved_nbytes == 2 * 10 * size == cache.stored.untyped_storage().nbytes()
    grown = cache.append(new[:, 10:15])
    assert place_of(grown) != place
    assert grown.reserved_nbytes > grown.nbytes == 2 * 15 * size
    assert torch.equal(grown.tokens, rounded(new[:, :15], 16, form_of_cache))


@every_format
def test_records_may_be_written_as_they_are(form_of_cache: str) -> None:
    cache, new = cache_with(form_of_cache)
    records, appended = cache.record.encode(new[:, 3:9]), cache.append(new[:, 3:9])
    cache, new = cache_with(form_of_cache)
    extended = cache.extended(6)
    extended.stored[:, 3:] = records
    assert torch.equal(extended.stored, appended.stored)
    assert (extended.length, extended.seen, cache.length) == (9, 9, 3)
    assert place_of(extended) == place_of(cache)


@every_format
def test_an_older_cache_keeps_its_value_and_goes_on_again(form_of_cache: str) -> None:
    old, new = cache_with(form_of_cache)
    before = old.stored.clone()
    first, second, third = old.append(new[:, 3:5]), old.append(new[:, 7:8]), old.append(new[:, 9:])
    assert place_of(first) == place_of(old) != place_of(second) != place_of(third)
    assert torch.equal(old.stored, before)
    expected = rounded(new, 16, form_of_cache)
    assert torch.equal(first.tokens, expected[:, :5])
    assert torch.equal(second.tokens, torch.cat((expected[:, :3], expected[:, 7:8]), dim=1))
    assert torch.equal(third.tokens, torch.cat((expected[:, :3], expected[:, 9:]), dim=1))


@every_format
def test_sequences_and_rows_are_chosen(form_of_cache: str) -> None:
    check_chosen_rows(form_of_cache)


def check_chosen_rows(form_of_cache: str) -> None:
    cache, new = cache_with(form_of_cache, length=6)
    expected = rounded(new, 16, form_of_cache)
    beams = cache.select(torch.tensor([1, 1, 0]))
    assert type(beams) is QuantizedLatentCache
    assert torch.equal(beams.tokens, expected[[1, 1, 0], :6])
    longer = beams.append(new[[0, 1, 1], 6:7])
    assert torch.equal(longer.tokens[:, 6:], expected[[0, 1, 1], 6:7])
    assert torch.equal(cache.tokens, expected[:, :6])
    kept = cache.keep(torch.tensor([[0, 4, 5]]))
    assert (kept.length, kept.nbytes) == (3, 2 * 3 * sum(cache.record.parts))
    assert kept.seen == 6, "the next token has another position"
    assert torch.equal(kept.tokens, expected[:, [0, 4, 5]])
    each = cache.keep(torch.tensor([[0, 1], [4, 5]])).append(new[:, 6:7])
    assert torch.equal(each.tokens[1], expected[1, [4, 5, 6]])
    assert (each.length, each.seen) == (3, 7)


@every_format
@both_forms
@torch.no_grad()
def test_beams_of_a_layer(form: str, form_of_cache: str) -> None:
    layer, x = layer_of(mla_form=form), tokens(2, 5, torch.float64)
    cache = layer(x[:, :4], past_key_value=layer.self_attn.empty_cache(2, 8, form_of_cache), use_cache=True)[1]
    beams = layer(x[[1, 1, 0], 4:], past_key_value=cache.select(torch.tensor([1, 1, 0])))[0]
    assert_close(beams, layer(x[:, 4:], past_key_value=cache)[0][[1, 1, 0]], "output")


@every_format
@pytest.mark.usefixtures("as_shipped")
@torch.no_grad()
def test_a_rejected_input_leaves_the_cache_unchanged(form_of_cache: str) -> None:
    layer, x = layer_of(torch.float32), tokens(2, 4, torch.float32)
    cache = layer(x, past_key_value=layer.self_attn.empty_cache(2, 8, form_of_cache), use_cache=True)[1]
    before, place = cache._storage.buffer.clone(), place_of(cache)
    for wrong in (x[:1], x.double(), x[..., 1:], x.to("meta")):
        with pytest.raises(ValueError, match=r"wanted"):
            layer(wrong, past_key_value=cache, use_cache=True)
    for wrong in (torch.zeros(2, 1, 23), torch.zeros(1, 1, 24), torch.zeros(2, 1, 24).half(), cache.stored):
        with pytest.raises(ValueError, match=r"past_key_value is .*; wanted one that fits the new tokens") as caught:
            cache.append(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"attention_mask is .*; wanted"):
        layer(x, torch.ones(2, 3), past_key_value=cache)
    assert torch.equal(cache._storage.buffer, before)
    assert (cache.length, cache._storage.used) == (4, 4)
    assert place_of(layer(x, past_key_value=cache, use_cache=True)[1]) == place


@every_format
def test_caches_of_others_are_rejected(form_of_cache: str) -> None:
    layer, x = layer_of(torch.float32), tokens(1, 1, torch.float32)
    others = {
        "dtype": layer_of(torch.bfloat16).self_attn.empty_cache(1, 1, form_of_cache),
        "layer": DeepseekV2Attention(SMALL, 0).empty_cache(1, 1, form_of_cache),
        "batch": layer.self_attn.empty_cache(2, 1, form_of_cache),
        "latents": DeepseekV2Attention(
            replace(SMALL, kv_lora_rank=12, qk_rope_head_dim=12), 1
        ).empty_cache(1, 1, form_of_cache),
    }  # fmt: skip
    for name, cache in others.items():
        with torch.no_grad(), pytest.raises(ValueError, match=r"past_key_value is QuantizedLatentCache\(.*\); wanted"):
            layer(x, past_key_value=cache)
        assert not len(cache), name


@every_format
@torch.no_grad()
def test_an_empty_cache(form_of_cache: str) -> None:
    attention = layer_of().self_attn
    cache = attention.empty_cache(2, format=form_of_cache)
    assert (len(cache), cache.nbytes, cache.reserved_nbytes) == (0, 0, 0)
    assert cache.tokens.shape == (2, 0, 24)
    assert cache.split(16)[1].shape == (2, 0, 8)
    size = 8 * 8 + 4 + (8 if form_of_cache == "int4" else 16)
    assert repr(cache) == f"QuantizedLatentCache(layer 1, (2, 0, {size}) torch.uint8 on cpu, 0 bytes)"
    assert cache.append(torch.zeros(2, 3, 24, dtype=torch.float64)).nbytes == 2 * 3 * size


@every_format
def test_growing_copies_each_token_five_times_at_most(form_of_cache: str) -> None:
    """As every cache: room grows by a quarter."""
    cache, new = cache_with(form_of_cache, length=0, capacity=0)
    copied = 0
    for length in range(400):
        place = place_of(cache)
        cache = cache.append(new[:, length % 20 : length % 20 + 1])
        copied += length * (place_of(cache) != place)
    assert copied <= 5 * 400
    assert torch.equal(cache.tokens[:, 380:], rounded(new, 16, form_of_cache))


MODES: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": nullcontext}


@every_format
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_modes_can_be_mixed(first: str, second: str, form_of_cache: str) -> None:
    layer, x = layer_of().requires_grad_(False), tokens(1, 4, torch.float64)
    with MODES[first]():
        _, cache = layer(x[:, :2], past_key_value=layer.self_attn.empty_cache(1, 8, form_of_cache), use_cache=True)
    with MODES[second]():
        out, cache = layer(x[:, 2:3], past_key_value=cache, use_cache=True)
    with MODES[first]():
        last, _ = layer(x[:, 3:], past_key_value=cache, use_cache=True)
    other = rounding_cache(layer.self_attn, 1, form_of_cache)
    expected = layer(x, past_key_value=other)[0][:, 2:]
    assert_close(torch.cat((out, last), dim=1), expected, "output")


def saved_and_loaded(cache: LayerCache) -> LayerCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_format
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_goes_on_by_itself(copied: Callable[[Any], Any], form_of_cache: str) -> None:
    cache, new = cache_with(form_of_cache)
    twin = copied(cache)
    assert place_of(twin) != place_of(cache)
    assert torch.equal(twin.stored, cache.stored)
    cache.append(-new[:, 3:4])
    assert torch.equal(twin.append(new[:, 3:4]).tokens, rounded(new[:, :4], 16, form_of_cache))


@every_format
def test_a_scale_is_never_frozen(form_of_cache: str) -> None:
    check_scales_are_never_frozen(form_of_cache)


def check_scales_are_never_frozen(form_of_cache: str) -> None:
    """A later token 1,000 times as large is as right as it would have been alone, and a later small one, too."""
    cache, new = cache_with(form_of_cache)
    before, size = cache.stored.clone(), SMALL.kv_lora_rank
    for factor in (1000, 1e-3):
        later = new[:, 3:4] * factor
        longer = cache.append(later)
        alone = cache.record.decode(cache.record.encode(later))
        assert torch.equal(longer.tokens[:, 3:], alone), "a later token has another scale than alone"
        expected = rounded(later, size, form_of_cache)
        assert torch.equal(alone, expected), "a later token has another scale than its own"
        off = (alone - later)[..., :size].double().abs().amax(-1)
        assert (off <= later[..., :size].double().abs().amax(-1) * 2**-3).all()
        assert torch.equal(longer.stored[:, :3], before)
    assert torch.equal(cache.append(new[:, 3:6]).stored[:, 3:4], cache.append(new[:, 3:4]).stored[:, 3:4])


@every_format
@pytest.mark.usefixtures("as_shipped")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_derivatives_are_rejected_rather_than_lost(form_of_cache: str) -> None:
    layer, x = layer_of(), tokens(1, 2, torch.float64)
    cache = layer.self_attn.empty_cache(1, 4, form_of_cache)
    message = (
        r"what is to be cached is .*; wanted no derivatives: a cache in fewer bits gives none, use torch.no_grad()"
    )
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        layer(x, past_key_value=cache, use_cache=True)
    assert "\n" not in str(caught.value)
    layer.requires_grad_(False)
    attempts: list[Callable[[], Any]] = [
        lambda: layer(x.clone().requires_grad_(), past_key_value=cache),
        lambda: torch.func.jvp(lambda y: layer(y, past_key_value=cache)[0], (x,), (x,)),
        lambda: torch.func.vmap(lambda y: layer(y, past_key_value=cache)[0])(torch.stack((x, x))),
        lambda: torch.func.grad(lambda y: layer(y, past_key_value=cache)[0].sum())(x),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="wanted no derivatives"):
            attempt()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="wanted no derivatives"):
        layer(forward_ad.make_dual(x, x), past_key_value=cache)
    assert (cache.length, cache._storage.used, int(cache._storage.buffer.sum())) == (0, 0, 0)
    assert layer(x, past_key_value=cache, use_cache=True)[1].length == 2


def test_derivatives_of_queries_over_cached_keys() -> None:
    """What is trained may stand after the cache: the records need none."""
    layer, x = layer_of(), tokens(1, 2, torch.float64)
    layer.input_layernorm.requires_grad_(False)
    for name, parameter in layer.self_attn.named_parameters():
        parameter.requires_grad_(name.startswith("q_"))
    out = layer(x, past_key_value=layer.self_attn.empty_cache(1, 4, "int8"), use_cache=True)[0]
    out.sum().backward()
    gradient = layer.self_attn.q_a_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_autocast_treats_both_kinds_of_cache_alike() -> None:
    layer, x = layer_of(torch.float32), tokens(1, 2, torch.float32)

    def run(cache: Any) -> str:
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return str(layer(x, past_key_value=cache)[0].dtype)
        except ValueError as error:
            return re.sub(r"past_key_value is \S+\(.*\);", "", str(error))

    assert run(layer.self_attn.empty_cache(1, 4, "fp8")) == run(layer.self_attn.empty_cache(1, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(1, 1, "fp4"), "format is 'fp4'; wanted None or one of fp8, int"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(1, 1, 8), "format is 8; wanted None or one of fp8, int8, int4"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(0, 1, "fp8"), "batch is 0; wanted at least one"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(1, -1, "fp8"), "capacity is -1; wanted room"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(1.5, 1, "fp8"), "batch is 1.5; wanted at least one"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache("1", 1), "batch is '1'; wanted at least one"),
        (lambda: DeepseekV2Attention(SMALL, 0).empty_cache(1, None), "capacity is None; wanted room for 0 or more"),
        (lambda: cache_with("fp8")[0].select([0, 1]), "sequences is a list of 2; wanted a tensor"),
        (lambda: cache_with("fp8")[0].select(torch.tensor([0, 2])), "sequences is beyond the batch .*; wanted from 0 to 1"),
        (lambda: cache_with("fp8")[0].select(torch.tensor([-1])), "sequences is beyond the batch .*; wanted from 0 to 1"),
        (lambda: cache_with("fp8")[0].select(torch.tensor([True])), r"sequences is .*bool .*; wanted integers \(chosen,\)"),
        (
            lambda: DeepseekV2Attention(replace(SMALL, kv_lora_rank=15), 0).empty_cache(1, 1, "int4"),
            "format is 'int4'; wanted fp8 or int8: the latent of 15 features cannot be halved",
        ),
        (
            lambda: KeyValueCache.of(MultiHeadAttention(replace(SMALL, use_mla=False), 0), 1, 1, "fp8"),
            "format is 'fp8'; wanted None: only `empty_cache` of latent attention has formats",
        ),
        (
            lambda: LatentCache.of(DeepseekV2Attention(SMALL, 0), 1, 1, "fp8"),
            "format is 'fp8'; wanted None: only `empty_cache` of latent attention has formats",
        ),
        (lambda: cache_with("fp8")[0].keep(torch.tensor([[3]])), "rows is beyond the cached tokens somewhere; wanted from"),
        (lambda: cache_with("fp8")[0].keep(torch.tensor([[0]]).short()), r"rows is .*int16 .*; wanted integers"),
        (lambda: cache_with("fp8")[0].keep(torch.tensor([[0]]).cfloat()), r"rows is .*complex64 .*; wanted integers"),
        (lambda: cache_with("fp8")[0].keep(torch.tensor([0])), r"rows is \(1,\) .*; wanted integers \(1 or 2, kept\)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("as_shipped")
def test_what_is_rejected(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# A peer


def test_the_cache_of_transformers_freezes_one_scale_for_all() -> None:
    """The trap in numbers. Its scale is that of the first call's largest element, one for the whole tensor: what comes
    later and is larger becomes that element. The rope key is rounded with the rest. And the first call attends to
    tokens that were not rounded, though they are stored so."""
    record = Record("fp8", 128, 64, torch.float32)
    first, later = random_tokens(record, 40, 1), 1000 * random_tokens(record, 1, 1, seed=1)
    theirs: Any = QuantizedCache("fp8", native_config(SMALL))
    returned, _ = theirs.update(first[:, None], first[:, None], 0)
    assert torch.equal(returned[:, 0], first)
    returned = theirs.update(later[:, None], later[:, None], 0)[0][:, 0]
    ours = record.decode(torch.cat((record.encode(first), record.encode(later)), dim=1))
    assert theirs.layers[0]._quantized_keys[1].numel() == 1

    def apart(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    saturated = first.abs().max()
    assert (returned[:, 40:].abs().nan_to_num() <= saturated * (1 + 2**-20)).all()
    assert not apart(returned[:, 40:], later) < 0.5  # NaN where torch does not saturate
    assert apart(ours[:, 40:], later) < 2**-4
    rope = slice(128, None)
    assert 2**-7 < apart(returned[:, :40, rope], first[..., rope]) < 2**-4
    assert torch.equal(ours[:, :40, rope], first[..., rope])
    # Per token: a small token keeps its bits beside a large one.
    small = first.abs().amax(-1)[0].argmin()
    assert apart(returned[:, small], first[:, small]) > apart(ours[:, small], first[:, small])
