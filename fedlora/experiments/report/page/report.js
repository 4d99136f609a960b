"use strict";
// Draws the charts from the numbers in this page, and filters charts and tables alike. Text only ever becomes text.
(() => {
  const FIELDS = ["task", "label", "epsilon", "seed", "value", "spent", "sigma", "bytes", "seconds", "digest", "guarantee", "curve"];
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs.map((row, place) => Object.fromEntries([["place", place], ...FIELDS.map((name, at) => [name, row[at]])]));
  const card = document.getElementById("card");
  const COLOURS = 8, HEIGHT = 300, LEFT = 62, RIGHT = 14, TOP = 22, BOTTOM = 42, REACH = 16;
  let pinned = null;

  // ------------------------------------------------------------------------------------------------- small tools
  function svg(name, attributes, parent, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }
  function html(name, parent, text, attributes = {}) {
    const made = Object.assign(document.createElement(name), attributes);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const colour = (label) => `c${label % COLOURS}`;

  /** Outline of a label's mark around (x, y): the same shapes as in the figures. */
  function mark(label, x, y, r) {
    const polygon = (points) => `M${points.map(([a, b]) => `${x + a * r},${y + b * r}`).join("L")}Z`;
    const shapes = [
      () => `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`,
      () => polygon([[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]]),
      () => polygon([[0, -1.1], [1.05, 0.8], [-1.05, 0.8]]),
      () => polygon([[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]]),
      () => polygon([[0, 1.1], [1.05, -0.8], [-1.05, -0.8]]),
      () => polygon([[-0.4, -1.1], [0.4, -1.1], [0.4, -0.4], [1.1, -0.4], [1.1, 0.4], [0.4, 0.4], [0.4, 1.1], [-0.4, 1.1], [-0.4, 0.4], [-1.1, 0.4], [-1.1, -0.4], [-0.4, -0.4]]),
      () => polygon([[-1.1, -0.6], [-0.6, -1.1], [0, -0.5], [0.6, -1.1], [1.1, -0.6], [0.5, 0], [1.1, 0.6], [0.6, 1.1], [0, 0.5], [-0.6, 1.1], [-1.1, 0.6], [-0.5, 0]]),
      () => polygon([0, 1, 2, 3, 4].map((k) => [1.1 * Math.sin(k * 1.2566), -1.1 * Math.cos(k * 1.2566)])),
      () => polygon([[-1.1, 0], [0.8, -1.05], [0.8, 1.05]]),
      () => polygon([[1.1, 0], [-0.8, -1.05], [-0.8, 1.05]]),
    ];
    return shapes[label % shapes.length]();
  }

  /** Four to seven round numbers that span low to high. */
  function ticks(low, high) {
    const raw = (high - low) / 5 || Math.abs(high) / 5 || 0.1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power;
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
    return { found, digits: Math.max(0, Math.min(6, Math.ceil(-Math.log10(step) - 1e-9) + (step / power === 2.5 ? 1 : 0))) };
  }
  function shownBytes(count) {
    for (const unit of ["B", "kB", "MB"]) {
      if (count < 1000) return `${unit === "B" ? count : count.toFixed(1)} ${unit}`;
      count /= 1000;
    }
    return `${count.toFixed(2)} GB`;
  }

  // ----------------------------------------------------------------------------------------------------- filters
  const boxes = [...document.querySelectorAll("[data-filter]")];
  const chosen = (kind) => new Set(boxes.filter((box) => box.dataset.filter === kind && box.checked).map((box) => +box.value));
  const across = () => document.querySelector("[name=across]:checked").value;

  function apply() {
    const kinds = ["task", "label", "epsilon"], sets = Object.fromEntries(kinds.map((kind) => [kind, chosen(kind)]));
    for (const part of document.querySelectorAll("[data-task], [data-label], [data-epsilon]"))
      part.hidden = kinds.some((kind) => part.dataset[kind] !== undefined && !sets[kind].has(+part.dataset[kind]));
    const seen = runs.filter((run) => kinds.every((kind) => sets[kind].has(run[kind])));
    document.getElementById("shown").textContent = `${seen.length} of ${runs.length} runs shown`;
    document.getElementById("nothing").hidden = seen.length > 0;
    close();
    for (const place of document.querySelectorAll("[data-chart]"))
      draw(place, seen.filter((run) => run.task === +place.dataset.chart));
  }

  // ------------------------------------------------------------------------------------------------------ charts
  function draw(place, seen) {
    place.replaceChildren();
    if (!seen.length) return;
    const how = across(), labels = [...new Set(seen.map((run) => run.label))].sort((a, b) => a - b);
    if (how === "round") drawRounds(place, seen, labels);
    else if (how === "bytes") drawBytes(place, seen, labels);
    else drawEpsilon(place, seen, labels);
    const legend = html("ul", place, undefined, { className: "legend" });
    for (const label of labels) {
      const entry = html("li", legend);
      svg("path", { d: mark(label, 7, 7, 5) }, svg("svg", { class: `swatch ${colour(label)}`, width: 14, height: 14, "aria-hidden": "true" }, entry));
      html("span", entry, data.labels[label]);
    }
  }

  /** Axes and grid; the returned functions map numbers to places. */
  function frame(place, seen, { low, high, words, xLow, xHigh, height = HEIGHT }) {
    const width = Math.max(280, place.clientWidth || 600), task = data.tasks[seen[0].task];
    const canvas = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${task.metric} of ${task.name} against ${words}; arrow keys go from run to run` }, place);
    const pad = (high - low) * 0.06 || 0.01;
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - (value - low + pad) / (high - low + 2 * pad));
    const x = (value) => LEFT + (width - LEFT - RIGHT) * (xHigh === xLow ? 0.5 : (value - xLow) / (xHigh - xLow));
    const { found, digits } = ticks(low - pad, high + pad);
    for (const value of found) {
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }, canvas);
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, canvas, value.toFixed(digits));
    }
    svg("text", { x: (LEFT + width - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, canvas, words);
    svg("text", { transform: `translate(11 ${(TOP + height - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, canvas, task.metric);
    return { canvas, x, y, width, height };
  }

  function drawEpsilon(place, seen, labels) {
    const here = [...new Set(seen.map((run) => run.epsilon))].sort((a, b) => a - b);
    const values = here.map((e) => data.epsilons[e].value);
    const finite = values.filter((value) => value !== null).map(Math.log2);
    const steps = finite.slice(1).map((value, at) => value - finite[at]), step = Math.min(...steps, Infinity);
    const gap = Number.isFinite(step) ? step : 1, end = (finite.at(-1) ?? 0) + Math.max(1.2 * Math.max(...steps, 0), 1);
    const where = new Map(here.map((e, at) => [e, values[at] === null ? end : Math.log2(values[at])]));
    const places = [...where.values()], halves = new Map(data.cells.map((cell) => [`${cell.task} ${cell.label} ${cell.epsilon}`, cell.half]));
    const groups = new Map();
    for (const run of seen) groups.set(`${run.task} ${run.label} ${run.epsilon}`, [...(groups.get(`${run.task} ${run.label} ${run.epsilon}`) ?? []), run]);
    const ends = seen.map((run) => run.value);
    for (const [key, own] of groups) if (halves.get(key)) ends.push(mean(own.map((r) => r.value)) - halves.get(key), mean(own.map((r) => r.value)) + halves.get(key));
    const margin = 0.45 * gap;
    const { canvas, x, y, height } = frame(place, seen, { low: Math.min(...ends), high: Math.max(...ends), words: "ε", xLow: places[0] - margin, xHigh: places.at(-1) + margin });
    if (values.at(-1) === null) {
      const from = x(end - margin);
      svg("rect", { class: "none", x: from, y: TOP, width: x(end + margin) - from, height: height - TOP - BOTTOM }, canvas);
      svg("text", { x: x(end), y: TOP - 7, "text-anchor": "middle" }, canvas, "no privacy");
    }
    for (const e of here) svg("text", { x: x(where.get(e)), y: height - BOTTOM + 17, "text-anchor": "middle" }, canvas, data.epsilons[e].text);
    const points = [];
    labels.forEach((label, at) => {
      const shift = ((at - (labels.length - 1) / 2) * 0.6 * gap) / Math.max(labels.length, 4);
      const group = svg("g", { class: colour(label) }, canvas), line = [];
      for (const e of here) {
        const own = groups.get(`${seen[0].task} ${label} ${e}`);
        if (!own) continue;
        const middle = mean(own.map((run) => run.value)), half = halves.get(`${seen[0].task} ${label} ${e}`), px = x(where.get(e) + shift);
        if (half) svg("path", { class: "spread", d: `M${px},${y(middle - half)}V${y(middle + half)}M${px - 3},${y(middle - half)}h6M${px - 3},${y(middle + half)}h6` }, group);
        if (data.epsilons[e].value !== null) line.push(`${px},${y(middle)}`);
        svg("path", { class: "mark", d: mark(label, px, y(middle), 5.5) }, group);
        for (const run of own) points.push({ run, x: px, y: y(run.value), r: 3.2 });
      }
      if (line.length > 1) group.prepend(svg("path", { class: "mean", d: `M${line.join("L")}` }));
    });
    addRuns(canvas, points);
    html("p", place, "Large marks: means over seeds, with Student's 95 % intervals from three seeds on. Small marks: runs.", { className: "note" });
  }

  function drawBytes(place, seen) {
    const known = seen.filter((run) => run.bytes !== null);
    if (!known.length) return void html("p", place, "No record says how many bytes were sent.", { className: "note" });
    const values = known.map((run) => run.value), most = Math.max(...known.map((run) => run.bytes)) || 1;
    const { canvas, x, y, height } = frame(place, known, { low: Math.min(...values), high: Math.max(...values), words: "sent up by all sites", xLow: 0, xHigh: most * 1.04 });
    const scale = most >= 1e9 ? [1e9, "GB"] : most >= 1e6 ? [1e6, "MB"] : most >= 1e3 ? [1e3, "kB"] : [1, "B"];
    const { found, digits } = ticks(0, (most * 1.04) / scale[0]);
    for (const value of found) svg("text", { x: x(value * scale[0]), y: height - BOTTOM + 17, "text-anchor": "middle" }, canvas, `${value.toFixed(digits)}${value ? ` ${scale[1]}` : ""}`);
    addRuns(canvas, known.map((run) => ({ run, x: x(run.bytes), y: y(run.value), r: 4.5, fill: fillOf(run) })));
    html("p", place, "One mark a run: the paler, the smaller its ε; hollow: no privacy.", { className: "note" });
  }

  /** Opacity that tells ε, as in the figures. */
  function fillOf(run) {
    const finite = data.epsilons.filter((epsilon) => epsilon.value !== null).length;
    return data.epsilons[run.epsilon].value === null ? 0 : (run.epsilon + 1) / finite;
  }

  function drawRounds(place, seen, labels) {
    const curved = seen.filter((run) => run.curve.length > 1);
    if (!curved.length) return void html("p", place, "No run here was evaluated more than once.", { className: "note" });
    const values = curved.flatMap((run) => run.curve.map(([, value]) => value)), last = Math.max(...curved.map((run) => run.curve.at(-1)[0]));
    for (const e of [...new Set(curved.map((run) => run.epsilon))].sort((a, b) => a - b)) {
      const own = curved.filter((run) => run.epsilon === e);
      html("h3", place, `ε = ${data.epsilons[e].text}${data.epsilons[e].value === null ? " (no privacy)" : ""}`);
      const { canvas, x, y, height } = frame(place, own, { low: Math.min(...values), high: Math.max(...values), words: "round", xLow: 0, xHigh: last * 1.02, height: 220 });
      for (const value of ticks(0, last).found.filter(Number.isInteger)) svg("text", { x: x(value), y: height - BOTTOM + 17, "text-anchor": "middle" }, canvas, value);
      const points = [];
      for (const label of labels) {
        const same = own.filter((run) => run.label === label);
        if (!same.length) continue;
        const curves = same.map((run) => new Map(run.curve)), rounds = [...curves[0].keys()].filter((round) => curves.every((curve) => curve.has(round)));
        const group = svg("g", { class: colour(label) }, canvas);
        if (rounds.length) svg("path", { class: "mean", d: `M${rounds.map((round) => `${x(round)},${y(mean(curves.map((curve) => curve.get(round))))}`).join("L")}` }, group);
        for (const run of same) points.push({ run, x: x(run.curve.at(-1)[0]), y: y(run.curve.at(-1)[1]), r: 3.5 });
      }
      addRuns(canvas, points);
    }
    html("p", place, "Lines: means over seeds. Marks: where each run ended.", { className: "note" });
  }

  /** Marks of runs: one stop for the Tab key a chart, arrow keys from there. */
  function addRuns(canvas, points) {
    points.sort((a, b) => a.x - b.x || b.y - a.y);
    const marks = points.map(({ run, x, y, r, fill = 0.35 }) => {
      const task = data.tasks[run.task];
      const words = `${data.labels[run.label]}, ε = ${data.epsilons[run.epsilon].text}, seed ${run.seed}: ${task.metric} ${run.value.toFixed(4)}`;
      const group = svg("g", { class: `run ${colour(run.label)}`, tabindex: -1, role: "button", "aria-label": words, "data-run": run.place }, canvas);
      svg("path", { d: mark(run.label, x, y, r) }, group).style.setProperty("--fill", fill);
      return group;
    });
    if (marks.length) marks[0].setAttribute("tabindex", 0);
    canvas.addEventListener("keydown", (event) => {
      const at = marks.indexOf(event.target);
      const next = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: marks.length - 1 }[event.key];
      if (at < 0) return;
      if (next !== undefined) {
        event.preventDefault();
        const to = marks[Math.max(0, Math.min(marks.length - 1, next))];
        marks[at].setAttribute("tabindex", -1);
        to.setAttribute("tabindex", 0);
        to.focus();
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        pin(marks[at]);
        card.querySelector("a, button").focus();
      }
    });
    const nearest = (event) => {
      const box = canvas.getBoundingClientRect(), scale = canvas.viewBox.baseVal.width / box.width;
      const far = points.map(({ x, y }) => Math.hypot((event.clientX - box.left) * scale - x, (event.clientY - box.top) * scale - y));
      const at = far.indexOf(Math.min(...far));
      return far[at] < REACH ? marks[at] : null; // marks may overlap: the nearest is meant, not the uppermost
    };
    canvas.addEventListener("click", (event) => nearest(event) && pin(nearest(event)));
    canvas.addEventListener("pointermove", (event) => {
      const near = nearest(event);
      canvas.style.cursor = near ? "pointer" : "";
      for (const other of canvas.querySelectorAll(".near")) if (other !== near) other.classList.remove("near");
      if (pinned) return;
      if (!near) return void (card.hidden = true);
      if (!near.classList.contains("near") || card.hidden) show(near);
      near.classList.add("near");
    });
    canvas.addEventListener("pointerleave", () => !pinned && (card.hidden = true));
    canvas.addEventListener("focusin", ({ target }) => !pinned && marks.includes(target) && show(target));
    canvas.addEventListener("focusout", () => !pinned && (card.hidden = true));
  }

  // ------------------------------------------------------------------------------------- the record of one run
  function show(group) {
    const run = runs[+group.dataset.run], task = data.tasks[run.task];
    card.replaceChildren();
    html("h3", card, `${task.name}: ${data.labels[run.label]}`);
    const list = html("dl", card);
    const facts = {
      [task.metric]: run.value.toFixed(4),
      "ε asked": data.epsilons[run.epsilon].text,
      "ε spent": run.spent,
      "σ": run.sigma ?? "not in the record",
      seed: run.seed,
      "sent up": run.bytes === null ? "not in the record" : shownBytes(run.bytes),
      time: run.seconds === null ? "not in the record" : `${run.seconds.toFixed(1)} s`,
      config: run.digest,
    };
    for (const [name, text] of Object.entries(facts)) {
      html("dt", list, name);
      html("dd", list, text);
    }
    html("p", card, data.guarantees[run.guarantee], { className: "note" });
    const links = document.querySelectorAll(`#run-${run.place} a`);
    const line = html("p", card, links.length ? undefined : "Its run folder is not beside this page.");
    for (const link of links) line.append(link.cloneNode(true), " ");
    card.hidden = false;
    const box = group.getBoundingClientRect(), width = card.offsetWidth;
    const left = box.right + 12 + width < document.documentElement.clientWidth ? box.right + 12 : Math.max(8, box.left - width - 12);
    card.style.left = `${left + scrollX}px`;
    card.style.top = `${Math.max(8, Math.min(box.top, innerHeight - card.offsetHeight - 8)) + scrollY}px`;
  }
  function pin(group) {
    close();
    show(group);
    pinned = group;
    group.classList.add("pinned");
    html("button", card, "×", { className: "close", type: "button", ariaLabel: "Close" }).addEventListener("click", dismiss);
  }
  function close() {
    pinned?.classList.remove("pinned");
    pinned = null;
    card.hidden = true;
  }
  function dismiss() {
    const back = pinned;
    close();
    if (back?.isConnected) back.focus();
    card.hidden = true;
  }

  // --------------------------------------------------------------------------------------------- sorting, events
  function sort(button) {
    const body = document.querySelector("#all-runs tbody"), at = +button.dataset.sort, head = button.parentElement;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[at].dataset.key ?? row.cells[at].textContent;
    const compare = (a, b) => {
      const [one, two] = [key(a), key(b)], numbers = one !== "" && two !== "" && !isNaN(one) && !isNaN(two);
      return numbers ? one - two : one.localeCompare(two, undefined, { numeric: true });
    };
    body.append(...[...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b))));
  }

  for (const swatch of document.querySelectorAll("svg[data-mark]")) svg("path", { d: mark(+swatch.dataset.mark, 7, 7, 5) }, swatch);
  document.querySelector(".filters").addEventListener("change", apply);
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  for (const [name, value] of [["all", true], ["none", false]])
    for (const button of document.querySelectorAll(`[data-${name}]`))
      button.addEventListener("click", () => {
        for (const box of boxes) if (box.dataset.filter === button.dataset[name]) box.checked = value;
        apply();
      });
  for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => sort(button));
  document.addEventListener("keydown", (event) => event.key === "Escape" && !card.hidden && dismiss());
  document.addEventListener("click", (event) => pinned && !event.target.closest("#card, .chart svg") && close());
  if (matchMedia("(max-width: 40rem)").matches) document.querySelector(".filters details").open = false;
  let width = innerWidth;
  addEventListener("resize", () => innerWidth !== width && ((width = innerWidth), apply()));
  apply();
})();
