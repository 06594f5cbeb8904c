// What a decoding layer caches, multiplies and reads, in three ways: keys and values, absorbed, expanded anew.
"use strict";

const ways = {
	// The calculator's models with MLA, by name; V2-Lite first.
	presets: Object.fromEntries(["deepseek_v2_lite", ...Object.keys(MODELS)].filter((key) => MODELS[key].use_mla).map((key) => {
		const { num_attention_heads: H, qk_nope_head_dim: N, qk_rope_head_dim: R, v_head_dim: V, kv_lora_rank: C, num_hidden_layers: L } = MODELS[key];
		return [MODEL_NAMES[key], { key, H: Number(H), N: Number(N), R: Number(R), V: Number(V), C: Number(C), layers: Number(L) }];
	})),

	// For S new tokens, the last of K, in one layer: elements cached per token, FLOPs, and bytes in bfloat16.
	count({ H, N, R, V, C, layers }, S, K) {
		const pairs = S * K - (S * (S - 1)) / 2;
		const expanded = N + R + V;
		const matrix = C * (N + V);
		const flops = {
			"keys and values cached": 2 * H * pairs * expanded,
			absorbed: 2 * H * (pairs * (2 * C + R) + S * matrix),
			"expanded anew": 2 * H * (pairs * expanded + K * matrix),
		};
		const latents = 2 * (K * (C + R) + H * matrix);
		const whole = 2 * K * H * expanded;
		const bytes = { "keys and values cached": whole, absorbed: latents, "expanded anew": latents + 2 * whole };
		const elements = { "keys and values": H * expanded, "latent and rope key": C + R };
		return { elements, flops, bytes, cached: 2 * layers * K * (C + R) };
	},

	draw({ model, heads, cached, fresh }) {
		const { amount, withCommas } = figures;
		const sizes = { ...ways.presets[model], H: 2 ** heads };
		const K = 2 ** cached;
		const S = Math.min(fresh, K);
		const { elements, flops, bytes, cached: all } = ways.count(sizes, S, K);
		const link = new URL("calculator.html", location.href);
		link.search = new URLSearchParams({ preset: sizes.key, num_attention_heads: sizes.H, seq: S, kv: K });
		const kinds = { absorbed: "latent", "latent and rope key": "latent", "expanded anew": "expert" };
		const group = (title, values, text) => ({
			title,
			bars: Object.entries(values).map(([label, value]) => ({ label, value, text: text(value), kind: kinds[label] ?? "query" })),
		});
		const least = (values) => Object.entries(values).sort((a, b) => a[1] - b[1])[0][0];
		const sentence = `${withCommas(S)} new of ${withCommas(K)} tokens, ${sizes.H} heads: fewest FLOPs with ${least(flops)}, `
			+ `fewest bytes with ${least(bytes)}; absorbed reads ${amount(bytes.absorbed, "B")}, cached keys and values `
			+ `${amount(bytes["keys and values cached"], "B")} in one layer. All ${sizes.layers} layers cache ${amount(all, "B")}.`;
		return {
			sentence,
			picture: [figures.element("p", {}, figures.element("a", { href: link.href }, "This model in the calculator"))],
			groups: [
				group("Elements cached per token and layer", elements, withCommas),
				group("FLOPs of attention in one layer", flops, (x) => amount(x, "FLOP")),
				group("Bytes read and made in one layer", bytes, (x) => amount(x, "B")),
			],
		};
	},
};

figures.run("cache", {
	model: { label: "Model", options: Object.keys(ways.presets), sets: (model) => ({ heads: Math.log2(ways.presets[model].H) }) },
	heads: { label: "Heads", min: 0, max: 8, step: 1, value: 4, show: figures.power },
	cached: { label: "Tokens attended to", min: 4, max: 17, step: 1, value: 13, show: figures.power },
	fresh: { label: "New tokens among them", min: 1, max: 512, step: 1, value: 1, show: figures.withCommas },
}, ways.draw);
