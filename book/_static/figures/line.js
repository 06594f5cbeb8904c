// The book's line in the trained model: what a head reads, which experts are chosen, which byte is expected next.
"use strict";

const lineFigure = {
	// The data of line-data.js, unpacked: numbers are in hundredths.
	read({ text, attention, experts, weights, next, probabilities, lost }) {
		const bytes = (packed) => Array.from(packed, (c) => c.charCodeAt(0) - (c < "\x7f" ? 35 : 72));
		const past = (text.length * (text.length + 1)) / 2;
		const seen = bytes(attention);
		const weight = bytes(weights);
		const share = bytes(probabilities);
		const heads = 4;
		const threes = (make) => [0, 1, 2].map(make);
		return {
			text,
			lost,
			attention: (layer, head, token) => seen.slice((layer * heads + head) * past + (token * (token + 1)) / 2).slice(0, token + 1),
			experts(layer, token) {
				const from = 3 * ((layer - 1) * text.length + token);
				return layer ? threes((i) => ({ expert: parseInt(experts[from + i], 16), weight: weight[from + i] })) : [];
			},
			next: (token) => threes((i) => ({ character: next[3 * token + i], share: share[3 * token + i] })),
		};
	},

	// What a policy leaves of a row, and how much that was; of equal weights the newer is kept.
	kept(data, { policy, budget, token, layer, head }) {
		const seen = data.attention(layer, head, token);
		const heads = [0, 1, 2, 3].map((each) => data.attention(layer, each, token));
		const rank = {
			window: (at) => at,
			"best, shared by heads": (at) => heads.reduce((sum, row) => sum + row[at], 0),
			"best, per head": (at) => seen[at],
		}[policy];
		if (!rank) return { seen };
		const order = seen.map((_, at) => at).sort((a, b) => rank(b) - rank(a) || b - a).slice(0, budget);
		const sum = order.reduce((all, at) => all + seen[at], 0);
		return { sum, order, seen: seen.map((weight, at) => (order.includes(at) && sum ? (100 * weight) / sum : 0)) };
	},

	shown: (character) => ({ "\n": "⏎", " ": "␣" })[character] ?? character,
	said: (character) => ({ "\n": "the line end", " ": "a space" })[character] ?? `“${character}”`,
	decimals: (hundredths) => (hundredths / 100).toFixed(2),

	// The whole line, a bar over each byte that the token may read, and an arrow under the token.
	strip(text, seen, token, label, order) {
		const { element } = figures;
		const wide = 20;
		const svg = element("svg", { viewBox: `0 0 ${wide * text.length} 112`, role: "img", "aria-label": label, class: "figure-strip" });
		for (const [at, character] of Array.from(text).entries()) {
			const middle = wide * (at + 0.5);
			const masked = at > token || (order && !order.includes(at));
			const high = masked ? 0 : Math.max(1, (64 * seen[at]) / 100);
			if (!masked) svg.append(element("rect", { x: middle - 8, y: 70 - high, width: 16, height: high }));
			const letter = { x: middle, y: 88, class: masked ? "masked" : at === token ? "current" : "" };
			svg.append(element("text", letter, lineFigure.shown(character)));
			if (masked) svg.append(element("text", { x: middle, y: 70, class: "masked" }, "×"));
			if (at === token) svg.append(element("text", { x: middle, y: 106 }, "▲"));
		}
		svg.append(element("line", { x1: 0, x2: wide * text.length, y1: 70.5, y2: 70.5 }));
		return svg;
	},

	draw(data, state) {
		const { token, layer, head, policy, budget } = state;
		const { shown, said, decimals } = lineFigure;
		const { seen, sum, order: left } = lineFigure.kept(data, state);
		const order = seen.map((weight, at) => ({ weight, at })).sort((a, b) => b.weight - a.weight);
		const name = (at) => `${shown(data.text[at])} at ${at}`;
		const bar = (label, value, kind) => ({ label, value, text: decimals(value), kind });
		const experts = data.experts(layer, token);
		const next = data.next(token);
		const most = order[0];
		const who = `${said(data.text[token])} at position ${token}`;
		const read = `In layer ${layer}, head ${head}, ${who} reads ${said(data.text[most.at])} at ${most.at} most, with weight ${decimals(most.weight)}.`;
		const chosen = experts.length ? `Its experts there are ${experts.map(({ expert }) => expert).join(", ")}.` : "Layer 0 has an MLP in place of experts.";
		const cost = left ? ` “${policy}” leaves ${left.length} tokens with ${decimals(Math.min(100, sum))} of this head's weight; applied in every layer, it costs ${data.lost[policy].split(" ")[Math.log2(budget) - 2]} bits per byte.` : "";
		const best = `The model expects ${said(next[0].character)} next, with probability ${decimals(next[0].share)}.`;
		const groups = [
			{ title: "Most read", bars: order.slice(0, 3).map(({ weight, at }) => bar(name(at), weight, "latent")) },
			{
				title: experts.length ? `Experts of layer ${layer}, weights` : "No experts: layer 0 has an MLP",
				bars: experts.map(({ expert, weight }) => bar(`expert ${expert}`, weight, "expert")),
			},
			{ title: "Next byte, probabilities", bars: next.map(({ character, share }) => bar(shown(character), share, "query")) },
		];
		return {
			sentence: left ? read + cost : `${read} ${chosen} ${best}`,
			picture: [lineFigure.strip(data.text, seen, token, read, left)],
			groups: (left ? groups.slice(0, 1) : groups).map((group) => ({ ...group, most: 100, layout: "compact" })),
			rows: [
				...Array.from(data.text, (_, at) => [`weight of ${name(at)}`, at > token ? "masked" : left && !left.includes(at) ? "hidden" : decimals(seen[at])]),
				...(left ? [] : experts).map(({ expert, weight }) => [`expert ${expert}`, decimals(weight)]),
				...(left ? [] : next).map(({ character, share }) => [`next ${shown(character)}`, decimals(share)]),
			],
		};
	},
};

document.addEventListener("DOMContentLoaded", () => {
	const data = lineFigure.read(lineData);
	const controls = {
		token: { label: "Token", min: 0, max: data.text.length - 1, step: 1, value: 13, show: (at) => `${lineFigure.shown(data.text[at])} at position ${at}` },
		layer: { label: "Layer", min: 0, max: 3, step: 1, value: 2, show: String },
		head: { label: "Head", min: 0, max: 3, step: 1, value: 3, show: String },
	};
	const policies = {
		policy: { label: "Policy", options: ["everything", ...Object.keys(data.lost)] },
		budget: { label: "Tokens read", options: ["4", "8", "16"] },
	};
	const draw = (state) => lineFigure.draw(data, state);
	for (const root of document.querySelectorAll('[data-figure="line"]')) {
		figures.start(root, "line", root.dataset.start?.includes("policy") ? { ...controls, ...policies } : controls, draw);
	}
});
