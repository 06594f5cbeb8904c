"""Attention in sizes: multi-head and latent, eager, fused and absorbed."""

from dsv2_ref.accounting.memory.ledger import Ledger
from dsv2_ref.accounting.memory.parts import INTEGER, Pass, Tables, norm, rotated
from dsv2_ref.accounting.memory.tape import Sized

SCORES_AT_ONCE = 2**24
"""Scores of a block of queries that may be in memory together, as in the reference's attention."""


def attend(ledger: Ledger, p: Pass, x: Sized) -> Sized:
    """The result of attention, from a normalised input."""
    config = p.config
    rotary = config.qk_rope_head_dim if config.use_mla else config.hidden_size // config.num_attention_heads
    tables = ledger.make(p.seq * rotary // 2, p.wide), ledger.make(p.seq * rotary // 2, p.wide)
    return (_latent_attention if config.use_mla else _multi_head_attention)(ledger, p, x, tables)


Attended = tuple[Sized, Sized | None]
"""The heads' results, and the weights where all are held."""


def _output(ledger: Ledger, p: Pass, out: Sized, side_by_side: bool) -> Sized:
    """The last projection, for which the heads of a token are put ``side_by_side`` where they are not yet."""
    if not side_by_side and p.config.num_attention_heads > 1:
        out = ledger.copied(out)
    return ledger.linear(out, out.count // p.tokens, p.config.hidden_size)


def _multi_head_attention(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> Sized:
    config, hidden, heads = p.config, p.config.hidden_size, p.config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    query, key, value = (ledger.linear(x, hidden, n * hidden // heads) for n in (heads, kv_heads, kv_heads))
    query, key = rotated(ledger, query, tables), rotated(ledger, key, tables)
    present = ledger.join(key, value)
    if p.kv > p.seq:
        present = Sized(None, present.count // p.seq * p.kv, p.width)
    keys, values = (ledger.part(present, present.count // 2) for _ in range(2))
    if p.eager:
        out, weights = _eager_grouped(ledger, p, query, keys, values, heads // kv_heads)
    else:
        out, weights = _fused(ledger, p, ledger.reordered(query), keys, values), None
    made = _output(ledger, p, out, side_by_side=p.seq == 1 or (p.whole and not p.eager))
    del query, key, value, weights
    return made


def _eager_grouped(ledger: Ledger, p: Pass, query: Sized, key: Sized, value: Sized, shared_by: int) -> Attended:
    strided = p.batch > 1 and p.config.num_attention_heads > 1
    if shared_by > 1:
        key, value = (ledger.make(x.count * shared_by, x.width, x) for x in (key, value))
    return _eager(
        ledger, p, query, key, value, (strided and p.seq > 1, strided and shared_by == 1, strided and shared_by == 1)
    )


def _latent_attention(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> Sized:
    config = p.config
    q_nope, q_pe = _queries(ledger, p, x, tables)
    present = _compressed(ledger, p, x, tables)
    if p.kv > p.seq:
        present = Sized(None, present.count // p.seq * p.kv, p.width)
    attend = _absorbed if p.absorbed else _expanded
    out, weights = attend(ledger, p, q_nope, q_pe, present)
    narrowed = not p.eager and p.whole and config.v_head_dim < config.qk_nope_head_dim + config.qk_rope_head_dim
    made = _output(ledger, p, out, side_by_side=p.absorbed or (p.seq == 1 and not narrowed))
    del q_nope, q_pe, present, weights
    return made


def _queries(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> tuple[Sized, Sized]:
    config, heads = p.config, p.tokens * p.config.num_attention_heads
    inputs, width = config.hidden_size, config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.q_lora_rank is not None:
        compressed = ledger.linear(x, inputs, config.q_lora_rank)
        x = norm(ledger, compressed, config.q_lora_rank, p.wide)
        del compressed  # a module's caller holds its input until it returns
        inputs = config.q_lora_rank
    query = ledger.reordered(ledger.linear(x, inputs, config.num_attention_heads * width))
    del x
    q_nope, q_pe = ledger.split(query, heads * config.qk_nope_head_dim, heads * config.qk_rope_head_dim)
    return q_nope, rotated(ledger, q_pe, tables)


def _compressed(ledger: Ledger, p: Pass, x: Sized, tables: Tables) -> Sized:
    latent, rope = p.config.kv_lora_rank or 0, p.config.qk_rope_head_dim
    both = ledger.linear(x, p.config.hidden_size, latent + rope)
    compressed_kv, k_pe = ledger.split(both, p.tokens * latent, p.tokens * rope)
    return ledger.join(norm(ledger, compressed_kv, latent, p.wide), rotated(ledger, k_pe, tables))


def _expanded(ledger: Ledger, p: Pass, q_nope: Sized, q_pe: Sized, present: Sized) -> Attended:
    config, heads = p.config, p.config.num_attention_heads
    latent, rope, keys = config.kv_lora_rank or 0, config.qk_rope_head_dim, p.batch * p.kv
    nope, value_width = config.qk_nope_head_dim, config.v_head_dim
    compressed_kv, k_pe = ledger.part(present, keys * latent), ledger.part(present, keys * rope)
    strided = p.batch > 1 and p.kv > p.seq  # what a cache with room for more remembers of two sequences
    kv = ledger.linear(ledger.copied(compressed_kv) if strided else compressed_kv, latent, heads * (nope + value_width))
    kv = ledger.reordered(kv)
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
    weights = _weights(ledger, p, scores, _causal_mask(ledger, p.seq, p.kv))
    del scores
    width = value.count // (p.batch * p.config.num_attention_heads * p.kv)
    return ledger.product(weights, laid_out(value, 2), pairs // p.kv * width), weights


def _causal_mask(ledger: Ledger, queries: int, keys: int) -> Sized | None:
    """Which keys the last queries see, told by the places of both; one query sees them all."""
    if queries == 1:
        return None
    places = ledger.make(queries, INTEGER), ledger.make(keys, INTEGER)
    mask = ledger.make(queries * keys, 1)
    del places
    return mask


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
    widths = ((query, width), (key, width), (value, value_width))
    read = [_padded(ledger, x, its, widest) for x, its in widths]
    if not p.whole:
        return _fused_blocks(ledger, p, widest, value_width)
    sums = ledger.make(queries, p.wide)
    out = ledger.with_result(ledger.make(queries * widest, p.width, *read, keep=[*read, sums]))
    return out if widest == value_width else ledger.part(out, queries * value_width)


def _fused_blocks(ledger: Ledger, p: Pass, widest: int, value_width: int) -> Sized:
    """Queries behind a cache: the kernel takes a mask, first of bits, then of numbers."""
    heads = p.batch * p.config.num_attention_heads
    parts: list[Sized] = []
    mask = None
    for start, stop in _last_blocks(ledger, p, p.batch, widest, parts):
        mask = _causal_mask(ledger, stop - start, p.kv - p.seq + stop)
        added = ledger.make(mask.count, p.width) if mask is not None else None
        sums = ledger.make(heads * (stop - start), p.wide)
        parts.append(ledger.make(heads * (stop - start) * widest, p.width))
        del added, sums
    made = ledger.make(heads * p.seq * value_width, p.width)
    del mask
    return made


def _padded(ledger: Ledger, x: Sized, width: int, widest: int) -> Sized:
    return x if width == widest else ledger.make(x.count // width * widest, x.width, x)


def _absorbed(ledger: Ledger, p: Pass, q_nope: Sized, q_pe: Sized, present: Sized) -> Attended:
    config, heads = p.config, p.config.num_attention_heads
    latent = config.kv_lora_rank or 0
    q_latent = ledger.make(p.tokens * heads * latent, p.width, q_nope)
    attended = _attend_latent(ledger, p, ledger.join(q_latent, q_pe), latent)
    by_head = ledger.copied(attended) if min(p.batch, p.seq, heads) > 1 else attended
    out = ledger.make(p.tokens * heads * config.v_head_dim, p.width, by_head)
    del q_latent, attended, present
    return out, None


def _attend_latent(ledger: Ledger, p: Pass, query: Sized, latent: int) -> Sized:
    heads = p.batch * p.config.num_attention_heads
    parts: list[Sized] = []
    blocks = _last_blocks(ledger, p, heads, latent, parts)
    rows = query
    for start, stop in blocks:
        queries, end, several = heads * (stop - start), p.kv - p.seq + stop, stop - start > 1
        copied = several and stop - start < p.seq and p.config.num_attention_heads > 1
        rows = ledger.make(queries * query.count // (heads * p.seq), p.width) if copied else query
        mask = _causal_mask(ledger, stop - start, end)
        bias = None
        bias = _bias(ledger, p, mask) if mask is not None else None
        scores = ledger.make(queries * end, p.width)
        weights = ledger.make(scores.count, p.width)
        parts.append(ledger.make(queries * latent, p.width))
    made = ledger.join(*parts)
    del rows, bias, weights
    return made


def _last_blocks(ledger: Ledger, p: Pass, heads: int, width: int, parts: list[Sized]) -> list[tuple[int, int]]:
    """The last blocks of queries, which see the most keys; the results of those before go into ``parts``."""
    size = p.seq if p.seq * heads * p.kv <= SCORES_AT_ONCE else max(1, SCORES_AT_ONCE // (heads * p.kv))
    first = max(0, (p.seq - 1) // size - 2) * size
    if first:
        parts.append(ledger.make(p.batch * p.config.num_attention_heads * first * width, p.width))
    return [(start, min(start + size, p.seq)) for start in range(first, p.seq, size)]


def _bias(ledger: Ledger, p: Pass, mask: Sized) -> Sized:
    """What is added to the scores of all heads."""
    of_all = p.batch * p.config.num_attention_heads * mask.count
    added = ledger.make(mask.count, p.width)
    if p.config.num_attention_heads > 1:
        added = ledger.make(of_all, p.width)
    made = ledger.make(of_all, p.width)
    del added
    return made
