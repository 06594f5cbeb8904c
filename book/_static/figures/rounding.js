// 64 weights in groups that share a scale: what rounding leaves of them, by the rules of dsv2_ref.codes.
"use strict";

const few = {
	real: document.querySelector("[data-weights]").dataset.weights.split(" ").map(Number),
	outlier: 20,

	// The nearest multiple of 1 or, in e4m3, of an eighth of the power of two below, at least 1/512; halves to the even.
	code(units, whole) {
		const step = whole ? 1 : 2 ** (Math.max(-6, Math.floor(Math.log2(Math.abs(units)))) - 3);
		const near = Math.round(units / step);
		return (near - units / step === 0.5 && near % 2 ? near - 1 : near) * step;
	},

	round(weights, largest, size, whole) {
		return Array.from({ length: weights.length / size }, (_, i) => {
			const given = weights.slice(i * size, (i + 1) * size);
			const scale = Math.max(...given.map(Math.abs)) / largest;
			const codes = given.map((x) => few.code(x / scale, whole));
			return { given, scale, codes, kept: codes.map((code) => code * scale) };
		});
	},

	error(parts) {
		const sum = (square) => parts.reduce((all, { given, kept }) => given.reduce((some, x, i) => some + square(x, kept[i]), all), 0);
		return `${(100 * Math.sqrt(sum((x, y) => (x - y) ** 2) / sum((x) => x * x))).toFixed(1)} %`;
	},

	// What is beyond the edge is drawn there.
	chart(parts, room) {
		const { element, line, text } = figures;
		const width = figures.wide(room);
		const { length } = parts[0].given;
		const x = (i) => 34 + ((i + 0.5) / 64) * (width - 40);
		const y = (value) => 100 - 92 * Math.min(1, Math.max(-1, value / 0.15));
		const svg = figures.chart(width, 200);
		for (const [value, label] of [[0.1, "0.1"], [0, "0"], [-0.1, "−0.1"]])
			svg.append(line(34, y(value), width, y(value), "chart-grid"), text(29, y(value) + 4, label, "end"));
		for (const [part, { given, kept }] of parts.entries()) {
			const edge = x(part * length - 0.5);
			if (part) svg.append(line(edge, 0, edge, 200, "chart-here"));
			for (const [i, value] of given.entries()) {
				const cx = x(part * length + i);
				svg.append(line(cx, y(0), cx, y(value), "chart-line"), element("circle", { cx, cy: y(kept[i]), r: 2.5, class: "chart-point" }));
			}
		}
		return svg;
	},

	draw({ format, bits, group, factor }, room) {
		const { outlier, error } = few;
		const whole = format !== "e4m3";
		const weights = few.real.map((x, i) => (i === outlier ? x * factor : x));
		const parts = few.round(weights, whole ? 2 ** (bits - 1) - 1 : 448, Number(group), whole);
		const [codes, scales] = [8 * (whole ? bits : 8), 2 * parts.length];
		const zeros = parts.flatMap((part) => part.codes).filter((code) => code === 0).length;
		const bars = Object.entries({ codes, scales, "in bfloat16": 128 });
		return {
			sentence: `${whole ? `int${bits}` : format} in groups of ${group}, weight ${outlier} at ${weights[outlier].toFixed(2).replace("-", "−")}: the rounded `
				+ `weights are ${error(parts)} off, and ${zeros} of them are 0. They take ${codes + scales} bytes; in bfloat16 they took 128.`,
			picture: [few.chart(parts, room), figures.element("p", { class: "figure-legend" },
				"Lines: 64 weights. Points: what they are after rounding. Dashes part the groups, each with its own scale.")],
			groups: [{ title: "Bytes", bars: bars.map(([label, value]) => ({ label, value, text: `${value}` })) }],
			hidden: whole ? [] : ["bits"],
			head: ["group", "error", "scale", "codes"],
			rows: [
				...parts.map((part, i) => [`${i}`, error([part]), part.scale.toFixed(6), part.codes.join(" ").replaceAll("-", "−")]),
				["all", error(parts), `${scales} bytes`, `${codes} bytes`],
			],
		};
	},
};

figures.run("rounding", {
	format: { label: "Format", options: ["whole numbers", "e4m3"] },
	bits: { label: "Bits", min: 2, max: 8, step: 1, value: 4, show: String },
	group: { label: "Weights per scale", options: ["8", "16", "32", "64"], value: "64" },
	factor: { label: `Weight ${few.outlier}, times`, min: 1, max: 40, step: 1, value: 1, show: String },
}, few.draw);
