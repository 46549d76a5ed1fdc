"use strict";
// Texts become text nodes, never HTML.
// ---------------------------------------------------------------- panes, commands, sections
(() => {
  // Only what scrolls is a stop of the Tab key.
  const update = (pane) => {
    const scrolls = pane.scrollWidth > pane.clientWidth + 1 || pane.scrollHeight > pane.clientHeight + 1;
    if (scrolls) pane.tabIndex = 0;
    else pane.removeAttribute("tabindex");
  };
  const sizes = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target)));
  window.watchPane = (pane) => sizes.observe(pane);
  document.querySelectorAll(".scroll, .pane pre, .context pre, pre.trained").forEach(window.watchPane);

  const copy = async (button) => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  document.querySelectorAll("button.copy").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  });

  // A link past a single stop, or past none, is one stop more.
  document.querySelectorAll("main > section > a.skip").forEach((link) => {
    if (link.parentElement.querySelectorAll("a, button, summary").length < 3) link.remove();
  });

  // The section that is being read is marked in the navigation.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const visible = new Set();
  const seen = new IntersectionObserver((entries) => {
    entries.forEach((entry) => (entry.isIntersecting ? visible.add(entry.target.id) : visible.delete(entry.target.id)));
    const current = [...links.keys()].find((id) => visible.has(id));
    links.forEach((link, id) => (id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  }, { rootMargin: "-10% 0px -70% 0px" });
  links.forEach((_, id) => seen.observe(document.getElementById(id)));
})();

// ---------------------------------------------------------------- answers
(() => {
  const block = document.getElementById("sample-data");
  if (!block) return;
  const FIRST = 10;
  const PAGE = 40;
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffc\ufffe\uffff]|[\u{d800}-\u{dfff}\u{e0000}-\u{e0fff}]/gu;
  const { samples, messages, fields } = JSON.parse(block.textContent);
  const list = document.getElementById("sample-list");
  const search = document.getElementById("sample-search");
  const status = document.getElementById("sample-status");
  const buttons = [...document.querySelectorAll("[data-show]")];
  const chips = [...document.querySelectorAll("[data-chip]")];
  // The answers are then a list with the open one beside it, as page.css says.
  const isWide = matchMedia("(min-width: 1100px)");
  let filter = "all";
  let field = null;
  let rows = null;
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

  const scrollText = (name, pieces) => {
    const text = quoted("pre", pieces);
    text.tabIndex = 0; // until its size is known
    text.setAttribute("aria-label", name);
    text.setAttribute("role", "group");
    window.watchPane(text);
    return text;
  };

  const pane = (name, pieces) => {
    const text = scrollText(name, pieces);
    return element("div", "pane " + name.toLowerCase(), element("p", "pane-title", name), text);
  };

  const fieldTable = (sample) => {
    const head = element("tr");
    for (const name of ["Field", "Expected", "Before", "After", "Result"]) {
      const cell = element("th", "", name);
      cell.scope = "col";
      head.append(cell);
    }
    const body = element("tbody");
    for (const [name, expected, before, after, isRight] of sample.fields) {
      const title = element("th", "", quoted("bdi", [name]));
      title.scope = "row";
      const line = element("tr", isRight ? "right" : "wrong", title);
      for (const [label, value] of [["expected", expected], ["before", before], ["after", after]]) {
        const cell = element("td", "", value === null ? element("span", "soft", "–") : quoted("code", [value]));
        cell.dataset.label = label;
        line.append(cell);
      }
      line.append(element("td", "sign", isRight ? "✓ right" : "✗ wrong"));
      body.append(line);
    }
    return element("table", "fields", element("thead", "", head), body);
  };

  const fill = (node, sample) => {
    const grades = sample.grades.map(([metric, before, after]) => element("span", "grade", `${metric.replaceAll("_", " ")} ${+before.toPrecision(3)} → ${+after.toPrecision(3)}`));
    if (grades.length) node.append(element("p", "grades", ...grades));
    const prompt = pane("Prompt", [sample.prompt]);
    prompt.classList.add("prompt");
    node.append(prompt);
    if (sample.context) node.append(element("details", "context", element("summary", "", "Messages before the prompt"), scrollText("Messages before the prompt", [sample.context])));
    if (sample.fields.length) node.append(fieldTable(sample));
    if (sample.panes.length) node.append(element("div", "panes", ...sample.panes.map(([title, pieces]) => pane(title, pieces))));
  };

  const row = (sample) => {
    const hint = sample.wrongFields.length ? sample.wrongFields.join(", ") : sample.prompt.slice(0, 120);
    const summary = element("summary", "", element("span", "sample-id", quoted("bdi", [sample.id])), " ", element("b", "outcome " + sample.outcome, sample.label), " ", element("span", "sample-hint", quoted("bdi", [hint])));
    summary.tabIndex = -1; // moveStop makes one row the stop
    const body = element("div", "sample-body");
    const node = element("details", "sample", summary, element("div", "sample-column", body));
    node.name = "sample"; // one at a time
    node.addEventListener("toggle", () => fill(body, sample), { once: true });
    window.watchPane(body);
    return node;
  };

  const searchText = (sample) => (sample.searchText ??= [sample.id, sample.prompt, ...sample.fields.flat(), ...sample.panes.flatMap(([, pieces]) => ["\n", ...pieces])].join("").toLowerCase());
  const FILTERS = {
    "all": () => true,
    "wrong-now": (sample) => sample.state === "wrong" || sample.state === "broken",
    "right-now": (sample) => sample.state === "right" || sample.state === "fixed",
    "fixed": (sample) => sample.state === "fixed",
    "broken": (sample) => sample.state === "broken",
    "better": (sample) => sample.state === "better",
    "worse": (sample) => sample.state === "worse",
    "changed": (sample) => sample.changed,
  };

  const more = element("button", "", "Show more");
  more.type = "button";
  more.id = "sample-more";

  const extend = (count) => {
    list.append(...matches.slice(shown, shown + count).map(row));
    shown = Math.min(matches.length, shown + count);
    more.hidden = shown >= matches.length;
    status.textContent = `${matches.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} answers, ${shown.toLocaleString("en")} shown`;
  };

  // The list is one stop of the Tab key: the row that had the focus last.
  let stop = null;
  const moveStop = (summary) => {
    if (stop) stop.tabIndex = -1;
    stop = summary;
    stop.removeAttribute("tabindex");
  };

  const restart = () => {
    const text = search.value.trim().toLowerCase();
    const passes = (sample) => FILTERS[filter](sample) && (field === null || sample.faults.includes(field)) && (!rows || rows.has(sample.id));
    matches = samples.filter((sample) => passes(sample) && (!text || searchText(sample).includes(text)));
    shown = 0;
    list.replaceChildren();
    extend(FIRST);
    if (matches.length) {
      moveStop(list.querySelector("summary"));
      list.firstElementChild.open = isWide.matches;
      return;
    }
    const isPlain = !text && field === null && !rows;
    list.append(element("p", "empty", isPlain ? messages[filter] : "No answer passes all filters."));
  };

  const press = () => {
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.show === filter && !rows)));
    chips.forEach((chip) => chip.setAttribute("aria-pressed", String(field !== null && fields[chip.dataset.chip] === field)));
    restart();
  };

  buttons.forEach((button) => button.addEventListener("click", () => {
    filter = button.dataset.show;
    rows = null;
    if (filter === "all") field = null;
    press();
  }));
  chips.forEach((chip) => chip.addEventListener("click", () => {
    const name = fields[chip.dataset.chip];
    field = field === name ? null : name;
    rows = null;
    press();
  }));
  // Each row of buttons is one stop, too; the arrow keys go along it.
  document.querySelectorAll("#sample-filters [role=toolbar]").forEach((bar) => {
    const tools = [...bar.querySelectorAll("button")];
    const select = (tool) => {
      tools.forEach((other) => { other.tabIndex = -1; });
      tool.removeAttribute("tabindex");
    };
    select(tools[0]);
    bar.addEventListener("focusin", (event) => select(event.target));
    bar.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      tools.at((tools.indexOf(event.target) + step) % tools.length).focus();
    });
  });
  document.querySelectorAll("a[data-rows]").forEach((link) => link.addEventListener("click", () => {
    filter = "all";
    const name = JSON.parse(link.dataset.field);
    field = samples.some((sample) => sample.faults.includes(name)) ? name : null;
    rows = field === null ? new Set(JSON.parse(link.dataset.rows)) : null;
    search.value = "";
    press();
    list.querySelector("summary")?.focus({ preventScroll: true });
  }));
  list.addEventListener("focusin", (event) => moveStop(event.target.closest(".sample").querySelector("summary")));
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const current = event.target.closest(".sample");
    const isOnRow = event.target === stop; // elsewhere, arrows scroll
    const isDown = event.key === "j" || (isOnRow && event.key === "ArrowDown");
    const isUp = event.key === "k" || (isOnRow && event.key === "ArrowUp");
    if (!isDown && !isUp) return;
    const next = isDown ? current?.nextElementSibling : current?.previousElementSibling;
    if (isOnRow) event.preventDefault(); // the page would scroll
    next?.querySelector("summary")?.focus();
    if (next && isWide.matches) next.open = true;
  });
  let timer;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(restart, 120);
  });
  more.addEventListener("click", () => {
    const next = shown;
    extend(PAGE);
    list.children[next]?.querySelector("summary")?.focus();
  });
  document.querySelector("#samples-here > .note")?.remove();
  document.getElementById("samples-here").append(more);
  document.getElementById("sample-filters").hidden = false;
  restart();
})();
