// How a gate routes: one token to 8 experts by logits to type, or the book's line in layer 1 of the trained model.
"use strict";

const gate = {
	groups: 4,
	normalisings: ["no", "yes, then scale", "yes, in place of the scale"],

	softmax(logits) {
		const most = Math.max(...logits);
		const powers = logits.map((logit) => Math.exp(logit - most));
		const sum = powers.reduce((a, b) => a + b);
		return powers.map((power) => power / sum);
	},

	// The gate for one token, as in the package; of equal scores the lower number wins. No more than `open` groups hold.
	route(logits, k, open, normalise, scale) {
		const { groups, normalisings } = gate;
		const scores = gate.softmax(logits);
		const size = scores.length / groups;
		const falling = (values) => values.map((_, i) => i).sort((a, b) => values[b] - values[a]);
		const best = Array.from({ length: groups }, (_, group) => Math.max(...scores.slice(group * size, (group + 1) * size)));
		const opened = falling(best).slice(0, open);
		const order = falling(scores);
		const isOpen = (expert) => opened.includes(Math.floor(expert / size));
		const experts = order.filter(isOpen).slice(0, k);
		const sum = experts.reduce((total, expert) => total + scores[expert], 0);
		const divided = normalise !== normalisings[0] && experts.length > 1;
		const scaled = divided && normalise === normalisings[2] ? 1 : scale;
		const weights = experts.map((expert) => (scores[expert] / (divided ? sum : 1)) * scaled);
		return { scores, isOpen, experts, weights, order };
	},

	// f, P and the three losses of the paper with α = 1, for one sequence.
	balance(routes, open) {
		const { groups } = gate;
		const E = routes[0].scores.length;
		const size = E / groups;
		const k = routes[0].experts.length;
		const numbers = [...Array(E).keys()];
		const devices = [...Array(groups).keys()];
		const count = (wanted) => routes.filter(wanted).length;
		const f = numbers.map((expert) => (count(({ experts }) => experts.includes(expert)) * E) / (k * routes.length));
		const P = numbers.map((expert) => routes.reduce((sum, { scores }) => sum + scores[expert], 0) / routes.length);
		const add = (values) => values.reduce((a, b) => a + b, 0);
		const dot = (a, b) => add(a.map((x, i) => x * b[i]));
		const part = (values, device) => add(values.slice(device * size, (device + 1) * size));
		const ofDevice = devices.map((device) => part(P, device));
		const sent = devices.map((device) =>
			(count(({ experts }) => experts.some((expert) => Math.floor(expert / size) === device)) * groups) / (open * routes.length));
		const losses = {
			experts: dot(f, P),
			devices: dot(devices.map((device) => part(f, device) / size), ofDevice),
			communication: dot(sent, ofDevice),
		};
		return { f, P, losses };
	},

	places: ["1st", "2nd", "3rd", "4th", "5th", "6th"],
	three: (x) => x.toFixed(3),

	one({ k, open, normalise, scale, logits }) {
		const { route, places, groups, normalisings, three } = gate;
		const { scores, isOpen, experts, weights, order } = route(logits, k, open, normalise, scale);
		const size = scores.length / groups;
		const sum = weights.reduce((a, b) => a + b, 0);
		const state = (expert) =>
			experts.includes(expert) ? `, ${places[experts.indexOf(expert)]}` : isOpen(expert) ? "" : ", closed";
		const free = order.slice(0, experts.length);
		const lost = free.filter((expert) => !experts.includes(expert));
		const gained = experts.filter((expert) => !free.includes(expert));
		const list = (numbers) => `${numbers.length > 1 ? "experts" : "expert"} ${numbers.join(", ")}`;
		const scored = (numbers) => `${list(numbers)} (${numbers.map((expert) => three(scores[expert])).join(", ")})`;
		const limit = lost.length ? ` The group limit costs ${scored(lost)} and gives ${scored(gained)} instead.` : "";
		const alone = experts.length === 1 ? " A single weight is not normalised." : "";
		const fixed = normalise === normalisings[1] ? " Normalised, they sum to the scale, whatever the logits." : ` Normalised, they ignore the scale ${scale}.`;
		const hidden = normalise === normalisings[0] ? "" : alone || fixed;
		return {
			sentence: `Chosen: ${list(experts)}; the weights sum to ${three(sum)}.${limit}${hidden}`,
			groups: [
				{
					title: "Scores of experts: softmax of all logits",
					most: 1,
					layout: "compact wide",
					bars: scores.map((score, expert) => ({
						label: `${expert}, group ${Math.floor(expert / size)}`,
						value: score,
						text: three(score) + state(expert),
						kind: experts.includes(expert) ? "expert" : "query",
					})),
				},
				{
					title: `Weights of the chosen; they sum to ${three(sum)}`,
					most: Math.max(1, ...weights),
					bars: experts.map((expert, i) => ({ label: `expert ${expert}`, value: weights[i], text: three(weights[i]), kind: "expert" })),
				},
			],
		};
	},

	// Tokens by experts: a number says in which place an expert was chosen, a line that its group is closed.
	map(text, routes) {
		const { element, text: label } = figures;
		const { groups } = gate;
		const E = routes[0].scores.length;
		const size = E / groups;
		const cell = 20;
		const left = (expert) => 30 + cell * expert + 6 * Math.floor(expert / size);
		const svg = element("svg", { viewBox: `0 0 ${left(E - 1) + cell} ${cell * (text.length + 1) + 2}`, role: "img", class: "figure-map",
			"aria-label": `Which of ${E} experts each of ${text.length} tokens visits; the table lists them.` });
		for (let expert = 0; expert < E; expert++) svg.append(label(left(expert) + cell / 2, 15, expert));
		for (const [token, { experts, isOpen }] of routes.entries()) {
			const top = cell * (token + 1);
			svg.append(label(12, top + 15, text[token] === "\n" ? "⏎" : text[token]));
			for (let expert = 0; expert < E; expert++) {
				const place = experts.indexOf(expert);
				const x = left(expert);
				if (place >= 0) {
					svg.append(element("rect", { x: x + 1, y: top + 1, width: cell - 2, height: cell - 2, class: "chosen" }));
					svg.append(element("text", { x: x + cell / 2, y: top + 15, class: "on-chosen" }, String(place + 1)));
				} else if (isOpen(expert)) {
					svg.append(element("rect", { x: x + 1.5, y: top + 1.5, width: cell - 3, height: cell - 3, class: "open" }));
				} else svg.append(figures.line(x + 4, top + cell / 2, x + cell - 4, top + cell / 2));
			}
		}
		return svg;
	},

	line({ text, logits }, { k, open, normalise, scale }) {
		const { element } = figures;
		const { route, balance, map, three } = gate;
		const routes = logits.map((row) => route(row.map((logit) => logit / 1000), k, open, normalise, scale));
		const { f, P, losses } = balance(routes, open);
		const bars = (values, label, kind) => Object.entries(values).map(([name, value]) => ({ label: label + name, value, text: three(value), kind }));
		const most = f.indexOf(Math.max(...f));
		const idle = f.filter((x) => x === 0).length;
		const groups = [
			{ title: "Losses Σ f P, with α = 1", bars: bars(losses, "", "latent"), layout: "compact long" },
			{ title: "f: choices over an even share", bars: bars(f, "expert ", "expert") },
			{ title: "P: mean score", bars: bars(P, "expert ", "query") },
		];
		const unchanged = normalise !== "no" || scale !== 1 ? " Normalising and the scale change the weights, and none of these." : "";
		return {
			sentence: `${text.length} tokens choose ${routes[0].experts.length} of ${f.length} experts each: expert ${most} is chosen most (f ${three(f[most])}), `
				+ `${idle ? `and ${idle} ${idle === 1 ? "is" : "are"} never chosen` : "and none is left out"}. The expert loss is ${three(losses.experts)}, that of devices ${three(losses.devices)}, of communication ${three(losses.communication)}.${unchanged}`,
			picture: [element("div", { class: "figure-group" },
				element("p", { class: "figure-title" }, "Choices, numbered best first; – is a closed group"), map(text, routes))],
			groups,
			rows: [
				...groups.flatMap(({ title, bars: drawn }) => drawn.map((bar) => [`${title}: ${bar.label}`, bar.text])),
				...routes.map(({ experts, weights }, token) => [`token ${token}, ${text[token] === "\n" ? "⏎" : text[token]}`,
					experts.map((expert, i) => `${expert}: ${three(weights[i])}`).join(", ")]),
			],
		};
	},

	names: [...Array(8).keys()].map((expert) => `logit${expert}`),

	draw({ mode, k: wanted, groups: open, normalise, scale, ...fields }) {
		const { names, one, line, groups } = gate;
		const logits = names.map((name) => fields[name]);
		const batch = mode !== "one token";
		const most = (open * (batch ? routerData.logits[0].length : logits.length)) / groups;
		const state = { k: Math.min(wanted, most), open, normalise, scale: Number(scale), logits };
		const drawn = batch ? line(routerData, state) : one(state);
		const few = wanted > most ? ` Only ${most} experts are open, so k is ${most}.` : "";
		return {
			...drawn,
			sentence: drawn.sentence + few,
			groups: drawn.groups.map((group) => ({ layout: "compact", ...group })),
			hidden: batch ? names : [],
		};
	},
};

figures.run("router", {
	mode: { label: "Route", options: ["one token", "the line"], sets: (mode) => ({ k: 3, groups: mode === "the line" ? 2 : 4 }) },
	k: { label: "Experts per token", min: 1, max: 6, step: 1, value: 3, show: (k) => `k = ${k}` },
	groups: { label: "Groups open", min: 1, max: 4, step: 1, value: 4, show: (open) => `${open} of 4` },
	normalise: { label: "Normalise", options: gate.normalisings },
	scale: { label: "Scale", options: ["1", "2.5", "16"] },
	...Object.fromEntries([2, 0.6, 1.5, -0.5, 1.2, 0, 0.3, -1].map((value, expert) =>
		[gate.names[expert], { label: `Logit ${expert}`, type: "number", min: -9, max: 9, step: 0.1, value }])),
}, gate.draw);
