"""The mixture of experts in sizes: scores of the gate, rows sorted by expert, the float32 sum of what experts say."""

from dsv2_ref.accounting.memory.ledger import Ledger
from dsv2_ref.accounting.memory.parts import INTEGER, Pass, mlp
from dsv2_ref.accounting.memory.tape import Gradients, Sized


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


def moe(ledger: Ledger, p: Pass, x: Sized) -> Sized:
    """Routed experts, the balance loss in training, and shared experts where there are any."""
    config = p.config
    index, weight, loss = _gate(ledger, p, x)
    out = _experts(ledger, p, x, index, weight)
    if loss is not None:
        out = ledger.injected(out, loss)
    if config.n_shared_experts is None:
        return out
    wide = config.n_shared_experts * config.moe_intermediate_size
    return ledger.add(out, mlp(ledger, x, config.hidden_size, wide))
