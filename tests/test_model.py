"""The stack against transformers' own, its caches, its names, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from dsv2_ref import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV2Model, rope
from tests.peers import (
    COMMON,
    SMALL,
    assert_close,
    assert_same_gradients,
    inside,
    native_config,
    native_of,
    randomised,
    with_weights_of,
)

# The roundings of `peers.ROUNDINGS` are those of one layer. Here two follow one another, and a norm and a head, each
# fed with what the one before rounded: the largest distance measured was 14 roundings in float32 and 12 in float64.
STACKED_ROUNDINGS = 80


def ids(batch: int, seq: int, vocab: int = SMALL.vocab_size) -> Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(3))


def model(config: DeepseekV2Config = SMALL, dtype: torch.dtype = torch.float64) -> DeepseekV2ForCausalLM:
    return randomised(DeepseekV2ForCausalLM(config), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", COMMON)
def test_logits_and_gradients_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    ours = model(COMMON[name], dtype)
    with inside(dtype):  # rotary frequencies are kept from the start
        theirs = with_weights_of(ours, native_of(COMMON[name]).causal_lm(native_config(COMMON[name])))
    logits, _ = ours(ids(2, 9))
    with inside(dtype):
        expected = theirs(ids(2, 9), use_cache=False).logits
    assert_close(logits, expected, "logits", STACKED_ROUNDINGS)
    for module, output in ((ours, logits), (theirs, expected)):
        module.zero_grad()
        output.log_softmax(-1)[..., 0].sum().backward()
    assert_same_gradients(ours, theirs, STACKED_ROUNDINGS)


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}], ids=["plain", "dynamic"])
@pytest.mark.parametrize("use_mla", [True, False], ids=["mla", "mha"])
@torch.no_grad()
def test_positions_are_turned_into_tables_once_for_all_layers(
    use_mla: bool, scaling: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every layer computes what it would with tables of its own, also beyond the length that scaling depends on."""
    config = replace(SMALL, use_mla=use_mla, rope_scaling=scaling, max_position_embeddings=8)
    ours, tokens, made = model(config), ids(2, 14), []
    tables = rope.rotary_tables
    monkeypatch.setattr(rope, "rotary_tables", lambda *args, **kwargs: made.append(1) or tables(*args, **kwargs))
    places = torch.arange(20, 34).expand(2, -1)
    for position_ids in (None, places):
        made.clear()
        logits, caches = ours(
            tokens[:, :9], position_ids=None if position_ids is None else places[:, :9], use_cache=True
        )
        after, _ = ours(tokens[:, 9:], None, None if position_ids is None else places[:, 9:], caches)
        assert len(made) == 2
        x, y = (ours.model.embed_tokens(part) for part in (tokens[:, :9], tokens[:, 9:]))
        for layer in ours.model.layers:
            x, cache = layer(x, position_ids=None if position_ids is None else places[:, :9], use_cache=True)
            (y,) = layer(y, position_ids=None if position_ids is None else places[:, 9:], past_key_value=cache)
        for stream, expected in ((x, logits), (y, after)):
            assert torch.equal(ours.lm_head(ours.model.norm(stream)), expected)


class AsBefore(nn.Module):
    """What a user puts around a layer or its attention: it knows no tables, and casts what it is given."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.layer_idx = getattr(inner, "layer_idx", 0)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_value: Any = None,
        output_attentions: bool = False, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        return self.inner(hidden_states, attention_mask, position_ids, past_key_value, output_attentions, use_cache)


def casting(layer: nn.Module, sharded: bool = True) -> None:
    """As a layer that is sharded with mixed precision: another class, and all it is given in bfloat16."""

    def cast(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, (args, kwargs))

    if sharded:
        layer.__class__ = type("Sharded", (type(layer),), {})
    layer.register_forward_pre_hook(cast, with_kwargs=True)


CHANGES: dict[str, Callable[[DeepseekV2Model], Any]] = {
    "as made": lambda model: None,
    "a layer replaced": lambda model: model.layers.__setitem__(1, AsBefore(model.layers[1])),
    "an attention replaced": lambda model: setattr(model.layers[1], "self_attn", AsBefore(model.layers[1].self_attn)),
    "another theta": lambda model: setattr(model.layers[1].self_attn, "config", replace(model.config, rope_theta=77.0)),
    "sharded": lambda model: casting(model.layers[1]),
    "a hook that casts": lambda model: casting(model.layers[1], sharded=False),
    "a hook that moves positions": lambda model: model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args[:1], kwargs | {"position_ids": 3 * torch.arange(args[0].shape[1])[None]}),
        with_kwargs=True,
    ),
    "a forward of its own": lambda model: setattr(
        model.layers[1], "forward", AsBefore(model.layers[1].forward).forward
    ),
    "fewer tokens from layer 1 on": lambda model: model.layers[0].register_forward_hook(
        lambda _, __, out: (out[0][:, 2:], *out[1:])
    ),
    "double layers under single embeddings": lambda model: model.embed_tokens.float(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_layer_that_is_not_as_made_makes_its_own_tables(change: str, as_shipped: None) -> None:
    """It computes what it computes alone, whatever the model makes for the others."""
    ours = model(dtype=torch.bfloat16 if change in ("sharded", "a hook that casts") else torch.float64).model
    CHANGES[change](ours)
    tokens = ids(2, 9)
    found, _ = ours(tokens)
    expected = ours.embed_tokens(tokens)
    for layer in ours.layers:
        expected = layer(expected)[0]
    assert torch.equal(found, ours.norm(expected))


@torch.no_grad()
def test_caches_may_have_seen_different_numbers_of_tokens() -> None:
    """Each layer goes on after those of its own cache."""
    ours, tokens = model(), ids(2, 4)
    _, caches = ours(tokens, use_cache=True)
    _, longer = ours(tokens, past_key_values=caches, use_cache=True)
    found, _ = ours(tokens[:, :1], past_key_values=(caches[0], longer[1]))
    x = ours.model.embed_tokens(tokens[:, :1])
    for layer, cache in zip(ours.model.layers, (caches[0], longer[1]), strict=True):
        (x,) = layer(x, past_key_value=cache)
    assert torch.equal(found, ours.lm_head(ours.model.norm(x)))


@pytest.mark.parametrize("use_mla", [True, False], ids=["mla", "mha"])
@pytest.mark.parametrize("pieces", [(9,), (4, 4, 1), (1,) * 9], ids=str)
def test_any_chunking_through_the_caches_equals_one_pass(pieces: tuple[int, ...], use_mla: bool) -> None:
    ours = model(replace(SMALL, use_mla=use_mla))
    tokens = ids(2, 9)
    expected, nothing = ours(tokens)
    assert nothing is None
    outputs, caches = [], None
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits, caches = ours(piece, past_key_values=caches, use_cache=True)
            outputs.append(logits)
    # One pass and many add the same numbers in another order, in float64.
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-10, atol=1e-10)
    assert [cache.layer_idx for cache in caches] == list(range(SMALL.num_hidden_layers))
    assert {cache.length for cache in caches} == {9}


def test_a_padded_sequence_gives_the_logits_it_gives_alone() -> None:
    ours, tokens = model(), ids(2, 8)
    keep = torch.arange(8) >= torch.tensor([[0], [3]])
    places = (keep.cumsum(1) - 1).clamp(min=0)
    together, _ = ours(tokens, attention_mask=keep, position_ids=places)
    alone, _ = ours(tokens[1:, 3:])
    torch.testing.assert_close(together[1:, 3:], alone, rtol=1e-10, atol=1e-10)


def test_generate_continues_by_the_most_probable_token() -> None:
    ours, tokens = model(), ids(2, 5)
    out = ours.generate(tokens, 6)
    assert out.shape == (2, 11)
    expected = tokens
    for _ in range(6):  # without a cache
        expected = torch.cat((expected, ours(expected)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(out, expected)
    assert torch.equal(ours.generate(tokens, 0), tokens)


def test_state_dict_speaks_the_published_names() -> None:
    names = set(DeepseekV2ForCausalLM(SMALL).state_dict())
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.experts.11.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names


def test_the_head_is_the_embedding_where_they_are_tied() -> None:
    tied = DeepseekV2ForCausalLM(replace(SMALL, tie_word_embeddings=True))
    free = DeepseekV2ForCausalLM(SMALL)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    spared = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters())
    assert spared == SMALL.vocab_size * SMALL.hidden_size


def test_logits_of_a_bfloat16_model_are_float32() -> None:
    logits, _ = model(dtype=torch.bfloat16)(ids(1, 3))
    assert logits.dtype == torch.float32


def test_embedding_and_head_begin_as_the_published_ones() -> None:
    # Of 4096 x 48 normal numbers, the deviation is known to 0.2 % (one in 441 is the standard error); 2 % is ten of them.
    wide = DeepseekV2ForCausalLM(replace(SMALL, vocab_size=4096))
    for weight in (wide.lm_head.weight, wide.model.embed_tokens.weight):
        assert abs(weight.std().item() / SMALL.initializer_range - 1) < 0.02


def test_what_does_not_fit_is_refused_and_changes_no_cache(as_shipped: None) -> None:
    ours, tokens = model(), ids(2, 4)
    with torch.no_grad():
        _, caches = ours(tokens, use_cache=True)
        before = [cache.tokens.clone() for cache in caches]
        for wrong, message in (
            ({"input_ids": tokens.float()}, r"input_ids is \(2, 4\) torch.float32 on cpu; wanted integers"),
            ({"input_ids": tokens[0]}, r"input_ids is \(4,\)"),
            ({"input_ids": tokens[:, :0]}, "at least one token"),
            ({"past_key_values": caches[:1]}, "past_key_values is a tuple of 1; wanted a cache for each of 2 layers"),
            ({"past_key_values": caches[::-1]}, "past_key_value is LatentCache"),
            ({"past_key_values": 2}, "past_key_values is 2; wanted a cache for each of 2 layers, or None"),
            ({"past_key_values": torch.ones(2, 4)}, r"past_key_values is \(2, 4\) .*; wanted a cache for each"),
            ({"use_cache": tokens}, r"use_cache is \(2, 4\) torch.int64 on cpu; wanted True or False"),
        ):
            with pytest.raises(ValueError, match=message):
                ours(**{"input_ids": tokens, "past_key_values": caches, **wrong})
        with pytest.raises(ValueError, match="max_new_tokens is -1; wanted 0 or more tokens"):
            ours.generate(tokens, -1)
    assert all(torch.equal(cache.tokens, old) for cache, old in zip(caches, before, strict=True))
    with pytest.raises(TypeError, match="input_ids"):
        DeepseekV2Model(SMALL)([[1, 2]])


# Checkpoints of a tied model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = replace(SMALL, tie_word_embeddings=True)


class Wrapper(nn.Module):
    """What a training framework puts around a model: every name gets a prefix."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def check_tied(model: DeepseekV2ForCausalLM, matrix: Tensor) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, matrix)
    assert sum(parameter is model.lm_head.weight for parameter in model.parameters()) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # one matrix, whoever changes it
    assert torch.equal(model.model.embed_tokens.weight, 2 * matrix)


@pytest.mark.parametrize("left_out", [[], [HEAD], [EMBEDDING]], ids=["both", "no head", "no embedding"])
@pytest.mark.parametrize(("start", "assign"), [("memory", False), ("memory", True), ("meta", True)])
@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "within a module"])
def test_a_tied_checkpoint_may_hold_either_name(left_out: list[str], assign: bool, start: str, wrapped: bool) -> None:
    state = randomised(DeepseekV2ForCausalLM(TIED), torch.float32, seed=1).state_dict()
    matrix = state[EMBEDDING].clone()
    state = {name: weight.clone() for name, weight in state.items() if name not in left_out}
    with torch.device("meta" if start == "meta" else "cpu"):
        model = DeepseekV2ForCausalLM(TIED)
    given = set(state)
    into: nn.Module = model
    if wrapped:
        into, state = Wrapper(model), {f"module.{name}": weight for name, weight in state.items()}
    keys = into.load_state_dict(state, strict=True, assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert {name.removeprefix("module.") for name in state} == given  # the caller's dict is as it was
    assert not any(parameter.is_meta for parameter in model.parameters())
    check_tied(model, matrix)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "within a module"])
def test_a_tied_checkpoint_with_two_matrices_is_refused(assign: bool, wrapped: bool) -> None:
    """One of them would be lost in silence."""
    model: nn.Module = DeepseekV2ForCausalLM(TIED)
    prefix = ""
    if wrapped:
        model, prefix = Wrapper(model), "module."
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    state[prefix + HEAD] = state[prefix + HEAD] + 1
    with pytest.raises(RuntimeError, match=rf"{prefix}lm_head.weight and {prefix}model.embed_tokens.weight: .*tied"):
        model.load_state_dict(state, assign=assign)


def test_a_tied_checkpoint_without_either_matrix_names_what_is_missing() -> None:
    model = DeepseekV2ForCausalLM(TIED)
    state = {name: weight for name, weight in model.state_dict().items() if name not in (EMBEDDING, HEAD)}
    with pytest.raises(RuntimeError, match=r'Missing key.*"model.embed_tokens.weight"'):
        model.load_state_dict(state)
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {EMBEDDING, HEAD}


def test_a_free_head_is_not_made_up() -> None:
    model = DeepseekV2ForCausalLM(SMALL)
    state = model.state_dict()
    del state[HEAD]
    with pytest.raises(RuntimeError, match=r'Missing key.*"lm_head.weight"'):
        model.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_tied_shards_one_after_the_other(assign: bool) -> None:
    state = randomised(DeepseekV2ForCausalLM(TIED), torch.float32, seed=1).state_dict()
    matrix = state.pop(HEAD).clone()
    names = sorted(state)
    model = DeepseekV2ForCausalLM(TIED)
    for part in (names[::2], names[1::2]):
        shard = {name: state[name].clone() for name in part}
        keys = model.load_state_dict(shard, strict=False, assign=assign)
        assert not keys.unexpected_keys
    check_tied(model, matrix)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_tied_model_is_tied_to_itself(copied: Any) -> None:
    model = randomised(DeepseekV2ForCausalLM(TIED), torch.float32)
    twin = copied(model)
    assert twin.lm_head.weight is not model.lm_head.weight
    state = randomised(DeepseekV2ForCausalLM(TIED), torch.float32, seed=1).state_dict()
    del state[HEAD]
    twin.load_state_dict(state, assign=True)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not torch.equal(twin.lm_head.weight, model.lm_head.weight)


def test_a_tied_model_through_functional_call_and_to_another_dtype() -> None:
    model = randomised(DeepseekV2ForCausalLM(TIED))
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    logits = functional_call(model, weights, (ids(1, 4),))[0]
    assert torch.equal(logits, model(ids(1, 4))[0])
    logits.sum().backward()
    model(ids(1, 4))[0].sum().backward()
    assert_close(weights[EMBEDDING].grad, model.lm_head.weight.grad, "both uses of the matrix")
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.device("meta"):
        empty = DeepseekV2ForCausalLM(TIED)
    empty.to_empty(device="cpu")  # torch gives each name a memory of its own, until weights come
    empty.load_state_dict(model.state_dict())
    assert empty.lm_head.weight is empty.model.embed_tokens.weight


# What is refused


@pytest.mark.parametrize("token", [-1, SMALL.vocab_size])
def test_tokens_outside_of_the_vocabulary(token: int) -> None:
    tokens = torch.tensor([[1, token]])
    for call in (model(), model().model, lambda tokens: model().generate(tokens, 1)):
        with pytest.raises(ValueError, match=r"input_ids is outside of the vocabulary somewhere; wanted .* 0 to 63"):
            call(tokens)


@pytest.mark.parametrize("build", [DeepseekV2ForCausalLM, DeepseekV2Model])
def test_a_dict_is_no_configuration(build: Any, as_shipped: None) -> None:
    with pytest.raises(ValueError, match=r"config is a dict; wanted a DeepseekV2Config.*from_published"):
        build(SMALL.to_dict())
