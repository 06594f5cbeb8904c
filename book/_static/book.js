// Repairs for all readers, and for those who use a keyboard or a screen reader, where Sphinx and the theme fall short.
"use strict";

function replaceBy(tag, name, element) {
  const replacement = document.createElement(tag);
  replacement.className = name;
  replacement.append(...element.childNodes);
  element.replaceWith(replacement);
}

function setRoles() {
  // The parameters of a long signature are written as definitions of nothing.
  for (const parameters of document.querySelectorAll("dt.sig > dl")) {
    for (const parameter of [...parameters.children]) replaceBy("div", "signature-parameter", parameter);
    replaceBy("div", "signature-parameters", parameters);
  }
  // The entries of the bibliography have a role that lists may not contain.
  for (const entry of document.querySelectorAll(".citation-list > .citation")) entry.role = "listitem";
  // In the list of modules, the modules of a package stand beside it, not in it.
  for (const list of document.querySelectorAll("article ul > ul")) list.previousElementSibling.append(list);
  // The book's title beside the pages belongs to no landmark.
  const sidebar = document.getElementById("pst-primary-sidebar");
  sidebar?.setAttribute("role", "complementary");
  sidebar?.setAttribute("aria-label", "Book");
}

function breakLongTexts(selector, places) {
  for (const text of [...document.querySelectorAll(selector)].flatMap((element) => [...element.childNodes])) {
    if (text.nodeType !== Node.TEXT_NODE || text.data.length <= 12) continue;
    const parts = text.data.split(places);
    text.replaceWith(...parts.flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part])));
  }
}

function setText() {
  // Long names in tables may break where a word in them begins, so that a phone shows more than one column.
  breakLongTexts("article table code .pre, article table.indextable code", /(?<=[._/=,(])(?=\w)|(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[0-9])(?=[A-Z]{2})/);
  breakLongTexts(".claims td, .claims td p", /(?<=_)(?=[a-z])/);
  // The link to an exercise begins with the space before it.
  for (const link of document.querySelectorAll(".solution > .admonition-title > a")) {
    if (!link.textContent.startsWith(" ")) continue;
    link.before(" ");
    link.firstChild.textContent = link.firstChild.textContent.trimStart();
  }
  for (const sign of document.querySelectorAll("img.toggler")) sign.alt = "Show or hide the modules of the package";
}

// A formula stays with the bracket before it and the punctuation behind it, whatever line they are on.
function keepPunctuation() {
  for (const math of document.querySelectorAll("article span.math")) {
    const formula = math.closest(".sized") ?? math;
    const [before, after] = [formula.previousSibling, formula.nextSibling];
    const opening = before?.nodeType === Node.TEXT_NODE ? before.data.match(/[(\[“‘]+$/)?.[0] ?? "" : "";
    const closing = after?.nodeType === Node.TEXT_NODE ? after.data.match(/^[.,;:!?)\]”’]+/)?.[0] ?? "" : "";
    if (!opening && !closing) continue;
    const together = document.createElement("span");
    together.className = "together";
    formula.replaceWith(together);
    together.append(opening, formula, closing);
    if (opening) before.data = before.data.slice(0, -opening.length);
    if (closing) after.data = after.data.slice(closing.length);
  }
}

// What is wider than its box scrolls, and keys must be able to scroll it too: also what is folded when the page loads.
function reachWideBoxes() {
  const reach = (box) => {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  };
  const sizes = new ResizeObserver((changes) => changes.forEach((change) => reach(change.target)));
  const boxes = "pre, .cell_output > .output, .pst-scrollable-table-container, mjx-container[display]";
  for (const box of document.querySelectorAll(boxes)) sizes.observe(box);
}

// Of a long list of claims, those with the verdicts that a reader wants; at first the misses.
function filterClaims() {
  const tables = [...document.querySelectorAll(".claims")];
  if (!tables.length) return;
  const rows = tables.flatMap((table) => [...table.querySelectorAll("tbody tr")]);
  const verdict = (row) => row.cells[3].textContent.trim().split(",")[0];
  const choice = document.createElement("fieldset");
  choice.className = "claims-filter";
  choice.innerHTML = "<legend>Show claims whose verdict is</legend>";
  const wanted = new Set(["off"]);
  // A table, and the heading above it, which is no section's where a cell printed both.
  const headed = (table) => {
    const box = table.closest(".pst-scrollable-table-container") ?? table;
    return [box, box.previousElementSibling].filter((part) => part === box || part?.matches("h2, h3, h4, .rubric"));
  };
  const show = () => {
    for (const row of rows) row.hidden = !wanted.has(verdict(row));
    for (const table of tables) {
      const none = [...table.querySelectorAll("tbody tr")].every((row) => row.hidden);
      for (const part of headed(table)) part.hidden = none;
    }
  };
  for (const name of new Set(rows.map(verdict))) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: wanted.has(name) });
    box.addEventListener("change", () => {
      if (box.checked) wanted.add(name);
      else wanted.delete(name);
      show();
    });
    label.append(box, ` ${name} (${rows.filter((row) => verdict(row) === name).length})`);
    choice.append(label);
  }
  headed(tables[0]).at(-1).before(choice);
  window.addEventListener("beforeprint", () => [...rows, ...tables.flatMap(headed)].forEach((part) => { part.hidden = false; }));
  window.addEventListener("afterprint", show);
  show();
}

// Paper is white: a page printed in dark colours would be black on black.
function printInLight() {
  const root = document.documentElement;
  const change = (printing) => {
    if (printing && root.dataset.theme === "dark") {
      root.dataset.theme = "light";
      root.dataset.printed = "dark";
    } else if (!printing && root.dataset.printed) {
      root.dataset.theme = root.dataset.printed;
      delete root.dataset.printed;
    }
  };
  window.addEventListener("beforeprint", () => change(true));
  window.addEventListener("afterprint", () => change(false));
  window.matchMedia("print").addEventListener("change", (event) => change(event.matches));
}

// ---- Search: excerpts are cut out of the pages' source, where formulas are still TeX and buttons are words.

const SIGNS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", Delta: "Δ", varepsilon: "ε", epsilon: "ε", eta: "η", theta: "θ", Theta: "Θ",
  lambda: "λ", mu: "μ", nu: "ν", pi: "π", rho: "ρ", sigma: "σ", tau: "τ", varphi: "φ", phi: "φ", psi: "ψ", omega: "ω", ell: "ℓ",
  cdot: "·", times: "×", odot: "⊙", oplus: "⊕", le: "≤", leq: "≤", ge: "≥", geq: "≥", ne: "≠", neq: "≠", ll: "≪", gg: "≫",
  approx: "≈", equiv: "≡", sim: "∼", propto: "∝", pm: "±", infty: "∞", in: "∈", notin: "∉", subset: "⊂", cup: "∪", to: "→",
  rightarrow: "→", mapsto: "↦", sum: "∑", prod: "∏", int: "∫", partial: "∂", nabla: "∇", sqrt: "√", top: "ᵀ", lVert: "‖",
  rVert: "‖", Vert: "‖", lvert: "|", rvert: "|", mid: "|", langle: "⟨", rangle: "⟩", lfloor: "⌊", rfloor: "⌋", lceil: "⌈",
  rceil: "⌉", dots: "…", ldots: "…", cdots: "…", quad: " ", qquad: " ",
};
const UNSEEN = /\\(mathrm|mathbf|mathbb|mathcal|mathit|mathsf|text\w*|operatorname\*?|boldsymbol|left|right|[bB]igg?[lr]?|tilde|hat|bar|underbrace)(?![a-zA-Z])/g;

function readable(tex) {
  return tex
    .replace(/\\[td]?frac\s*(\w|\{[^{}]*\})\s*(\w|\{[^{}]*\})/g, "$1/$2")
    .replace(UNSEEN, "")
    .replace(/\\([a-zA-Z]+)\s?/g, (_, name) => SIGNS[name] ?? name)
    .replace(/\\[,;:! ]/g, " ")
    .replace(/(?<!\\)[{}]/g, "")
    .replace(/\\(?=\W)/g, "");
}

function repairSearch() {
  if (typeof Search === "undefined") return;
  Search.htmlToText = (source, anchor) => {
    const page = new DOMParser().parseFromString(source, "text/html");
    for (const unsaid of page.querySelectorAll(".headerlink, script, style, div.math")) unsaid.replaceWith(" ");
    for (const formula of page.querySelectorAll("span.math"))
      formula.textContent = readable(formula.textContent.replace(/^\\\(|\\\)$/g, ""));
    const part = anchor ? page.getElementById(decodeURIComponent(anchor.slice(1))) : null;
    return ((part ?? page.querySelector("article"))?.textContent ?? "").replace(/\s+/g, " ");
  };
}

// A browser does not let a page that lies in a folder read the pages beside it, so there are no excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

printInLight();
document.addEventListener("DOMContentLoaded", () => {
  setRoles();
  setText();
  filterClaims();
  repairSearch();
});
window.addEventListener("load", async () => {
  await window.MathJax?.startup.promise;
  keepPunctuation();
  reachWideBoxes();
});
