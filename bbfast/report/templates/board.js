"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 100;
  const WORDS = { done: "done", failed: "failed", blocked: "attack failed to run", not_applicable: "not applicable", missing: "missing", published: "published only" };
  const byKey = Object.fromEntries(data.columns.map((c) => [c.key, c]));
  const metrics = data.columns.filter((c) => data.lines.some((l) => l.metrics[c.key] !== undefined));

  // Small helpers -----------------------------------------------------------------------------------------------------
  function el(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }
  const share = (ratio) => (ratio === null ? "" : `${+(100 * ratio).toPrecision(4)} %`);
  const percent = (value) => (value === undefined || value === null ? "" : (100 * value).toFixed(2));
  const page = (run) => `runs/${encodeURIComponent(run.folder)}.html`;
  const distinct = (key) => {
    const found = [...new Set(data.lines.map((l) => l[key]))].filter((v) => v !== "" && v !== null);
    return found.sort((a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b))));
  };

  // The leaderboard ---------------------------------------------------------------------------------------------------
  const text = (key, title) => ({ key, title, text: true, value: (l) => l[key], show: (l) => String(l[key] ?? "") });
  const columns = [
    { ...text("attack", "Attack"), tip: (l) => data.titles[l.attack] },
    { ...text("defense", "Defense"), tip: (l) => data.titles[l.defense] },
    { key: "ratio", title: "Poisoned", value: (l) => l.ratio, show: (l) => share(l.ratio) },
    text("dataset", "Data set"),
    text("model", "Model"),
    ...(data.lines.some((l) => l.settings) ? [text("settings", "Settings")] : []),
    ...metrics.map((c) => ({ key: c.key, title: c.title, tip: () => c.meaning, metric: true, value: (l) => l.metrics[c.key], show: (l) => percent(l.metrics[c.key]), spread: (l) => percent(l.spread[c.key]) })),
    { key: "seconds", title: "Seconds", value: (l) => l.seconds, show: (l) => (l.seconds === null ? "" : l.seconds.toFixed(1)) },
    { key: "n", title: "Runs", value: (l) => l.n, show: (l) => String(l.n), runs: true },
  ];
  const theirs = ["c_acc", "asr", "r_acc"].map((key) => ({ key: `published_${key}`, title: `${byKey[key].title}, published`, theirs: true, value: (l) => (l.published ? l.published[key] : undefined), show: (l) => percent(l.published ? l.published[key] : undefined) }));

  const FILTERS = [["dataset", "Data set"], ["model", "Model"], ["attack", "Attack"], ["ratio", "Poisoned"], ["defense", "Defense"], ["kind", "Kind"], ["status", "Stands"]];
  const state = { sort: "", down: true, at: 0, find: "", beside: false, status: "done" };

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const [key, value] of given) {
      if (key === "sort") { state.down = value.startsWith("-"); state.sort = value.replace(/^-/, ""); }
      else if (key === "beside") state.beside = value === "1";
      else if (key === "find" || FILTERS.some(([name]) => name === key)) state[key] = value;
    }
  }
  function writeAddress() {
    const given = new URLSearchParams();
    for (const [key] of FILTERS) if (state[key] && !(key === "status" && state[key] === "done")) given.set(key, state[key]);
    if (state.status === "") given.set("status", "");
    if (state.find) given.set("find", state.find);
    if (state.sort) given.set("sort", (state.down ? "-" : "") + state.sort);
    if (state.beside) given.set("beside", "1");
    try { history.replaceState(null, "", `#${given}`); } catch { /* a file may not have its address changed */ }
  }

  function choice(name, label, values, current, shown, changed, all) {
    const select = el("select", { id: name, onchange: () => changed(select.value) });
    if (all) select.append(el("option", { value: "" }, all));
    for (const value of values) select.append(el("option", { value: String(value) }, shown(value)));
    select.value = current ?? "";
    return el("label", { for: name }, label, select);
  }

  function filters() {
    const form = document.getElementById("filters");
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const [key, label] of FILTERS) {
      const values = distinct(key);
      if (values.length < 2) { if (key === "status") state.status = ""; continue; }
      const shown = key === "ratio" ? share : key === "status" ? (v) => WORDS[v] : (v) => (key in { attack: 1, defense: 1 } && data.titles[v] && data.titles[v] !== v ? `${v} \u2013 ${data.titles[v]}` : String(v));
      if (!values.map(String).includes(state[key])) state[key] = key === "status" && values.includes("done") && state[key] !== "" ? "done" : "";
      form.append(choice(`filter-${key}`, label, values, state[key], shown, (value) => { state[key] = value; state.at = 0; draw(); }, "all"));
    }
    const find = el("input", { type: "search", id: "find", value: state.find, oninput: () => { state.find = find.value; state.at = 0; draw(); } });
    form.append(el("label", { for: "find" }, "Find", find));
    if (data.published) {
      const tick = el("input", { type: "checkbox", id: "beside", onchange: () => { state.beside = tick.checked; draw(); } });
      tick.checked = state.beside;
      form.append(el("label", { class: "tick", for: "beside" }, tick, "published figures beside ours"));
    }
  }

  const haystack = (l) => (l.hay ??= [l.dataset, l.model, l.attack, l.defense, l.kind, l.settings, l.reason, data.titles[l.attack], data.titles[l.defense]].join(" ").toLowerCase());
  function selected() {
    const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    return data.lines.filter((l) => FILTERS.every(([key]) => !state[key] || String(l[key]) === state[key]) && words.every((word) => haystack(l).includes(word)));
  }
  function sorted(lines) {
    const column = [...columns, ...theirs].find((c) => c.key === state.sort);
    if (!column) return lines;
    const sign = state.down ? -1 : 1;
    // What has no value comes last either way.
    const none = (v) => v === undefined || v === null || v === "";
    return [...lines].sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (none(x) || none(y)) return none(x) - none(y);
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
    });
  }

  function head() {
    const row = el("tr");
    for (const c of [...columns, ...(state.beside ? theirs : [])]) {
      const mine = c.key === state.sort;
      const button = el("button", { type: "button", title: c.metric ? byKey[c.key].meaning : null, onclick: () => {
        state.down = mine ? !state.down : !c.text;
        state.sort = c.key;
        state.at = 0;
        draw();
        document.querySelector(`#board th[data-key="${c.key}"] button`).focus();
      } }, c.title);
      row.append(el("th", { scope: "col", class: c.text ? "text" : "", "data-key": c.key, "aria-sort": mine ? (state.down ? "descending" : "ascending") : null }, button));
    }
    document.querySelector("#board thead").replaceChildren(row);
  }

  function cell(line, c, i) {
    const shown = c.show(line);
    if (i === 0) return el("th", { scope: "row", class: "text", title: c.tip(line) }, shown);
    if (c.key === "defense" && line.runs.length) return el("td", { class: "text" }, el("a", { href: page(line.runs[0]), title: c.tip(line) }, shown));
    if (c.runs && line.runs.length > 1) {
      const links = line.runs.flatMap((run, k) => [k ? " " : "", el("a", { href: page(run), title: `seed ${run.seed}` }, String(run.seed))]);
      return el("td", {}, "seeds ", ...links);
    }
    const td = el("td", { class: c.theirs ? "theirs" : c.text ? "text" : "", title: c.text && c.tip ? c.tip(line) : null }, shown || (c.text ? "" : "\u2013"));
    if (c.metric && line.spread[c.key] !== undefined) td.append(" ", el("span", { class: "spread" }, `\u00b1 ${c.spread(line)}`));
    return td;
  }

  function body(lines) {
    const shown = [...columns, ...(state.beside ? theirs : [])];
    const rows = lines.slice(state.at, state.at + PAGE).map((line) => {
      if (line.status === "done" || line.status === "published") return el("tr", {}, ...shown.map((c, i) => cell(line, c, i)));
      const place = shown.slice(0, 5).map((c, i) => cell(line, c, i));
      return el("tr", { class: "none" }, ...place, el("td", { class: "text", colspan: shown.length - 5 }, WORDS[line.status] + (line.reason ? `: ${line.reason}` : "")));
    });
    document.querySelector("#board tbody").replaceChildren(...rows);
  }

  function pager(total) {
    const nav = document.getElementById("pager");
    nav.replaceChildren();
    if (total <= PAGE) return;
    const go = (id, label, to, can) => nav.append(el("button", { type: "button", id, disabled: can ? null : "", onclick: () => { state.at = to; draw(); (document.getElementById(id).disabled ? nav.querySelector("button:not(:disabled)") : document.getElementById(id)).focus(); } }, label));
    go("page-back", "Previous", Math.max(0, state.at - PAGE), state.at > 0);
    nav.append(el("span", { class: "soft" }, `${state.at + 1} to ${Math.min(total, state.at + PAGE)} of ${total}`));
    go("page-on", "Next", state.at + PAGE, state.at + PAGE < total);
  }

  function draw() {
    const lines = sorted(selected());
    head();
    body(lines);
    pager(lines.length);
    document.getElementById("count").textContent = `${lines.length} of ${data.lines.length} lines`;
    writeAddress();
  }

  // Heat maps ---------------------------------------------------------------------------------------------------------
  const RAMPS = { good: [[247, 251, 255], [8, 81, 156]], bad: [[255, 245, 235], [166, 54, 3]], low: [[230, 120, 40], [245, 245, 245]], high: [[245, 245, 245], [33, 102, 172]] };
  function colour(value, scale) {
    const v = Math.min(1, Math.max(0, value));
    const [ramp, t] = scale === "signed" ? (v < 0.5 ? ["low", 2 * v] : ["high", 2 * v - 1]) : [scale, v];
    const [from, to] = RAMPS[ramp];
    const rgb = from.map((a, i) => Math.round(a + (to[i] - a) * t));
    const light = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) > 140;
    return `background:rgb(${rgb});color:${light ? "#111" : "#fff"}`;
  }
  const own = data.lines.filter((l) => l.status !== "published");
  const view = { metric: "", place: "", order: false };
  const places = () => {
    const counts = new Map();
    for (const l of own) {
      const key = JSON.stringify([l.dataset, l.model, l.ratio]);
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    return [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
  };

  function mapChoice() {
    const form = document.getElementById("map-choice");
    form.addEventListener("submit", (event) => event.preventDefault());
    const usable = metrics.map((c) => c.key);
    view.metric = usable.includes("der") ? "der" : usable[0] ?? "";
    const found = places();
    view.place = found[0] ?? "";
    form.append(choice("map-metric", "Figure", usable, view.metric, (key) => byKey[key].title, (value) => { view.metric = value; drawMap(); }));
    form.append(choice("map-place", "Data set, model, poisoned", found, view.place, (key) => { const [d, m, r] = JSON.parse(key); return `${d}, ${m}, ${share(r)}`; }, (value) => { view.place = value; drawMap(); }));
    const tick = el("input", { type: "checkbox", id: "map-order", onchange: () => { view.order = tick.checked; drawMap(); } });
    form.append(el("label", { class: "tick", for: "map-order" }, tick, "order by mean"));
  }

  function drawMap() {
    const table = document.getElementById("map");
    const column = byKey[view.metric];
    if (!column || !view.place) { table.closest("div").hidden = true; return; }
    const [dataset, model, ratio] = JSON.parse(view.place);
    const lines = own.filter((l) => l.dataset === dataset && l.model === model && l.ratio === ratio);
    const cells = new Map();
    for (const l of lines) {
      const key = JSON.stringify([l.attack, l.defense]);
      // Of several lines with different settings, the first that is done.
      if (!cells.has(key) || (cells.get(key).status !== "done" && l.status === "done")) cells.set(key, l);
    }
    const at = (attack, defense) => cells.get(JSON.stringify([attack, defense]));
    const mean = (found) => {
      const values = found.map((l) => l && l.metrics[view.metric]).filter((v) => v !== undefined);
      return values.length ? values.reduce((a, b) => a + b, 0) / values.length : -Infinity;
    };
    let down = [...new Set(lines.map((l) => l.attack))];
    let across = [...new Set(lines.map((l) => l.defense))].filter((d) => down.some((a) => { const l = at(a, d); return l && (l.status !== "done" || l.metrics[view.metric] !== undefined); }));
    if (view.order) {
      const rows = new Map(down.map((a) => [a, mean(across.map((d) => at(a, d)))]));
      const cols = new Map(across.map((d) => [d, mean(down.map((a) => at(a, d)))]));
      down = [...down].sort((a, b) => rows.get(b) - rows.get(a));
      across = [...across].sort((a, b) => cols.get(b) - cols.get(a));
    }
    let weak = false;
    const body = down.map((attack) => {
      const alone = at(attack, "none");
      const failed = alone && alone.metrics.asr !== undefined && alone.metrics.asr < 0.2;
      weak ||= failed;
      const name = el("th", { scope: "row", title: data.titles[attack] ?? null }, attack + (failed ? " \u2020" : ""));
      return el("tr", {}, name, ...across.map((defense) => mapCell(at(attack, defense), column, attack, defense)));
    });
    const head = el("tr", {}, el("th", { scope: "col" }, el("span", { class: "hidden" }, "Attack")), ...across.map((d) => el("th", { scope: "col", title: data.titles[d] ?? null }, el("span", {}, d))));
    table.querySelector("caption").textContent = `${column.title}, ${dataset}, ${model}, ${share(ratio)} poisoned`;
    table.querySelector("thead").replaceChildren(head);
    table.querySelector("tbody").replaceChildren(...body);
    legend(column, lines, weak);
  }

  function mapCell(line, column, attack, defense) {
    const where = `${attack}, ${defense}: `;
    if (!line) return el("td", { class: "blank" }, el("span", { title: where + "not asked for" }, ""));
    const value = line.metrics[view.metric];
    if (line.status !== "done") {
      const sign = { not_applicable: "n/a", failed: "\u00d7", blocked: "\u00d7" }[line.status] ?? "\u00b7";
      return el("td", { class: line.status }, el("span", { title: `${where}${WORDS[line.status]}${line.reason ? `: ${line.reason}` : ""}` }, sign));
    }
    if (value === undefined) return el("td", { class: "blank" }, el("span", { title: where + "has no such figure" }, "\u2013"));
    const tip = `${where}${column.title} ${percent(value)}` + (line.metrics.asr !== undefined && column.key !== "asr" ? `, ASR ${percent(line.metrics.asr)}` : "");
    const shown = (100 * value).toFixed(0);
    return el("td", {}, el("a", { href: page(line.runs[0]), title: tip, style: colour(value, column.scale) }, shown));
  }

  function legend(column, lines, weak) {
    const stops = [0, 0.25, 0.5, 0.75, 1].map((v) => colour(v, column.scale).match(/rgb\([^)]*\)/)[0]);
    const items = [el("span", {}, `${column.title}: 0`, el("span", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` }), "100 per cent")];
    const has = (status) => lines.some((l) => l.status === status);
    if (has("not_applicable")) items.push(el("span", {}, "n/a: not applicable"));
    if (has("failed") || has("blocked")) items.push(el("span", {}, "\u00d7: failed"));
    if (has("missing")) items.push(el("span", {}, "\u00b7: not run yet"));
    if (weak) items.push(el("span", {}, "\u2020: the attack alone succeeds on less than 20 per cent"));
    document.getElementById("legend").replaceChildren(...items);
  }

  readAddress();
  filters();
  draw();
  mapChoice();
  drawMap();
})();
