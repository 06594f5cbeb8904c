// What bounds each part of a decode step, by the counts of dsv2_ref.accounting: which roof, and how long.
"use strict";

const roof = {
	models: { "V2-Lite": "deepseek_v2_lite", V2: "deepseek_v2" },

	// FLOPs and bytes of each part in all layers, and the bytes that the machine must hold.
	count(preset, batch, context, weightBits, cacheBits) {
		const size = Object.fromEntries(Object.entries(MODELS[preset]).map(([key, value]) => [key, value && Number(value)]));
		const { hidden_size: D, num_attention_heads: H, q_lora_rank: Q, kv_lora_rank: C, num_hidden_layers: L } = size;
		const { qk_nope_head_dim: N, qk_rope_head_dim: R, v_head_dim: V, n_routed_experts: E, num_experts_per_tok: k } = size;
		const queries = Q ? [[Q, D], [H * (N + R), Q]] : [[H * (N + R), D]];
		const projections = [...queries, [C + R, D], [H * (N + V), C], [D, H * V]];
		// Codes, and scales in bfloat16: of eight bits one for a row, of four one for 64 weights.
		const stored = (shapes) => shapes.reduce((sum, [outputs, inputs]) => sum + outputs * inputs * (weightBits / 8)
			+ { 16: 0, 8: 2 * outputs, 4: (outputs * inputs) / 32 }[weightBits], 0);
		const elements = (shapes) => shapes.reduce((sum, [outputs, inputs]) => sum + outputs * inputs, 0);
		const network = (width) => [[width, D], [width, D], [D, width]];
		const norms = (Q ?? 0) + C;
		const expert = network(size.moe_intermediate_size);
		const shared = network(size.n_shared_experts * size.moe_intermediate_size);
		const wide = network(size.intermediate_size);
		const dense = size.first_k_dense_replace;
		const mixed = L - dense;
		const used = Math.round(E * (1 - (1 - k / E) ** batch) * stored(expert));
		const record = C * (cacheBits / 8) + 2 * R + (cacheBits < 16 ? 4 * (C / 128) : 0); // a float32 scale for 128 elements
		const cached = L * batch * context * record;
		const parts = {
			projections: [L * elements(projections), L * (stored(projections) + 2 * norms)],
			MLP: [dense * elements(wide), dense * stored(wide)],
			gate: [mixed * E * D, 2 * mixed * E * D],
			"routed experts": [mixed * k * elements(expert), mixed * used],
			"shared experts": [mixed * elements(shared), mixed * stored(shared)],
			head: [D * size.vocab_size, 2 * D * size.vocab_size],
		};
		const counted = Object.entries(parts).map(([part, [product, read]]) => [part, 2 * batch * product, read]);
		counted.splice(1, 0, ["scores and values", 2 * L * batch * context * H * (2 * C + R), cached]);
		const inDtype = L * (norms + 2 * D) + mixed * E * D + 2 * D * size.vocab_size + D;
		const needed = 2 * inDtype + L * stored(projections) + mixed * (E * stored(expert) + stored(shared)) + dense * stored(wide);
		return { counted, needed: needed + cached };
	},

	// FLOPs per byte in three digits, whole from a hundred on.
	intensity: (x) => (x < 99.95 ? x.toPrecision(3) : figures.withCommas(x)),

	// The roof on two logarithmic axes, and on it a numbered point for each part.
	chart({ peak, bandwidth }, parts, room) {
		const { element, line, text } = figures;
		const [width, height, left, right, top, bottom] = [figures.wide(room), 340, 46, 14, 20, 44];
		const [low, high, floor, ceiling] = [0.5, 1e5, 2e10, 2e16].map(Math.log10);
		const x = (intensity) => left + ((Math.log10(intensity) - low) / (high - low)) * (width - left - right);
		const y = (speed) => height - bottom - ((Math.log10(speed) - floor) / (ceiling - floor)) * (height - top - bottom);
		const svg = figures.chart(width, height);
		for (const [speed, label] of [[1e11, "100 G"], [1e12, "1 T"], [1e13, "10 T"], [1e14, "100 T"], [1e15, "1 P"], [1e16, "10 P"]]) {
			svg.append(line(left, y(speed), width - right, y(speed), "chart-grid"), text(left - 5, y(speed) + 4, label, "end"));
		}
		for (const [at, label] of [[1, "1"], [10, "10"], [100, "100"], [1e3, "1,000"], [1e4, "10⁴"], [1e5, "10⁵"]]) {
			svg.append(line(x(at), top, x(at), height - bottom, "chart-grid"), text(x(at), height - bottom + 17, label));
		}
		const balance = peak / bandwidth;
		svg.append(text((left + width) / 2, height - 6, "FLOPs per byte"),
			text(2, 13, "FLOPs per second, at best", "start"),
			element("path", { d: `M${x(0.5)} ${y(0.5 * bandwidth)}L${x(balance)} ${y(peak)}L${x(1e5)} ${y(peak)}`, class: "chart-line" }),
			line(x(balance), y(peak), x(balance), height - bottom, "chart-here"),
			text(x(balance) + 5, height - bottom - 7, `balance ${roof.intensity(balance)}`, "start"));
		const badges = [];
		const placed = [];
		for (const { number, intensity, speed, bound } of parts) {
			const [cx, cy] = [x(intensity), y(speed)];
			const away = cy > height / 2 ? -1 : 1; // to where there is room
			let at = cy + 20 * away;
			while (placed.some((other) => Math.abs(other.cx - cx) < 21 && Math.abs(other.at - at) < 21)) at += 3 * away;
			placed.push({ cx, at });
			svg.append(line(cx, cy, cx, at), element("circle", { cx, cy, r: 3.5, class: "chart-point" }));
			badges.push(element(bound === "memory" ? "circle" : "rect", { cx, cy: at, r: 10, x: cx - 9, y: at - 9, width: 18, height: 18, class: "chart-badge" }),
				text(cx, at + 4, number));
		}
		svg.append(...badges);
		return svg;
	},

	draw({ model, machine: chosen, batch: power, context: long, weights, cache }, room) {
		const { element, withCommas, amount } = figures;
		const { intensity } = roof;
		const machine = MACHINES.find(({ name }) => name === chosen);
		const { peak, bandwidth, memory } = machine;
		const [batch, context] = [2 ** power, 2 ** long];
		const { counted, needed } = roof.count(roof.models[model], batch, context, Number(weights), Number(cache));
		const parts = counted.map(([part, flops, bytes], i) => {
			const [computing, reading] = [flops / peak, bytes / bandwidth];
			return {
				part, number: `${i + 1}`, intensity: flops / bytes, speed: Math.min(peak, (flops / bytes) * bandwidth),
				bound: computing >= reading ? "arithmetic" : "memory", seconds: Math.max(computing, reading) / batch,
			};
		});
		const token = parts.reduce((sum, { seconds }) => sum + seconds, 0);
		const most = parts.reduce((a, b) => (b.seconds > a.seconds ? b : a));
		const computing = parts.filter(({ bound }) => bound === "arithmetic").map(({ part }) => part);
		const bounded = computing.length === 0 ? "Memory bounds every part"
			: computing.length === parts.length ? "Arithmetic bounds every part" : `Arithmetic bounds ${computing.join(", ")}; memory the rest`;
		const [asked, there] = [amount(needed, "B"), amount(memory, "B")];
		const fits = needed > memory ? `does not fit: ${asked} for weights and cache, ${there} there` : `needs ${asked} of ${there}`;
		const kinds = { "scores and values": "latent", "routed experts": "expert", "shared experts": "expert" };
		const link = element("a", { href: machine.url }, machine.source);
		return {
			sentence: `${model} on ${chosen}, ${withCommas(batch)} × ${withCommas(context)} tokens: at least ${inSeconds(token)} per token, at most ${withCommas(1 / token)} tokens per second. `
				+ `${bounded}; ${most.part} take${most.part.endsWith("s") ? "" : "s"} longest. It ${fits}.`,
			picture: [
				roof.chart(machine, parts, room),
				element("p", { class: "figure-legend" }, `${chosen}: ${amount(peak, "FLOP/s")}, ${amount(bandwidth, "B/s")} (`, link, machine.note ? `: ${machine.note}` : "",
					"). Numbers in circles wait for memory, in squares for arithmetic. Fewer bits, with scales, are less to read; arithmetic stays as fast. "
					+ "Eight bits of weights are int8, of the cache fp8; four are int4. Gate, norms, embedding, head and rope keys keep 16."),
			],
			groups: [{
				title: "Time per token, by part",
				layout: "parts",
				bars: parts.map(({ part, number, seconds, bound }) => ({ label: `${number} ${part}`, value: seconds, text: `${inSeconds(seconds)}, ${bound}`, kind: kinds[part] ?? "query" })),
			}],
			head: ["part", "FLOPs per byte", "time per token"],
			rows: [
				...parts.map((each) => [each.part, intensity(each.intensity), `${inSeconds(each.seconds)}, ${each.bound}`]),
				["all", intensity(counted.reduce((sum, [, flops]) => sum + flops, 0) / counted.reduce((sum, [, , bytes]) => sum + bytes, 0)), inSeconds(token)],
				["tokens per second", "", withCommas(1 / token)],
				["weights and cache", "", asked],
			],
		};
	},
};

figures.run("roofline", {
	model: { label: "Model", options: Object.keys(roof.models) },
	machine: { label: "Machine", options: MACHINES.map(({ name }) => name) },
	batch: { label: "Batch (sequences)", min: 0, max: 13, step: 1, value: 0, show: figures.power },
	context: { label: "Context (tokens)", min: 8, max: 17, step: 1, value: 13, show: figures.power },
	weights: { label: "Bits of weights", options: ["16", "8", "4"] },
	cache: { label: "Bits of the cache", options: ["16", "8", "4"] },
}, roof.draw);
