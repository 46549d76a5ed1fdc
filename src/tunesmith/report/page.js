"use strict";
// Filter and search the answers, and show a few dozen at a time. Texts become text nodes, never HTML.
(() => {
  const block = document.getElementById("sample-data");
  if (!block) return;
  const PAGE = 40;
  const STATES = { better: "better", worse: "worse", mixed: "better and worse", same: "same grade" };
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff]|[\u{d800}-\u{dfff}\u{e0000}-\u{e0fff}]/gu;
  const samples = JSON.parse(block.textContent);
  const list = document.getElementById("sample-list");
  const search = document.getElementById("sample-search");
  const status = document.getElementById("sample-status");
  const buttons = [...document.querySelectorAll("[data-show]")];
  let filter = "all";
  let matches = [];
  let shown = 0;

  const element = (name, className, ...content) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.append(...content);
    return node;
  };

  // Append text with each hidden character as an element.
  const appendText = (node, text) => {
    let end = 0;
    for (const match of text.matchAll(HIDDEN)) {
      const code = "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(text.slice(end, match.index), element("b", "hidden", code));
      end = match.index + match[0].length;
    }
    node.append(text.slice(end));
    return node;
  };

  const quoted = (name, pieces) => {
    const node = element(name);
    node.dir = "auto";
    pieces.forEach((piece, i) => (i % 2 ? node.append(appendText(element("mark"), piece)) : appendText(node, piece)));
    return node;
  };

  const pane = (name, pieces) => {
    const text = quoted("pre", pieces);
    text.tabIndex = 0;
    text.setAttribute("aria-label", name);
    text.setAttribute("role", "group");
    return element("div", "pane " + name.toLowerCase(), element("h4", "", name), text);
  };

  const article = (sample) => {
    const state = element("b", "outcome " + sample.state, STATES[sample.state]);
    const node = element("article", "sample", element("h3", "sample-head", quoted("bdi", [sample.id]), " ", state));
    const grades = sample.grades.map(([metric, before, after]) => element("span", "grade", `${metric} ${+before.toPrecision(3)} → ${+after.toPrecision(3)}`));
    if (grades.length) node.append(element("p", "grades", ...grades));
    const prompt = pane("Prompt", [sample.prompt]);
    prompt.classList.add("prompt");
    const panes = [["Expected", sample.expected], ["Before", sample.before], ["After", sample.after]].filter(([, pieces]) => pieces.length);
    node.append(prompt, element("div", "panes", ...panes.map(([title, pieces]) => pane(title, pieces))));
    return node;
  };

  const searchText = (sample) => (sample.searchText ??= [sample.id, sample.prompt, ...sample.expected, "\n", ...sample.before, "\n", ...sample.after].join("").toLowerCase());
  const FILTERS = {
    all: () => true,
    changed: (sample) => sample.changed,
    unchanged: (sample) => !sample.changed,
    better: (sample) => sample.state === "better",
    worse: (sample) => sample.state === "worse",
  };

  const more = element("button", "", "Show more");
  more.type = "button";
  more.id = "sample-more";

  const extend = () => {
    list.append(...matches.slice(shown, shown + PAGE).map(article));
    shown = Math.min(matches.length, shown + PAGE);
    more.hidden = shown >= matches.length;
    status.textContent = `${matches.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} answers, ${shown.toLocaleString("en")} shown`;
  };

  const restart = () => {
    const text = search.value.trim().toLowerCase();
    matches = samples.filter((sample) => FILTERS[filter](sample) && (!text || searchText(sample).includes(text)));
    shown = 0;
    list.replaceChildren();
    extend();
  };

  buttons.forEach((button) => button.addEventListener("click", () => {
    filter = button.dataset.show;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    restart();
  }));
  let timer;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(restart, 120);
  });
  more.addEventListener("click", () => {
    const next = shown;
    extend();
    list.children[next]?.querySelector("pre")?.focus();
  });
  document.querySelector("#samples-here > .note")?.remove();
  document.getElementById("samples-here").append(more);
  document.getElementById("sample-filters").hidden = false;
  restart();
})();
