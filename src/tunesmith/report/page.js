"use strict";
// The answers: filtered, searched and shown a few dozen at a time. Texts become text nodes, never HTML.
(() => {
  const block = document.getElementById("sample-data");
  if (!block) return;
  const PAGE = 40;
  const STATES = { better: "better", worse: "worse", mixed: "better and worse", same: "graded alike" };
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff]|[\u{d800}-\u{dfff}\u{e0000}-\u{e0fff}]/gu;
  const samples = JSON.parse(block.textContent);
  const list = document.getElementById("sample-list");
  const search = document.getElementById("sample-search");
  const status = document.getElementById("sample-status");
  const buttons = [...document.querySelectorAll("[data-show]")];
  let wanted = "all", found = [], shown = 0;

  const element = (name, kind, ...content) => {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    made.append(...content);
    return made;
  };

  const fill = (place, text) => {
    let end = 0;
    for (const match of text.matchAll(HIDDEN)) {
      const code = "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      place.append(text.slice(end, match.index), element("b", "hidden", code));
      end = match.index + match[0].length;
    }
    place.append(text.slice(end));
    return place;
  };

  const foreign = (name, kind, pieces) => {
    const place = element(name, kind);
    place.dir = "auto";
    pieces.forEach((piece, i) => (i % 2 ? place.append(fill(element("mark"), piece)) : fill(place, piece)));
    return place;
  };

  const pane = (name, pieces) => {
    const text = foreign("pre", "", pieces);
    text.tabIndex = 0;
    text.setAttribute("aria-label", name);
    text.setAttribute("role", "group");
    return element("div", "pane " + name.toLowerCase(), element("h4", "", name), text);
  };

  const article = (one) => {
    const head = element("h3", "sample-head", foreign("bdi", "", [one.id]), " ", element("b", "outcome " + one.state, STATES[one.state]));
    const grades = one.grades.map(([name, was, now]) => element("span", "grade", `${name} ${+was.toPrecision(3)} → ${+now.toPrecision(3)}`));
    const panes = [["Expected", one.expected], ["Before", one.before], ["After", one.after]].filter(([, pieces]) => pieces.length);
    const made = element("article", "sample", head);
    if (grades.length) made.append(element("p", "grades", ...grades));
    const prompt = pane("Prompt", [one.prompt]);
    prompt.classList.add("prompt");
    made.append(prompt, element("div", "panes", ...panes.map((each) => pane(...each))));
    return made;
  };

  const words = (one) => (one.words ??= [one.id, one.prompt, ...one.expected, "\n", ...one.before, "\n", ...one.after].join("").toLowerCase());
  const fits = {
    all: () => true,
    changed: (one) => one.changed,
    same: (one) => !one.changed,
    better: (one) => one.state === "better",
    worse: (one) => one.state === "worse",
  };

  const more = element("button", "", "Show more");
  more.type = "button";
  more.id = "sample-more";

  const extend = () => {
    list.append(...found.slice(shown, shown + PAGE).map(article));
    shown = Math.min(found.length, shown + PAGE);
    more.hidden = shown >= found.length;
    status.textContent = `${found.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} answers, ${shown.toLocaleString("en")} shown`;
  };

  const restart = () => {
    const text = search.value.trim().toLowerCase();
    found = samples.filter((one) => fits[wanted](one) && (!text || words(one).includes(text)));
    shown = 0;
    list.replaceChildren();
    extend();
  };

  buttons.forEach((button) => button.addEventListener("click", () => {
    wanted = button.dataset.show;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    restart();
  }));
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(restart, 120);
  });
  more.addEventListener("click", () => {
    const next = shown;
    extend();
    const first = list.children[next]?.querySelector("pre");
    if (first) first.focus();
  });
  document.querySelector("#samples-here > .note")?.remove();
  document.getElementById("samples-here").append(more);
  document.getElementById("sample-filters").hidden = false;
  restart();
})();
