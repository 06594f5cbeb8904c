"""The known mistakes as a student makes them: lines of the assignments' solutions written otherwise."""

Edit = tuple[str, str]

MEAN = "mean_square = hidden_states.square().mean(-1, keepdim=True)"
NORMED = "self.weight * (hidden_states * torch.rsqrt(mean_square + self.eps))"
RMSNORM: dict[str, list[Edit]] = {
    "epsilon outside the root": [(NORMED, "self.weight * hidden_states / (mean_square.sqrt() + self.eps)")],
    "epsilon left out": [(" + self.eps)", ")")],
    "epsilon only against a division by zero, as in torch's normalize, or its rms_norm without eps": [
        (
            NORMED,
            "self.weight * torch.nn.functional.normalize(hidden_states, dim=-1, eps=self.eps)"
            " * hidden_states.shape[-1] ** 0.5",
        )
    ],
    "a fixed epsilon of 1e-6, whatever the constructor was given": [("self.eps = eps", "self.eps = 1e-6")],
    "the mean subtracted, as in LayerNorm": [
        (MEAN, f"hidden_states = hidden_states - hidden_states.mean(-1, keepdim=True)\n        {MEAN}")
    ],
    "the weight not applied": [("self.weight * (", "(")],
    "multiplied by 1 + weight, as in Gemma": [("self.weight * (", "(1 + self.weight) * (")],
    "the sum of the squares, not their mean": [(".mean(-1", ".sum(-1")],
    "no root: divided by the mean square": [("torch.rsqrt(mean_square + self.eps)", "1 / (mean_square + self.eps)")],
    "one mean over all tokens": [(".mean(-1, keepdim=True)", ".mean()")],
}

PAIRS = "even, odd = x[..., 0::2], x[..., 1::2]"
STACK = "pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)\n    return pairs.flatten(-2)"
CAT = "return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)"
HALVES = [(PAIRS, "even, odd = x.chunk(2, dim=-1)"), (STACK, CAT)]
ROPE: dict[str, list[Edit]] = {
    "pairs half-split": HALVES,
    "the right pairs, but left in half-split order, as in the published code": [(STACK, CAT)],
    "rotated the other way": [
        ("even * cos - odd * sin, even * sin + odd * cos", "even * cos + odd * sin, odd * cos - even * sin")
    ],
    "the key not rotated": [("sin[:, None]), rotate(k_pe, cos, sin)", "sin[:, None]), k_pe")],
    "the queries not rotated": [("return rotate(q_pe, cos[:, None], sin[:, None]), ", "return q_pe, ")],
    "positions counted from 0, position_ids not read": [
        ("angles = position_ids[", "position_ids = torch.arange(position_ids.shape[1])[None] + 0 * position_ids"),
        ("..., None].to(dtype)", "\n    angles = position_ids[..., None].to(dtype)"),
    ],
    "theta is 10000, whatever it was given": [("theta**-exponents", "10000.0**-exponents")],
    "the exponent is i / dim, not 2i / dim": [
        ("torch.arange(0, dim, 2, dtype=dtype) / dim", "torch.arange(dim // 2, dtype=dtype) / dim"),
        ("/ (2 * math.log(theta))", "/ math.log(theta)"),
    ],
    "YaRN's angles left out": [("frequencies = yarn(frequencies, theta, scaling)", "pass")],
    "all angles divided by the factor, as in linear scaling": [
        ("yarn(frequencies, theta, scaling)", "frequencies / scaling.factor")
    ],
    "YaRN's magnitude left out: m(mscale) / m(mscale_all_dim)": [
        ("size = mscale(scaling.factor, scaling.mscale)\n", "size = mscale(scaling.factor, scaling.mscale_all_dim)\n")
    ],
    "the magnitude is m(mscale), not divided by m(mscale_all_dim)": [
        ("size = size / mscale(scaling.factor, scaling.mscale_all_dim)", "pass")
    ],
    "temperature left out": [("return mscale(scaling.factor, scaling.mscale_all_dim) ** 2", "return 1.0")],
    "the temperature is m, not its square": [("scaling.mscale_all_dim) ** 2", "scaling.mscale_all_dim)")],
}

TURNED = "q_pe, k_pe = apply_rotary(q_pe, k_pe, cos, sin)"
HALF_SPLIT = [
    ("import torch\n", "import torch\nfrom dsv2_ref.rope import rotate_half_split as turn\n"),
    (TURNED, "q_pe, k_pe = turn(q_pe, cos[:, None], sin[:, None]), turn(k_pe, cos, sin)"),
]
CAUSAL = "causal = torch.ones(S, S, dtype=torch.bool).tril()"
CAUSAL_WITH_CACHE = "tril(K - S)"
SCALE = "self.scale = (N + R) ** -0.5 * temperature"
YARN_TABLES = "config.rope_theta, config.rope_scaling, dtype"
BOTH: dict[str, list[Edit]] = {
    "pairs half-split": HALF_SPLIT,
    "temperature left out": [("** -0.5 * temperature", "** -0.5")],
    "the norm on the latent left out": [
        ("        self.kv_a_layernorm = DeepseekV2RMSNorm(C)\n", ""),
        ("self.kv_a_layernorm(compressed_kv)", "compressed_kv"),
    ],
    "scores hidden by 0, not by minus infinity": [("-torch.inf", "0")],
    "masked after the softmax: the weights no longer sum to 1": [
        (
            "scores.masked_fill(~causal, -torch.inf).softmax(dim=-1)",
            "scores.softmax(dim=-1).masked_fill(~causal, 0)",
        )
    ],
    "a mask of ones and zeros added to the scores": [
        ("scores.masked_fill(~causal, -torch.inf)", "(scores + causal.double())")
    ],
    "scores divided by the root of C + R, the absorbed width": [(SCALE, SCALE.replace("(N + R)", "(C + R)"))],
    "scores divided by the root of N, without the rope features": [(SCALE, SCALE.replace("(N + R)", "N"))],
    "scores divided by the root of V, the width of a value": [(SCALE, SCALE.replace("(N + R)", "V"))],
    "scores divided by the root of D / H, which is no width of MLA's heads": [
        (SCALE, SCALE.replace("(N + R)", "(D // H)"))
    ],
    "the rope key not rotated": [(TURNED, "q_pe, _ = apply_rotary(q_pe, k_pe, cos, sin)")],
    "the query not rotated": [(TURNED, "_, k_pe = apply_rotary(q_pe, k_pe, cos, sin)")],
    "no position at all": [(TURNED, "pass")],
    "the rope part of the scores lost": [(TURNED, f"{TURNED}\n        q_pe = torch.zeros_like(q_pe)")],
    "the norm on the query's latent left out": [("self.q_a_layernorm(self.q_a_proj(x))", "self.q_a_proj(x)")],
    "the layer's epsilon in the norms of the latents": [
        ("DeepseekV2RMSNorm(C)", "DeepseekV2RMSNorm(C, config.rms_norm_eps)"),
        ("DeepseekV2RMSNorm(config.q_lora_rank)", "DeepseekV2RMSNorm(config.q_lora_rank, config.rms_norm_eps)"),
    ],
    "theta is 10000, whatever rope_theta is": [("config.rope_theta", "10000.0")],
    "YaRN left out": [("** -0.5 * temperature", "** -0.5"), (YARN_TABLES, "config.rope_theta, dtype")],
    "YaRN's angles left out": [(YARN_TABLES, "config.rope_theta, dtype")],
    "YaRN's magnitude left out: m(mscale) / m(mscale_all_dim)": [
        (
            "        query = self.queries(",
            "        size = (cos**2 + sin**2).sqrt()\n        cos, sin = cos / size, sin / size\n        query = self.queries(",
        )
    ],
    "scores not scaled": [(SCALE, "self.scale = temperature")],
    "heads not brought back beside their features before o_proj": [
        ("out.transpose(1, 2).reshape(B, S, H * V)", "out.reshape(B, S, H * V)")
    ],
}
UP = "kv = self.kv_b_proj(latent).view(B, S, H, N + V).transpose(1, 2)"
SPLIT = "k_nope, value = kv.split((N, V), dim=-1)"
NO_NAN = (".softmax(dim=-1)", ".softmax(dim=-1).nan_to_num()")
MLA = BOTH | {
    "no causal mask": [(CAUSAL, CAUSAL.removesuffix(".tril()"))],
    "a token does not see itself": [(CAUSAL, CAUSAL.replace("tril()", "tril(-1)")), NO_NAN],
    "a token sees the next one": [(CAUSAL, CAUSAL.replace("tril()", "tril(1)"))],
    "the up-projections of keys and values exchanged": [(SPLIT, "value, k_nope = kv.split((V, N), dim=-1)")],
    "kv_b_proj split in the middle, not head by head": [
        (UP, "kv = self.kv_b_proj(latent)"),
        (
            SPLIT,
            "k_nope, value = kv.split((H * N, H * V), dim=-1)\n"
            "        k_nope = k_nope.view(B, S, H, N).transpose(1, 2)\n"
            "        value = value.view(B, S, H, V).transpose(1, 2)",
        ),
    ],
}
EXPANDED = [
    ("past_key_value.shape[1]", "past_key_value[0].shape[2]"),
    (
        "cache = torch.cat((latent, k_pe), dim=-1)",
        "kv = self.kv_b_proj(latent).view(B, S, H, N + V).transpose(1, 2)\n"
        "        key = torch.cat((kv[..., :N], k_pe[:, None].expand(-1, H, -1, -1)), dim=-1)\n"
        "        value = kv[..., N:].clone()",
    ),
    (
        "cache = torch.cat((past_key_value, cache), dim=1)",
        "key = torch.cat((past_key_value[0], key), dim=2)\n"
        "            value = torch.cat((past_key_value[1], value), dim=2)",
    ),
    ("query = torch.cat((q_nope @ w_uk, q_pe), dim=-1)", "query = torch.cat((q_nope, q_pe), dim=-1)"),
    ("        key = cache[:, None]\n", ""),
    ("weights @ cache[:, None, :, :C] @ w_uv.transpose(-1, -2)", "weights @ value"),
    ("return out, None, cache", "return out, None, (key, value)"),
]
ONE_ROPE_KEY = [
    EXPANDED[0],
    (EXPANDED[1][0], UP),
    (
        EXPANDED[2][0],
        "kv = torch.cat((past_key_value[0], kv), dim=2)\n"
        "            k_pe = torch.cat((past_key_value[1], k_pe), dim=1)",
    ),
    EXPANDED[3],
    ("key = cache[:, None]\n", "key = torch.cat((kv[..., :N], k_pe[:, None].expand(-1, H, -1, -1)), dim=-1)\n"),
    (EXPANDED[5][0], "weights @ kv[..., N:]"),
    (EXPANDED[6][0], "return out, None, (kv, k_pe)"),
]
READ = "w_uk, w_uv = rows[:, :N], rows[:, N:]"
RETURNED = "return out, None, cache"
DECODING = BOTH | {
    "no causal mask": [(f".{CAUSAL_WITH_CACHE}", "")],
    "a token does not see itself": [(CAUSAL_WITH_CACHE, "tril(K - S - 1)"), NO_NAN],
    "a token sees the next one": [(CAUSAL_WITH_CACHE, "tril(K - S + 1)")],
    "the up-projections of keys and values exchanged": [(READ, "w_uv, w_uk = rows[:, :V], rows[:, V:]")],
    "kv_b_proj split in the middle, not head by head": [
        ("rows = self.kv_b_proj.weight.view(H, N + V, C)", "rows = self.kv_b_proj.weight"),
        (READ, "w_uk, w_uv = rows[: H * N].view(H, N, C), rows[H * N :].view(H, V, C)"),
    ],
    "positions restart in each call": [("torch.arange(past, past + S)", "torch.arange(S)")],
    "positions one too far after a cache": [
        ("torch.arange(past, past + S)", "torch.arange(past + (past > 0), past + (past > 0) + S)")
    ],
    "positions one too few after a cache": [
        ("torch.arange(past, past + S)", "torch.arange(past - (past > 0), past - (past > 0) + S)")
    ],
    "mask aligned at the top left: the first query at the first key": [(CAUSAL_WITH_CACHE, "tril()")],
    "mask aligned at the top left where a call brings several tokens": [
        (CAUSAL_WITH_CACHE, "tril(0 if S > 1 else K - S)")
    ],
    "no mask where several tokens follow a cache": [(CAUSAL_WITH_CACHE, "tril(K if past else 0)")],
    "expanded cache: all heads' keys and values are cached, not the latent": EXPANDED,
    "expanded cache: all heads' keys and values are cached, only the rope key once": ONE_ROPE_KEY,
    "the rope key is cached once per head": [
        (RETURNED, "return out, None, torch.cat((cache[..., :C], cache[..., C:].repeat(1, 1, H)), dim=-1)"),
        (
            "past = 0 if",
            "past_key_value = None if past_key_value is None else past_key_value[..., : C + R]\n        past = 0 if",
        ),
    ],
    "the layer's inputs are cached, not the latent": [
        (
            "        query = self.queries(hidden_states)",
            "        everything = hidden_states\n        if past:\n            everything = torch.cat((past_key_value, hidden_states), dim=1)\n        query = self.queries(hidden_states)",
        ),
        (TURNED, f"{TURNED}\n        compressed_kv, k_pe = self.again(everything)"),
        ("cache = torch.cat((past_key_value, cache), dim=1)", "pass"),
        (RETURNED, "return out, None, everything"),
        (
            "    def forward(",
            "    def again(self, x):\n"
            "        C, R = self.config.kv_lora_rank, self.rope\n"
            "        both = self.kv_a_proj_with_mqa(x)\n"
            "        ids = torch.arange(x.shape[1])[None]\n"
            "        config = self.config\n"
            "        cos, sin = rotary_tables(ids, R, config.rope_theta, config.rope_scaling, dtype=x.dtype)\n"
            "        _, k_pe = apply_rotary(both[:, None, :, C:], both[..., C:], cos, sin)\n"
            "        return both[..., :C], k_pe\n\n"
            "    def forward(",
        ),
    ],
    "keys and values of all tokens are made anew for each token": [
        (
            "query = torch.cat((q_nope @ w_uk, q_pe), dim=-1)\n        key = cache[:, None]",
            "query = torch.cat((q_nope, q_pe), dim=-1)\n"
            "        K = past + S\n"
            "        kv = self.kv_b_proj(cache[..., :C]).view(B, K, H, N + V).transpose(1, 2)\n"
            "        key = torch.cat((kv[..., :N], cache[:, None, :, C:].expand(-1, H, -1, -1)), dim=-1)",
        ),
        ("weights @ cache[:, None, :, :C] @ w_uv.transpose(-1, -2)", "weights @ kv[..., N:]"),
    ],
}

GATHER = "topk_weight = scores.gather(-1, topk_idx)"
SCALED = "topk_weight = topk_weight * config.routed_scaling_factor"
BEST = "of_group = grouped.topk(best, dim=-1).values.sum(-1)"
GATE: dict[str, list[Edit]] = {
    "softmax after top-k": [
        (
            GATHER,
            f"{GATHER}\n        if not sigmoid:\n            topk_weight = logits.gather(-1, topk_idx).softmax(-1)",
        )
    ],
    "softmax after top-k, in place of sigmoid scores too": [
        (GATHER, "topk_weight = logits.gather(-1, topk_idx).softmax(-1)")
    ],
    "the softmax over the tokens, not over the experts": [("logits.softmax(dim=-1)", "logits.softmax(dim=0)")],
    "routed_scaling_factor left out": [(SCALED, "pass")],
    "weights made of the logits, not of the scores": [(GATHER, "topk_weight = logits.gather(-1, topk_idx)")],
    "normalised weights not scaled, or before they were normalised": [
        (SCALED, "pass"),
        (GATHER, f"{GATHER} * config.routed_scaling_factor"),
    ],
    "normalised by the sum of all scores, not of the chosen ones": [
        ("topk_weight / topk_weight.sum", "topk_weight / scores.sum")
    ],
    "weights normalised though norm_topk_prob is off": [("if config.norm_topk_prob:", "if True:")],
    "norm_topk_prob ignored": [("if config.norm_topk_prob:", "if False:")],
    "group limit left out": [('if config.topk_method != "greedy":', "if False:")],
    "group limit left out where topk_method is group_limited_greedy": [
        ('if config.topk_method != "greedy":', 'if config.topk_method == "noaux_tc":')
    ],
    "group limit left out where topk_method is noaux_tc": [
        ('if config.topk_method != "greedy":', 'if config.topk_method == "group_limited_greedy":')
    ],
    "groups judged by the sum of all their experts": [(BEST, "of_group = grouped.sum(-1)")],
    "groups judged by their best expert even with a bias; V3 takes the two best": [
        (BEST, "of_group = grouped.amax(-1)")
    ],
    "groups judged by their two best experts without a bias; V2 takes the best": [
        ("best = 1 if bias is None else 2", "best = 2")
    ],
    "experts of closed groups get 0, which beats a negative biased score": [("-torch.inf", "0.0")],
    "experts of closed groups get 0, which beats a negative biased score; sorted, not by topk": [
        ("-torch.inf", "0.0"),
        (
            "choose_by.topk(config.num_experts_per_tok, dim=-1).indices",
            "choose_by.argsort(dim=-1, descending=True)[:, : config.num_experts_per_tok]",
        ),
    ],
    "the bias weighs: it may only choose": [
        (GATHER, "topk_weight = (scores if bias is None else scores + bias).gather(-1, topk_idx)")
    ],
    "the bias added to the logits, before the sigmoid": [
        (
            'sigmoid = config.scoring_func == "sigmoid"',
            'sigmoid = config.scoring_func == "sigmoid"\n        logits = logits if bias is None else logits + bias',
        ),
        ("scores if bias is None else scores + bias", "scores"),
    ],
    "the bias left out": [("scores if bias is None else scores + bias", "scores")],
    "sigmoid scores where scoring_func is softmax": [
        ("logits.sigmoid() if sigmoid else logits.softmax(dim=-1)", "logits.sigmoid()")
    ],
    "softmax scores where scoring_func is sigmoid": [
        ("logits.sigmoid() if sigmoid else logits.softmax(dim=-1)", "logits.softmax(dim=-1)")
    ],
}

MADE = "made = expert(tokens[token]) * topk_weight[token, choice, None]"
ROUTED = "topk_idx, topk_weight, _ = self.gate(hidden_states)"
SWIGLU = "F.silu(self.gate_proj(x)) * self.up_proj(x)"
SUM = "routed.view_as(hidden_states) + self.shared_experts(hidden_states)"
LOOP = (
    "routed = torch.zeros_like(tokens)\n"
    "        for number, expert in enumerate(self.experts):\n"
    "            token, choice = torch.where(topk_idx == number)\n"
    f"            {MADE}\n"
    "            routed.index_add_(0, token, made)\n"
)
SORTED = (
    "choices, k = topk_idx.flatten(), topk_idx.shape[1]\n"
    "        order = choices.argsort(stable=True)\n"
    "        rows = tokens[order // k].split(choices.bincount(minlength=len(self.experts)).tolist())\n"
    "        made = torch.cat([expert(own) for expert, own in zip(self.experts, rows)])\n"
    "        made = {}.view(-1, k, tokens.shape[1])\n"
    "        routed = (made * topk_weight[..., None]).sum(1)\n"
)
EXPERTS: dict[str, list[Edit]] = {
    "shared experts left out": [(SUM, "routed.view_as(hidden_states)")],
    "gate_proj and up_proj exchanged": [(SWIGLU, "self.gate_proj(x) * F.silu(self.up_proj(x))")],
    "gate_proj and up_proj exchanged in the stacked experts alone": [
        ("MLP(hidden, inner) for", "MLP(hidden, inner, True) for"),
        ("def __init__(self, hidden, inner):", "def __init__(self, hidden, inner, up_first=False):"),
        ("        self.gate_proj = nn", "        self.up_first = up_first\n        self.gate_proj = nn"),
        (
            f"return self.down_proj({SWIGLU})",
            "gate, up = self.gate_proj(x), self.up_proj(x)\n"
            "        gate, up = (up, gate) if self.up_first else (gate, up)\n"
            "        return self.down_proj(F.silu(gate) * up)",
        ),
    ],
    "expert weights not applied": [(MADE, "made = expert(tokens[token])")],
    "the chosen experts averaged, not weighted": [(MADE, "made = expert(tokens[token]) / topk_idx.shape[-1]")],
    "weights in another order than the choices": [
        ("topk_weight[token, choice, None]", "topk_weight.flip(-1)[token, choice, None]")
    ],
    "a softmax over the weights: the gate has scored": [
        (ROUTED, f"{ROUTED}\n        topk_weight = topk_weight.softmax(dim=-1)")
    ],
    "the best expert alone, not all that were chosen": [
        (ROUTED, f"{ROUTED}\n        topk_idx, topk_weight = topk_idx[:, :1], topk_weight[:, :1]")
    ],
    "weights normalised to sum to 1": [
        (
            ROUTED,
            f"{ROUTED}\n        factor = topk_weight.sum(-1, keepdim=True)\n        topk_weight = topk_weight / factor * self.factor",
        ),
        (
            "self.gate = MoEGate(config)",
            "self.gate = MoEGate(config)\n        self.factor = config.routed_scaling_factor",
        ),
    ],
    "routed_scaling_factor left out": [
        ("self.gate = MoEGate(config)", "self.gate = MoEGate(replace(config, routed_scaling_factor=1.0))"),
        ("import torch\n", "from dataclasses import replace\n\nimport torch\n"),
    ],
    "routed_scaling_factor applied again: the gate has done so": [(MADE, f"{MADE} * self.gate.routed_scaling_factor")],
    "each expert's result replaces the earlier ones, not added to them": [
        ("routed.index_add_(0, token, made)", "routed[token] = made")
    ],
    "sorted by expert and left in that order": [(LOOP, SORTED.format("made"))],
    "sorted by expert, and the order applied again where its inverse was wanted": [
        (LOOP, SORTED.format("made[order]"))
    ],
    "shared experts scaled by routed_scaling_factor": [
        (SUM, "routed.view_as(hidden_states) + self.factor * self.shared_experts(hidden_states)"),
        (
            "self.gate = MoEGate(config)",
            "self.gate = MoEGate(config)\n        self.factor = config.routed_scaling_factor",
        ),
    ],
    "the weight multiplies an expert's input, not its output": [
        (MADE, "made = expert(tokens[token] * topk_weight[token, choice, None])")
    ],
    "group limit left out": [
        ("self.gate = MoEGate(config)", 'self.gate = MoEGate(replace(config, topk_method="greedy"))'),
        ("import torch\n", "from dataclasses import replace\n\nimport torch\n"),
    ],
    "sigmoid, not SiLU": [("F.silu", "torch.sigmoid")],
    "GELU, not SiLU": [("F.silu", "F.gelu")],
    "ReLU, not SiLU": [("F.silu", "F.relu")],
    "the input added to the output: the layer does that": [(SUM, f"hidden_states + {SUM}")],
    "every expert computes every token": [
        (
            "token, choice = torch.where(topk_idx == number)",
            "weight = (topk_weight * (topk_idx == number)).sum(-1, keepdim=True)",
        ),
        (MADE, "routed += expert(tokens) * weight"),
        ("            routed.index_add_(0, token, made)\n", ""),
    ],
}

TOTAL = "return alpha * (f * P).sum(dim=-1).mean()"
FREQUENCY = "f = counts * experts / (k * seq)"
BALANCE: dict[str, list[Edit]] = {
    "over the batch as one, though seq_aux is on": [("if not seq_aux:", "if True:")],
    "per sequence, though seq_aux is off": [("if not seq_aux:", "if False:")],
    "counts over T, not over k T": [("(k * seq)", "seq")],
    "P over the chosen experts alone": [
        (
            "P = scores.mean(dim=1)",
            "chosen = torch.zeros_like(scores).scatter(-1, topk_idx, 1.0)\n    P = (scores * chosen).mean(dim=1)",
        )
    ],
    "f made of scores, not of counts, so that it has a gradient": [(FREQUENCY, "f = experts * scores.mean(dim=1)")],
    "f has a gradient, passed straight through the counts": [
        (FREQUENCY, f"{FREQUENCY}\n    soft = experts * scores.mean(dim=1)\n    f = f + soft - soft.detach()")
    ],
    "P has no gradient": [("P = scores.mean(dim=1)", "P = scores.mean(dim=1).detach()")],
    "alpha left out": [("return alpha * ", "return ")],
    "summed over the sequences, not averaged": [(TOTAL, TOTAL.replace(".mean()", ".sum()"))],
    "the number of experts left out of f, or a mean over the experts": [("counts * experts / ", "counts / ")],
    "the bias moves the wrong way": [("bias + speed", "bias - speed")],
    "the bias moves in proportion to the load": [("below.sign()", "below")],
    "the bias moves down at an even share": [("below.sign().to(bias.dtype)", "torch.where(below > 0, 1.0, -1.0)")],
    "the bias moves up at an even share": [("below.sign().to(bias.dtype)", "torch.where(below < 0, -1.0, 1.0)")],
}

FIRST = "h = x + self.self_attn(self.input_layernorm(x))[0]"
SECOND = "return h + self.mlp(self.post_attention_layernorm(h))"
LAYER: dict[str, list[Edit]] = {
    "post-norm: norms after the additions": [
        (FIRST, "h = self.input_layernorm(x + self.self_attn(x)[0])"),
        (SECOND, "return self.post_attention_layernorm(h + self.mlp(h))"),
    ],
    "norms at the end of the branches, as in OLMo 2": [
        (FIRST, "h = x + self.input_layernorm(self.self_attn(x)[0])"),
        (SECOND, "return h + self.post_attention_layernorm(self.mlp(h))"),
    ],
    "residuals taken after the norms": [
        (FIRST, f"x = self.input_layernorm(x)\n        {FIRST.replace('self.input_layernorm(x)', 'x')}"),
        (
            SECOND,
            f"h = self.post_attention_layernorm(h)\n        {SECOND.replace('self.post_attention_layernorm(h)', 'h')}",
        ),
    ],
    "the first residual taken after its norm": [
        (FIRST, f"x = self.input_layernorm(x)\n        {FIRST.replace('self.input_layernorm(x)', 'x')}")
    ],
    "the second residual taken after its norm": [
        (
            SECOND,
            f"h = self.post_attention_layernorm(h)\n        {SECOND.replace('self.post_attention_layernorm(h)', 'h')}",
        )
    ],
    "the first norm left out": [("self.self_attn(self.input_layernorm(x))", "self.self_attn(x)")],
    "the second norm left out": [("self.mlp(self.post_attention_layernorm(h))", "self.mlp(h)")],
    "one norm for both parts": [("self.mlp(self.post_attention_layernorm(h))", "self.mlp(self.input_layernorm(h))")],
    "the two norms exchanged": [
        ("self.self_attn(self.input_layernorm(x))", "self.self_attn(self.post_attention_layernorm(x))"),
        ("self.mlp(self.post_attention_layernorm(h))", "self.mlp(self.input_layernorm(h))"),
    ],
    "nothing added to what attention returns": [("h = x + ", "h = ")],
    "nothing added to what the feed-forward part returns": [("return h + ", "return ")],
    "both parts read the layer's input, as in parallel layers": [
        ("self.post_attention_layernorm(h)", "self.post_attention_layernorm(x)")
    ],
    "the layer's input added twice, not what attention made of it": [("return h + ", "return x + ")],
    "rms_norm_eps not given to the norms": [("eps = config.rms_norm_eps", "eps = 1e-6")],
}

BOTH_AT_ONCE = {
    "the layer's inputs are cached, not the latent": "keys and values of all tokens are made anew for each token"
}
"""A mistake that cannot be made without another one."""

PLANTED = {
    "rmsnorm": RMSNORM, "rope": ROPE, "mla": MLA, "decoding": DECODING,
    "gate": GATE, "experts": EXPERTS, "balance": BALANCE, "layer": LAYER,
}  # fmt: skip
"""For each part and mistake, what is replaced in the solution."""


def planted(solution: str, edits: list[Edit]) -> str:
    """A solution with a mistake."""
    for old, new in edits:
        assert old in solution, old
        solution = solution.replace(old, new)
    return solution
