// The four pairs of the trained model's rope key as clocks, and the score of a query that equals its key.
"use strict";

const dial = {
	width: 8, trained: 128, base: 10000, call: 1025, most: 1024,

	// Radians per token of each pair, as dsv2_ref.rope.inverse_frequencies has them.
	steps(kind, base, stretch) {
		const { width, trained, call } = dial;
		if (kind === "dynamic") base *= (stretch * (call / trained) - (stretch - 1)) ** (width / (width - 2));
		const kept = Array.from({ length: width / 2 }, (_, pair) => 1 / base ** ((2 * pair) / width));
		if (kind === "linear") return kept.map((step) => step / stretch);
		if (kind !== "YaRN") return kept;
		const pairThatTurns = (times) => (width * Math.log(trained / (times * 2 * Math.PI))) / (2 * Math.log(base));
		const keptBelow = Math.max(Math.floor(pairThatTurns(32)), 0);
		const dividedFrom = Math.min(Math.ceil(pairThatTurns(1)), width - 1);
		return kept.map((step, pair) => {
			const divided = Math.min(1, Math.max(0, (pair - keptBelow) / (dividedFrom - keptBelow || 0.001)));
			return (step / stretch) * divided + step * (1 - divided);
		});
	},

	temperature: (kind, stretch) => (kind === "YaRN" ? (0.0707 * Math.log(stretch) + 1) ** 2 : 1),

	// How far training came around the circle, at most once.
	reached: (pair) => Math.min(2 * Math.PI, (dial.trained - 1) / dial.base ** ((2 * pair) / dial.width)),

	signed: (x, digits) => x.toFixed(digits).replace("-", "−"),

	// A clock: the arc that training showed, the hand, and thin hands of the neighbouring distances.
	clock(steps, pair, distance, seen) {
		const { element } = figures;
		const at = (angle, radius) => `${50 + radius * Math.cos(angle)} ${50 - radius * Math.sin(angle)}`;
		const arc = dial.reached(pair);
		const end = Math.min(arc, 2 * Math.PI - 0.001);
		const angle = distance * steps[pair];
		const hand = (turned, radius, kind) => element("path", { d: `M50 50L${at(turned, radius)}`, class: kind });
		return element("svg", { viewBox: "0 0 100 100", class: "clock", "aria-hidden": "true" },
			element("circle", { cx: 50, cy: 50, r: 46, class: "clock-face" }),
			element("path", { d: `M${at(0, 46)}A46 46 0 ${end > Math.PI ? 1 : 0} 0 ${at(end, 46)}`, class: "clock-seen" }),
			...[distance - 1, distance + 1].map((near) => hand(near * steps[pair], 40, "clock-near")),
			hand(angle, 40, seen ? "clock-hand" : "clock-hand clock-new"),
			element("circle", { cx: 50, cy: 50, r: 3, class: "clock-hub" }));
	},

	// Scores by distance, and the unstretched model's for comparison.
	curve(score, unstretched, distance, room) {
		const { element, line, text } = figures;
		const { most, trained } = dial;
		const [width, height, left, right, top, bottom] = [figures.wide(room), 220, 34, 12, 8, 40];
		const x = (d) => left + (d / most) * (width - left - right);
		const y = (value) => top + ((6 - value) / 12) * (height - top - bottom);
		const path = (value) => `M${Array.from({ length: most / 2 + 1 }, (_, i) => `${x(2 * i).toFixed(1)} ${y(value(2 * i)).toFixed(1)}`).join("L")}`;
		const svg = figures.chart(width, height);
		svg.append(element("rect", { x: x(0), y: top, width: x(trained) - x(0), height: height - top - bottom, class: "chart-region" }));
		for (const value of [-4, 0, 4])
			svg.append(line(left, y(value), width - right, y(value), "chart-grid"), text(left - 6, y(value) + 4, dial.signed(value, 0), "end"));
		for (const d of width < 420 ? [0, 512, 1024] : [0, 128, 256, 512, 768, 1024])
			svg.append(text(x(d), height - bottom + 17, figures.withCommas(d), d === most ? "end" : "middle"));
		svg.append(text((left + width) / 2, height - 5, "distance (tokens)"),
			element("path", { d: path(unstretched), class: "chart-other" }),
			element("path", { d: path(score), class: "chart-line" }),
			line(x(distance), top, x(distance), height - bottom, "chart-here"),
			element("circle", { cx: x(distance), cy: y(score(distance)), r: 6, class: "chart-point" }));
		return svg;
	},

	draw({ kind, base: chosen, stretch, distance }, room) {
		const { element, withCommas } = figures;
		const { signed, reached } = dial;
		const base = Number(chosen.replaceAll(",", ""));
		const steps = dial.steps(kind, base, stretch);
		const temperature = dial.temperature(kind, stretch);
		const scoreBy = (each, factor) => (d) => factor * each.reduce((sum, step) => sum + Math.cos(d * step), 0);
		const score = scoreBy(steps, temperature);
		const asTrained = dial.steps("none", dial.base, 1);
		const turn = 2 * Math.PI;
		const seen = steps.map((step, pair) => reached(pair) >= turn || (distance * step) % turn <= reached(pair) + 1e-9);
		const clocks = element("div", { class: "clocks" }, ...steps.map((step, pair) => element("div", {},
			dial.clock(steps, pair, distance, seen[pair]),
			element("p", {}, element("b", {}, `pair ${pair}`), element("br"), `${((distance * step) % turn).toFixed(2)} rad`, element("br"),
				seen[pair] ? "✓ seen in training" : "✗ new angle"))));
		const slow = seen.flatMap((known, pair) => (known ? [] : [pair]));
		const names = slow.length > 1 ? `pairs ${slow.slice(0, -1).join(", ")} and ${slow.at(-1)} show` : `pair ${slow[0]} shows`;
		const way = kind === "none" ? "" : `${kind === "dynamic" ? "dynamic NTK" : kind} ×${stretch}, `;
		const sentence = `Distance ${withCommas(distance)}, ${way}base ${chosen}: ${slow.length ? `${names} an angle never seen in training`
			: "training showed the angles of all pairs"}; the score is ${signed(score(distance), 2)}. The fastest hand turns ${steps[0].toFixed(3)} `
			+ "radians from a token to the next, 1 in training.";
		const legend = element("p", { class: "figure-legend" },
			"Circles: the thick part was seen in training, the thin hands are the neighbouring distances. Below: the score over the "
			+ "distance, dashed without stretching and with base 10,000; grey are the trained distances, up to 127.",
			kind === "dynamic" ? " Dynamic NTK depends on the call: here it has 1,025 tokens." : "",
			kind === "YaRN" ? ` Scores are multiplied by the temperature ${temperature.toFixed(4)}.` : "");
		return {
			sentence,
			picture: [clocks, dial.curve(score, scoreBy(asTrained, 1), distance, room), legend],
			groups: [],
			hidden: kind === "none" ? ["stretch"] : [],
			head: ["pair", "radians per token", "angle", "seen"],
			rows: [
				...steps.map((step, pair) => [`${pair}`, step.toFixed(6), (distance * step).toFixed(4), seen[pair] ? "yes" : "new"]),
				["temperature", "", temperature.toFixed(4), ""],
				["score", "", signed(score(distance), 4), ""],
			],
		};
	},
};

figures.run("clocks", {
	distance: { label: "Distance (tokens)", min: 0, max: dial.most, step: 1, value: 16, show: figures.withCommas },
	kind: { label: "Stretch by", options: ["none", "linear", "dynamic", "YaRN"] },
	stretch: { label: "Stretch factor", min: 1, max: 16, step: 1, value: 4, show: (x) => `×${x}` },
	base: { label: "Base", options: ["100", "1,000", "10,000", "160,000", "500,000"], value: "10,000" },
}, dial.draw);
