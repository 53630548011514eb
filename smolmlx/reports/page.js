"use strict";
// Draws the charts and runs the answer viewer. Text from models enters the page as text nodes only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  // Charts. `ast` has Vega interpret its expressions, since the page's policy allows no eval.
  const drawn = new Map();
  async function draw(figure) {
    const config = data.themes[isDark() ? "dark" : "light"];
    drawn.get(figure)?.finalize();
    figure.replaceChildren(document.createElement("div"));
    const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, config };
    drawn.set(figure, await vegaEmbed(figure.firstChild, data.charts[figure.dataset.chart], options));
  }
  const figures = [...document.querySelectorAll("[data-chart]")];
  // A chart inside a closed <details> has no width yet: draw each when it is first seen.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "400px" });
  figures.forEach((figure) => seen.observe(figure));
  const redraw = () => figures.filter((figure) => drawn.has(figure)).forEach(draw);
  system.addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    redraw();
  });

  // Answers.
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const MEANING = { u: "found neither in the input nor in the reference", b: "would fit any input" };
  const pieces = (parts) => {
    const text = make("p", "text");
    for (const [piece, mark] of parts) {
      if (!mark) text.append(piece);
      else text.append(Object.assign(make("mark", mark, piece), { title: MEANING[mark] }));
    }
    if (!parts.length) text.append("(nothing)");
    return text;
  };

  function answer(found, entrant) {
    const box = make("div", entrant.kind);
    const head = make("header");
    head.append(make("h4", "", entrant.label));
    if (found.shown) head.append(make("span", "small", found.shown));
    const list = make("ul", "flaws");
    for (const flaw of found.flaws) list.append(make("li", "", flaw));
    if (!found.flaws.length) list.append(make("li", "none", "no flaw found"));
    box.append(head, pieces(found.pieces), list);
    return box;
  }

  function card(row, board, shown) {
    const box = make("article", "card");
    const head = make("header");
    head.append(make("h4", "", row.id));
    const asked = make("div", "asked");
    for (const [name, text] of [["Input", row.input], ["Reference", row.reference]]) {
      const part = make("details");
      part.open = innerWidth > 640;
      part.append(make("summary", "", name), make("p", "text", text));
      asked.append(part);
    }
    const answers = make("div", "answers");
    shown.forEach((i) => answers.append(answer(row.answers[i], board.systems[i])));
    box.append(head, asked, answers);
    return box;
  }

  const content = (row, i) => row.answers[i]?.score ?? 0;
  const haystack = (row) => [row.id, row.input, row.reference, ...row.answers.map((a) => a.pieces.map((p) => p[0]).join(""))].join("\n").toLowerCase();

  function viewer(box) {
    const board = data.boards[Number(box.dataset.board)];
    const form = box.querySelector("form");
    const list = box.querySelector(".rows");
    const more = box.querySelector(".more");
    const base = board.systems.findIndex((entrant) => entrant.kind === "base");
    const texts = board.rows.map(haystack);
    const STEP = 8;
    let limit = STEP;

    const OUTCOMES = {
      all: () => true,
      flawed: (row, i) => row.answers[i].flaws.length > 0,
      clean: (row, i) => row.answers[i].flaws.length === 0,
      better: (row, i) => base >= 0 && content(row, i) > content(row, base),
      worse: (row, i) => base >= 0 && content(row, i) < content(row, base),
    };
    const gain = (row, i) => content(row, i) - (base < 0 ? 0 : content(row, base));
    const ORDERS = {
      file: () => 0,
      low: (i) => (a, b) => content(a, i) - content(b, i),
      high: (i) => (a, b) => content(b, i) - content(a, i),
      gain: (i) => (a, b) => gain(b, i) - gain(a, i),
      loss: (i) => (a, b) => gain(a, i) - gain(b, i),
    };

    function render() {
      const now = new FormData(form);
      const i = Number(now.get("system"));
      const words = String(now.get("search")).trim().toLowerCase();
      const flaw = now.get("flaw");
      const kept = board.rows.filter((row, n) =>
        OUTCOMES[now.get("outcome")](row, i) && (!flaw || row.answers[i].kinds.includes(flaw)) && (!words || texts[n].includes(words)));
      if (now.get("order") !== "file") kept.sort(ORDERS[now.get("order")](i));
      const shown = now.getAll("show").map(Number);
      list.replaceChildren(...kept.slice(0, limit).map((row) => card(row, board, shown)));
      more.hidden = kept.length <= limit;
      box.querySelector(".count").textContent = `${kept.length} of ${board.rows.length} rows` + (kept.length > limit ? `, the first ${limit} shown` : "");
    }
    const restart = () => { limit = STEP; render(); };
    form.addEventListener("input", restart);
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", () => { limit += 20; render(); });
    if (box.open) render();
    else box.addEventListener("toggle", render, { once: true });
  }
  document.querySelectorAll(".viewer").forEach(viewer);
})();
