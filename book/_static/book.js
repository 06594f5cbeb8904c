// Repairs for readers who use a keyboard or a screen reader, where Sphinx and the theme fall short.
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
  // The book's title beside the pages belongs to no landmark.
  const sidebar = document.getElementById("pst-primary-sidebar");
  sidebar?.setAttribute("role", "complementary");
  sidebar?.setAttribute("aria-label", "Book");
}

// A formula wider than the screen scrolls; keys must be able to scroll it too.
function reachWideFormulas() {
  for (const formula of document.querySelectorAll("mjx-container[display]")) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
    else formula.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", setRoles);
window.addEventListener("load", async () => {
  await window.MathJax?.startup.promise;
  reachWideFormulas();
  window.addEventListener("resize", reachWideFormulas);
});
