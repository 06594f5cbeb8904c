// 64 weights in groups that share a scale: what rounding leaves of them, by the rules of dsv2_ref.codes.
"use strict";

const roundingFigure = {
  outlier: 20,

  // Halves go to the even neighbour, as in torch.
  even(x) {
    const near = Math.round(x);
    return near - x === 0.5 && near % 2 ? near - 1 : near;
  },

  // A whole number, or in e4m3 three bits after the leading one, and steps of 1/512 near zero.
  code(units, whole) {
    const step = whole ? 1 : 2 ** (Math.max(-6, Math.floor(Math.log2(Math.abs(units)))) - 3);
    return roundingFigure.even(units / step) * step;
  },

  groups(weights, largest, size, whole) {
    return Array.from({ length: weights.length / size }, (_, i) => {
      const given = weights.slice(i * size, (i + 1) * size);
      const scale = Math.max(...given.map(Math.abs)) / largest;
      const codes = given.map((x) => roundingFigure.code(x / scale, whole));
      return { given, scale, codes, kept: codes.map((code) => code * scale) };
    });
  },

  error(parts) {
    const sum = (square) => parts.reduce((all, { given, kept }) => all + given.reduce((some, x, i) => some + square(x, kept[i]), 0), 0);
    return `${(100 * Math.sqrt(sum((x, y) => (x - y) ** 2) / sum((x) => x * x))).toFixed(1)} %`;
  },

  // Each weight as a line from zero, and a point where it is after rounding; beyond the edge an outlier is cut off.
  chart(parts, room) {
    const { element } = figures;
    const [width, height, most] = [Math.max(240, Math.min(640, room)), 200, 0.5];
    const { length } = parts[0].given;
    const x = (i) => 34 + ((i + 0.5) / (parts.length * length)) * (width - 40);
    const y = (value) => 100 - 92 * Math.min(1, Math.max(-1, value / most));
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "figure-chart", "aria-hidden": "true" });
    for (const value of [-0.4, 0, 0.4]) {
      svg.append(element("line", { x1: 34, x2: width, y1: y(value), y2: y(value), class: "chart-grid" }),
        element("text", { x: 29, y: y(value) + 4, "text-anchor": "end" }, `${value}`.replace("-", "−")));
    }
    parts.forEach(({ given, kept }, part) => {
      if (part) svg.append(element("line", { x1: x(part * length - 0.5), x2: x(part * length - 0.5), y1: 0, y2: height, class: "chart-here" }));
      given.forEach((value, i) => svg.append(
        element("path", { d: `M${x(part * length + i)} ${y(0)}V${y(value)}`, class: "chart-line" }),
        element("circle", { cx: x(part * length + i), cy: y(kept[i]), r: 2.5, class: "chart-point" })));
    });
    return svg;
  },

  draw(real, { format, bits, group, factor }, room) {
    const { outlier, error } = roundingFigure;
    const whole = format === "whole numbers";
    const width = whole ? bits : 8;
    const weights = real.map((x, i) => (i === outlier ? x * factor : x));
    const parts = roundingFigure.groups(weights, whole ? 2 ** (bits - 1) - 1 : 448, Number(group), whole);
    const [codes, scales] = [(weights.length * width) / 8, 2 * parts.length];
    const zeros = parts.flatMap((part) => part.codes).filter((code) => code === 0).length;
    return {
      sentence: `${whole ? `int${bits}` : "e4m3"} in groups of ${group}, weight ${outlier} at ${weights[outlier].toFixed(2)}: the rounded weights are `
        + `${error(parts)} off, and ${zeros} of them are 0. They take ${codes + scales} bytes, in bfloat16 128.`,
      picture: [roundingFigure.chart(parts, room),
        figures.element("p", { class: "figure-legend" }, "Lines: 64 weights. Points: what they are after rounding. Dashes part the groups, each with its own scale.")],
      groups: [{
        title: "Bytes",
        bars: [["codes", codes], ["scales", scales], ["in bfloat16", 128]].map(([label, value]) => ({ label, value, text: `${value}` })),
      }],
      hidden: whole ? [] : ["bits"],
      head: ["group", "error", "scale", "codes"],
      rows: [
        ...parts.map((part, i) => [`${i}`, error([part]), part.scale.toFixed(6), part.codes.join(" ").replaceAll("-", "−")]),
        ["all", error(parts), `${scales} bytes`, `${codes} bytes`],
      ],
    };
  },
};

document.addEventListener("DOMContentLoaded", () => {
  const controls = {
    format: { label: "Format", options: ["whole numbers", "e4m3"] },
    bits: { label: "Bits", min: 2, max: 8, step: 1, value: 4, show: String },
    group: { label: "Weights per scale", options: ["8", "16", "32", "64"], value: "64" },
    factor: { label: `Weight ${roundingFigure.outlier}, times`, min: 1, max: 40, step: 1, value: 1, show: (x) => `×${x}` },
  };
  for (const root of document.querySelectorAll('[data-figure="rounding"]')) {
    const real = root.querySelector("table").dataset.weights.split(" ").map(Number);
    figures.start(root, "rounding", controls, (state, room) => roundingFigure.draw(real, state, room));
  }
});
