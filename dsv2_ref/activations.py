"""The memory of activations: the layer's own operations in their order, told in sizes.

Each function mirrors one of the reference (the plain PyTorch that defines it, not a fused kernel of ours) and holds what that
holds, as long: the float32 copies inside a norm, the copies of the scores in eager attention, the float32 sum of experts.
*Fused* attention (``sdpa``, ``flash_attention_2``) holds queries, keys, values, its result and a float32 number for each
query and head, but no scores. Not counted: weights, their gradients and the optimizer, the call's input, what the cache has
room for, the loss, and what a kernel uses inside.
"""

from dataclasses import dataclass

from dsv2_ref.config import DeepseekV2Config
from dsv2_ref.ledger import Gradients, Ledger, Sized

INTEGER = 8
"""Bytes of an index."""

SCORES_AT_ONCE = 2**24
"""Scores of a block of queries that may be in memory together, as in the reference's attention."""


Tables = tuple[Sized, Sized]
"""Cosines and sines."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Sizes of a pass: ``batch`` sequences of ``seq`` new tokens over ``kv``, in numbers of ``width`` bytes."""

    config: DeepseekV2Config
    batch: int
    seq: int
    kv: int
    width: int
    absorbed: bool

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.seq

    @property
    def wide(self) -> int:
        """Bytes of a number where at least float32 is used."""
        return max(4, self.width)

    @property
    def eager(self) -> bool:
        """Whether all scores of a layer are held at once."""
        return self.config._attn_implementation == "eager"


def _norm(ledger: Ledger, x: Sized, features: int, wide: int) -> Sized:
    tokens, width = x.count // features, x.width
    x = ledger.cast(x, wide)
    x = ledger.times(x, _root_mean_square(ledger, x, tokens))
    return ledger.times_weight(ledger.cast(x, width))


def _root_mean_square(ledger: Ledger, x: Sized, tokens: int) -> Sized:
    mean = ledger.make(tokens, x.width, _square(ledger, x))
    return ledger.softmax(ledger.make(tokens, x.width, mean))


def _square(ledger: Ledger, x: Sized) -> Sized:
    count, width = x.count, x.width

    def rule(_: Gradients) -> Gradients:
        twice = [ledger.make(count, width) for _ in range(2)]
        return [ledger.make(twice[0].count, width)]

    return ledger.make(count, width, x, keep=[x], rule=rule)


def _rotated(ledger: Ledger, x: Sized, tables: Tables) -> Sized:
    width, half = x.width, x.count // 2
    first, second = ledger.split(ledger.cast(x, tables[0].width), half, half)
    cos, sin = tables
    return ledger.cast(
        ledger.join(_turned(ledger, first, cos, second, sin), _turned(ledger, first, sin, second, cos)), width
    )


def _turned(ledger: Ledger, first: Sized, by: Sized, second: Sized, and_by: Sized) -> Sized:
    return ledger.add(ledger.scaled(first, by), ledger.scaled(second, and_by))


def _mlp(ledger: Ledger, x: Sized, hidden: int, wide: int) -> Sized:
    gated = ledger.times(
        ledger.mapped(ledger.linear(x, hidden, wide)),
        ledger.linear(x, hidden, wide),
    )
    return ledger.linear(gated, wide, hidden)


def _gate(ledger: Ledger, p: Pass, x: Sized) -> tuple[Sized, Sized, Sized | None]:
    """Chosen experts, their weights and, where gradients are wanted, the loss."""
    config = p.config
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    scores = _router_scores(ledger, p, x)
    index = _choice(ledger, p, scores.width, p.tokens * chosen)
    weight = ledger.gathered(scores, p.tokens * chosen, index)
    if config.norm_topk_prob and chosen > 1:
        weight = ledger.times(weight, ledger.make(p.tokens, weight.width, ledger.make(p.tokens, weight.width, weight)))
    weight = ledger.scaled(weight)
    loss = None
    if ledger.recording and config.aux_loss_alpha > 0:
        parts = p.batch if config.seq_aux else 1
        frequency = ledger.make(parts * experts, scores.width)
        mean = ledger.make(parts * experts, scores.width, scores)
        loss = ledger.make(1, scores.width, ledger.times(mean, frequency))
    return index, weight, loss


def _router_scores(ledger: Ledger, p: Pass, x: Sized) -> Sized:
    experts, hidden = p.config.n_routed_experts or 0, p.config.hidden_size
    rows = ledger.cast(x, p.wide)
    if p.width == p.wide:
        return ledger.softmax(ledger.linear(rows, hidden, experts))
    weight = ledger.make(experts * hidden, p.wide)
    count = p.tokens * experts

    def rule(_: Gradients) -> Gradients:
        of_weight = ledger.make(experts * hidden, p.wide)
        return [ledger.make(p.tokens * hidden, of_weight.width)]

    logits = ledger.make(count, p.wide, rows, keep=[rows, weight], rule=rule)
    del rows, weight
    return ledger.softmax(logits)


def _choice(ledger: Ledger, p: Pass, width: int, count: int) -> Sized:
    config = p.config
    groups = (config.n_group or 1) if config.topk_method == "group_limited_greedy" else 1
    if groups > 1 and config.topk_group != groups:
        kept = ledger.make(p.tokens * groups, 1)
        masked = ledger.make(p.tokens * (config.n_routed_experts or 0), width)
        del kept
        values = ledger.make(count, masked.width)
        return ledger.make(values.count, INTEGER)
    values = ledger.make(count, width)
    return ledger.make(values.count, INTEGER)


def _experts(ledger: Ledger, p: Pass, x: Sized, index: Sized, weight: Sized) -> Sized:
    config = p.config
    order, *ends = _sorted(ledger, index.count, config.n_routed_experts or 0)
    rows = ledger.gathered(x, index.count * config.hidden_size, ledger.make(index.count, INTEGER))
    out = _grouped(ledger, p, rows, ends[-1])
    del rows
    places = _sorted(ledger, index.count, 0)[0]
    size = p.tokens * config.hidden_size

    def weighted() -> Sized:
        return ledger.times(ledger.gathered(out, size, places), ledger.part(weight, p.tokens))

    total = weighted()
    for _ in range(1, config.num_experts_per_tok or 0):
        total = ledger.add(total, weighted())
    del order
    return ledger.cast(total, p.width)


def _sorted(ledger: Ledger, count: int, groups: int) -> list[Sized]:
    """Places of sorted numbers, and how many each of the groups has and where it ends."""
    values = ledger.make(count, INTEGER)
    return [ledger.make(values.count, INTEGER), ledger.make(groups, INTEGER), ledger.make(groups, 4)]


def _grouped(ledger: Ledger, p: Pass, rows: Sized, ends: Sized) -> Sized:
    hidden, wide = p.config.hidden_size, p.config.moe_intermediate_size
    half = rows.count // hidden * wide
    gate, up = ledger.split(ledger.linear(rows, hidden, 2 * wide, ends), half, half)
    return ledger.linear(ledger.times(ledger.mapped(gate), up), wide, hidden, ends)


def _moe(ledger: Ledger, p: Pass, x: Sized) -> Sized:
    config = p.config
    index, weight, loss = _gate(ledger, p, x)
    out = _experts(ledger, p, x, index, weight)
    if loss is not None:
        out = ledger.injected(out, loss)
    if config.n_shared_experts is None:
        return out
    wide = config.n_shared_experts * config.moe_intermediate_size
    return ledger.add(out, _mlp(ledger, x, config.hidden_size, wide))


def _attention(ledger: Ledger, p: Pass, x: Sized) -> Sized:
    """The result of attention, from a normalised input."""
    config = p.config
    rotary = config.qk_rope_head_dim if config.use_mla else config.hidden_size // config.num_attention_heads
    tables = ledger.make(p.seq * rotary // 2, p.wide), ledger.make(p.seq * rotary // 2, p.wide)
    return (_latent_attention if config.use_mla else _multi_head_attention)(ledger, p, x, tables)


Attended = tuple[Sized, Sized | None]
"""The heads' results, and the weights where all are held."""


def _output(ledger: Ledger, p: Pass, out: Sized, in_order: bool) -> Sized:
    """The last projection, of heads side by side."""
    if not in_order and p.seq > 1 and p.config.num_attention_heads > 1:
        out = ledger.copied(out)
    return ledger.linear(out, out.count // p.tokens, p.config.hidden_size)


def _multi_head_attention(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> Sized:
    config, hidden, heads = p.config, p.config.hidden_size, p.config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    query, key, value = (ledger.linear(x, hidden, n * hidden // heads) for n in (heads, kv_heads, kv_heads))
    query, key = _rotated(ledger, query, tables), _rotated(ledger, key, tables)
    present = ledger.join(key, value)
    if p.kv > p.seq:
        present = Sized(None, present.count // p.seq * p.kv, p.width)
    keys, values = (ledger.part(present, present.count // 2) for _ in range(2))
    if p.eager:
        out, weights = _eager_grouped(ledger, p, query, keys, values, heads // kv_heads)
    else:
        out, weights = _fused(ledger, p, ledger.reordered(query), keys, values), None
    made = _output(ledger, p, out, in_order=not p.eager)
    del query, key, value, weights
    return made


def _eager_grouped(ledger: Ledger, p: Pass, query: Sized, key: Sized, value: Sized, shared_by: int) -> Attended:
    strided = p.batch > 1 and p.config.num_attention_heads > 1
    if shared_by > 1:
        key, value = (ledger.make(x.count * shared_by, x.width, x) for x in (key, value))
    return _eager(ledger, p, query, key, value, (strided and p.seq > 1, *[strided and shared_by == 1] * 2))


def _latent_attention(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> Sized:
    q_nope, q_pe = _queries(ledger, p, x, tables)
    present = _compressed(ledger, p, x, tables)
    if p.kv > p.seq:
        present = Sized(None, present.count // p.seq * p.kv, p.width)
    attend = _absorbed if p.absorbed else _expanded
    out, weights = attend(ledger, p, q_nope, q_pe, present)
    padded = p.config.qk_nope_head_dim + p.config.qk_rope_head_dim != p.config.v_head_dim
    made = _output(ledger, p, out, in_order=not (p.eager or p.absorbed or padded))
    del q_nope, q_pe, present, weights
    return made


def _queries(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> tuple[Sized, Sized]:
    config, heads = p.config, p.tokens * p.config.num_attention_heads
    inputs, width = config.hidden_size, config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank is not None:
        x = _norm(ledger, ledger.linear(x, inputs, config.q_lora_rank), config.q_lora_rank, p.wide)
        inputs = config.q_lora_rank
    query = ledger.reordered(ledger.linear(x, inputs, config.num_attention_heads * width))
    q_nope, q_pe = ledger.split(query, heads * config.qk_nope_head_dim, heads * config.qk_rope_head_dim)
    return q_nope, _rotated(ledger, q_pe, tables)


def _compressed(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> Sized:
    latent, rope = p.config.kv_lora_rank or 0, p.config.qk_rope_head_dim
    both = ledger.linear(x, p.config.hidden_size, latent + rope)
    compressed_kv, k_pe = ledger.split(both, p.tokens * latent, p.tokens * rope)
    return ledger.join(_norm(ledger, compressed_kv, latent, p.wide), _rotated(ledger, k_pe, tables))


def _expanded(ledger: Ledger, p: Pass, q_nope: Sized, q_pe: Sized, present: Sized) -> Attended:
    config, heads = p.config, p.config.num_attention_heads
    latent, rope, keys = config.kv_lora_rank or 0, config.qk_rope_head_dim, p.batch * p.kv
    nope, value_width = config.qk_nope_head_dim, config.v_head_dim
    compressed_kv, k_pe = ledger.part(present, keys * latent), ledger.part(present, keys * rope)
    kv = ledger.reordered(ledger.linear(compressed_kv, latent, heads * (nope + value_width)))
    k_nope, value = ledger.split(kv, keys * heads * nope, keys * heads * value_width)
    for_all = ledger.view(k_pe, keys * heads * rope, ledger.fresh(k_pe) if heads > 1 else None)
    key = ledger.join(k_nope, for_all)
    if p.eager:
        strided = p.batch > 1 and p.kv > 1 and heads > 1
        return _eager(ledger, p, ledger.join(q_nope, q_pe), key, value, (False, False, strided))
    return _fused(ledger, p, ledger.join(q_nope, q_pe), key, value), None


def _eager(
    ledger: Ledger, p: Pass, query: Sized, key: Sized, value: Sized, strided: tuple[bool, bool, bool]
) -> Attended:
    """The definition. Products first copy what is ``strided``: whose sequences and heads do not follow each other."""

    def laid_out(x: Sized, place: int) -> Sized:
        return ledger.copied(x) if strided[place] else x

    pairs = p.batch * p.config.num_attention_heads * p.seq * p.kv
    scores = ledger.product(laid_out(query, 0), laid_out(key, 1), pairs)
    weights = _weights(ledger, p, scores, ledger.make(p.seq * p.kv, 1) if p.seq > 1 else None)
    del scores
    width = value.count // (p.batch * p.config.num_attention_heads * p.kv)
    return ledger.product(weights, laid_out(value, 2), pairs // p.kv * width), weights


def _weights(ledger: Ledger, p: Pass, scores: Sized, mask: Sized | None) -> Sized:
    scores = ledger.scaled(ledger.cast(scores, p.wide))
    if mask is not None:
        hidden = ledger.make(mask.count, 1)
        scores = ledger.make(scores.count, scores.width, scores, keep=[hidden])
        del hidden
    return ledger.cast(ledger.softmax(scores), p.width)


def _fused(ledger: Ledger, p: Pass, query: Sized, key: Sized, value: Sized) -> Sized:
    """A kernel that wants values as wide as keys, and keeps a float32 number for every query."""
    queries = p.tokens * p.config.num_attention_heads
    width = query.count // queries
    value_width = value.count * width // key.count
    widest = max(width, value_width)
    query, key = _padded(ledger, query, width, widest), _padded(ledger, key, width, widest)
    value = _padded(ledger, value, value_width, widest)
    sums = ledger.make(queries, p.wide)
    out = ledger.with_result(ledger.make(queries * widest, p.width, query, key, value, keep=[query, key, value, sums]))
    return out if widest == value_width else ledger.part(out, queries * value_width)


def _padded(ledger: Ledger, x: Sized, width: int, widest: int) -> Sized:
    return x if width == widest else ledger.make(x.count // width * widest, x.width, x)


def _absorbed(ledger: Ledger, p: Pass, q_nope: Sized, q_pe: Sized, present: Sized) -> Attended:
    raise NotImplementedError


def layer(ledger: Ledger, p: Pass, layer_idx: int, x: Sized) -> Sized:
    """The residual stream behind a layer."""
    config, hidden = p.config, p.config.hidden_size
    out = _attention(ledger, p, _norm(ledger, x, hidden, p.wide))
    total = ledger.add(x, out)
    normed = _norm(ledger, total, hidden, p.wide)
    del out
    if config.is_moe_layer(layer_idx):
        return ledger.add(total, _moe(ledger, p, normed))
    return ledger.add(total, _mlp(ledger, normed, hidden, config.intermediate_size))
