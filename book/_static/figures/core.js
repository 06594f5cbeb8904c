// The shared part of the interactive figures: labelled controls, bars, one spoken sentence, and the state in the address.
"use strict";

const figures = {
	withCommas: (x) => Math.round(x).toLocaleString("en-US"),
	power: (x) => figures.withCommas(2 ** x),

	// Three significant digits and a unit in powers of ten.
	amount(x, unit) {
		const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
		const [size, prefix] = steps.find(([least]) => x >= least) ?? [1, ""];
		const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.max(1, x / size))));
		return `${(x / size).toFixed(size === 1 ? 0 : digits)} ${prefix}${unit}`;
	},

	element(tag, attributes = {}, ...children) {
		const svg = ["svg", "rect", "text", "title", "line", "path", "circle", "g"].includes(tag);
		const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
		for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
		made.append(...children);
		return made;
	},

	// On each place of the page for it, a figure by its name; see `start`.
	run(name, ...rest) {
		for (const root of document.querySelectorAll(`[data-figure="${name}"]`)) figures.start(root, name, ...rest);
	},

	// A chart as wide as there is room, and what it is made of.
	wide: (room) => Math.max(240, Math.min(640, room)),
	chart: (width, height) => figures.element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "figure-chart", "aria-hidden": "true" }),
	line: (x1, y1, x2, y2, kind = "") => figures.element("line", { x1, x2, y1, y2, class: kind }),
	text: (x, y, words, anchor = "middle") => figures.element("text", { x, y, "text-anchor": anchor }, words),

	// A figure in `root`. `controls` by name: {label, options, sets}, or {label, min, max, step, value, show} for a slider, with
	// `type: "number"` for a field; `sets` says what a choice makes of the others. `draw(state, width)` gives {sentence, groups:
	// [{title, bars: [{label, value, text, kind}], most, layout}]}, and if wanted `picture` (above the bars), `rows` of the table
	// ([name, text, …]; else it lists the bars) with `head`, and `hidden` (controls that do nothing now). It is drawn anew in
	// another width. The address goes before `data-start`, which goes before `value`.
	start(root, name, controls, draw) {
		const { element } = figures;
		const asked = new URLSearchParams(location.search);
		const given = new URLSearchParams(root.dataset.start);
		let numbers;
		const form = element("form", { class: "figure-controls" });
		const fields = {};
		for (const [key, control] of Object.entries(controls)) {
			const id = `${name}-${key}`;
			let field;
			if (control.options) {
				field = element("select", { id, name: key });
				for (const option of control.options) field.append(element("option", { value: option }, option));
			} else {
				field = element("input", { id, name: key, type: control.type ?? "range", min: control.min, max: control.max, step: control.step });
			}
			const wanted = asked.get(id) ?? given.get(key) ?? control.value ?? control.options[0];
			field.value = wanted;
			if (field.value !== String(wanted)) field.value = control.value ?? control.options[0];
			const shown = element("output", { for: id });
			const label = element("label", { for: id }, control.label, " ", control.show ? shown : "");
			if (control.type === "number") {
				numbers ??= form.appendChild(element("div", { class: "figure-numbers" }));
				numbers.append(element("div", {}, label, field));
			} else form.append(label, field);
			fields[key] = { field, shown, control, label };
		}
		form.addEventListener("submit", (event) => event.preventDefault());
		const picture = element("div", { class: "figure-bars" });
		const sentence = element("p", { class: "figure-sentence", "aria-live": "polite" });
		const table = element("table", { hidden: "" });
		const button = element("button", { type: "button", "aria-expanded": "false" }, "Show as a table");
		button.addEventListener("click", () => {
			table.hidden = !table.hidden;
			button.setAttribute("aria-expanded", String(!table.hidden));
		});
		let waiting;
		let width;
		const update = (first) => {
			const state = {};
			for (const [key, { field, shown, control }] of Object.entries(fields)) {
				state[key] = control.options ? field.value : Number(field.value);
				if (control.type === "number") state[key] = Math.min(control.max, Math.max(control.min, state[key]));
				if (control.show) {
					shown.textContent = control.show(state[key]);
					field.setAttribute("aria-valuetext", shown.textContent);
				}
			}
			width = root.clientWidth;
			const drawn = draw(state, width);
			picture.replaceChildren(...(drawn.picture ?? []), ...drawn.groups.map(figures.bars));
			const rows = drawn.rows ?? drawn.groups.flatMap(({ title, bars }) => bars.map(({ label, text }) => [`${title}: ${label}`, text]));
			table.replaceChildren(element("tbody", {}, ...rows.map(([label, ...texts]) =>
				element("tr", {}, element("th", { scope: "row" }, label), ...texts.map((text) => element("td", {}, text))))));
			if (drawn.head) table.prepend(element("thead", {}, element("tr", {}, ...drawn.head.map((text) => element("th", { scope: "col" }, text)))));
			for (const [key, { field, label }] of Object.entries(fields)) label.hidden = field.hidden = drawn.hidden?.includes(key) ?? false;
			clearTimeout(waiting);
			waiting = setTimeout(() => { sentence.textContent = drawn.sentence; }, first ? 0 : 300);
			if (first) return;
			const address = new URL(location.href);
			for (const [key, { field }] of Object.entries(fields)) address.searchParams.set(`${name}-${key}`, field.value);
			history.replaceState(null, "", address);
		};
		form.addEventListener("input", ({ target }) => {
			const { sets } = controls[target.name];
			for (const [key, value] of Object.entries(sets?.(target.value) ?? {})) fields[key].field.value = value;
			update(false);
		});
		root.replaceChildren(form, picture, sentence, button, table);
		update(true);
		new ResizeObserver(() => { if (root.clientWidth !== width) update(true); }).observe(root);
	},

	// Horizontal bars with a common scale, up to `most` if given; each says its value beside it, so that colour and length are not all.
	bars({ title, bars, most: given, layout = "" }) {
		const { element } = figures;
		const most = given ?? Math.max(...bars.map(({ value }) => value));
		return element("div", { class: `figure-group ${layout}` }, element("p", { class: "figure-title" }, title),
			...bars.map(({ label, value, text, kind }) => element("div", { class: "figure-bar" },
				element("span", {}, label),
				element("span", { class: "figure-track", "aria-hidden": "true" },
					element("span", { class: `figure-fill ${kind}`, style: `width: ${Math.max(0.3, (100 * value) / most)}%` })),
				element("span", { class: "figure-value" }, text))));
	},
};
