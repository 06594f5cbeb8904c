// Puts the built pages together to one, as HTML (tools/pdf.py runs this in a browser that has the built book at hand).
// Names of places get the name of their page, so that every link leads where it led; what leads to a page that is not
// in the book becomes text. Solutions move from below their exercises to the end.
async ({ parts, version, style, scripts: drawing }) => {
  const names = parts.flatMap(([, some]) => some);
  const texts = await Promise.all(names.map(async (name) => (await fetch(`${name}.html`)).text()));
  const pages = new Map(names.map((name, i) => [name, new DOMParser().parseFromString(texts[i], "text/html")]));
  const first = pages.get(names[0]);
  const title = first.title;
  const made = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const place = (page, fragment) => (fragment ? `${page}--${decodeURIComponent(fragment)}` : page);
  // Where the number of the page is written that a place stands on.
  const paged = (target) => made("span", { class: "page", "data-place": target });
  const heading = (element) => {
    const copy = element.cloneNode(true);
    for (const named of copy.querySelectorAll("[id]")) named.removeAttribute("id");
    return [...copy.childNodes];
  };

  function gather(name, page) {
    const chapter = made("section", { id: name, class: "chapter", style: `page: ${name}` }, ...page.querySelector("article").childNodes);
    const unused = ".headerlink, .viewcode-link, script, link, button, .opening p:has(> .sd-btn)";
    for (const element of chapter.querySelectorAll(unused)) element.remove();
    for (const element of chapter.querySelectorAll("[id]")) element.id = place(name, element.id);
    for (const element of chapter.querySelectorAll("[for]")) element.htmlFor = place(name, element.htmlFor);
    // A formula is one thing, which its TeX describes; a figure is a group, and the picture in it has the description.
    for (const formula of chapter.querySelectorAll(".math")) {
      formula.setAttribute("role", "img");
      formula.setAttribute("aria-label", formula.textContent.trim().replace(/(?<!\\)\\[()[\]]/g, ""));
      // MathJax draws with generated content, for which alone Chromium makes no figure in a line of text.
      formula.append(made("span", { class: "spoken" }, "\u00a0"));
    }
    for (const figure of chapter.querySelectorAll("figure")) figure.setAttribute("role", "group");
    for (const folded of chapter.querySelectorAll("details")) folded.open = true;
    for (const link of chapter.querySelectorAll("a[href]")) {
      const address = new URL(link.getAttribute("href"), `${location.origin}/book/${name}.html`);
      if (address.origin !== location.origin) continue;
      const target = address.pathname.match(/^\/book\/(.+)\.html$/)?.[1];
      if (pages.has(target)) link.setAttribute("href", `#${place(target, address.hash.slice(1))}`);
      else link.replaceWith(...link.childNodes);
    }
    return chapter;
  }

  const loaded = [...pages.values()].flatMap((page) => [...page.querySelectorAll("script, link[rel=stylesheet]")]);
  const chapters = new Map([...pages].map(([name, page]) => [name, gather(name, page)]));
  // What the cover and the contents leave to the first page.
  const about = chapters.get(names[0]);
  about.querySelector("h1").textContent = "About this book";
  about.querySelector(".chapters").closest("section").remove();

  const solutions = made("section", { id: "solutions", class: "chapter", style: "page: solutions" }, made("h1", {}, "Solutions"));
  for (const [name, chapter] of chapters) {
    const found = chapter.querySelectorAll(".solution");
    if (found.length) solutions.append(made("h2", { id: `solutions--${name}` }, ...heading(chapter.querySelector("h1"))));
    for (const solution of found) {
      const exercise = solution.querySelector(".admonition-title a").getAttribute("href").slice(1);
      const link = made("a", { href: `#${solution.id}` }, "Solution on page ", paged(solution.id));
      chapter.querySelector(`#${CSS.escape(exercise)}`).append(made("p", { class: "to-solution" }, link));
      solutions.append(solution);
    }
  }

  const contents = made("nav", { class: "book-contents" }, made("h1", {}, "Contents"));
  const entry = (level, target, words) =>
    contents.append(made("p", { class: level }, made("a", { href: `#${target}` }, made("span", {}, ...words), paged(target))));
  for (const [caption, chapter] of [...parts.map(([caption, some]) => [caption, some.map((name) => chapters.get(name))]), ["", [solutions]]]) {
    if (caption) contents.append(made("p", { class: "part" }, caption));
    for (const each of chapter) {
      entry("title", each.id, heading(each.querySelector("h1")));
      for (const within of each.querySelectorAll("h2")) entry("within", within.id || within.closest("section").id, heading(within));
    }
  }

  const running = [...chapters.values(), solutions].map((chapter) => {
    const words = chapter.querySelector("h1").textContent.trim().replace(/\s+/g, " ");
    return `@page ${chapter.id} { @top-right { content: ${JSON.stringify(words)}; } }`;
  });
  const foot = `@page { @bottom-left { content: ${JSON.stringify(`${title}. ${version}`)}; } }`;
  const cover = made("section", { class: "cover" }, made("h1", {}, title), made("p", {}, version));
  cover.append(...first.querySelectorAll(".component-author, .copyright"));
  const main = made("article", { class: "bd-article" }, ...chapters.values(), solutions);
  const wanted = (element) =>
    element.src || element.href ? element.rel || drawing.some((part) => element.outerHTML.includes(part)) : element.text.includes("window.MathJax");
  const files = [...new Set(loaded.filter(wanted).map((element) => element.outerHTML.replace(/ defer(="\w*")?/, "")))];
  const body = [cover, contents, made("main", { class: "bd-content" }, main)].map((element) => element.outerHTML);
  return [
    '<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">',
    made("title", {}, title).outerHTML,
    ...files.filter((file) => file.startsWith("<link")),
    `<style>${[style, foot, ...running].join("\n")}</style></head><body>`,
    ...body,
    ...files.filter((file) => file.startsWith("<script")),
    "</body></html>",
  ].join("\n");
}
