// The table of all edits: search, sort, filter, and every row unfolds. Twenty-five rows are in the page at a time.

const PAGE = 25;
const SIGNS = { holds: ["✓", "holds"], forgotten: ["✗", "forgotten"], "never written": ["∅", "never"] };
const FIELDS = ["case", "number", "subject", "expected", "before", "after", "now", "status", "broken", "p", "rank",
  "pAfter", "rankAfter", "layers", "change", "seconds", "loss", "steps", "history", "reason", "questions"];
const WORDS = {
  generalization: "Rephrasings", locality: "Neighbours, which should answer as before",
  same_subject: "Other facts of an edited subject, which should answer as before",
  consistency: "Neighbours whose answer another edit replaced", portability: "Consequences", instance: "Instances",
};

/** The rows: an edit each, with its outcome in every run (or null where the run did not make it). */
function joined(data) {
  const text = (place) => (place === null ? null : data.texts[place]);
  const rows = data.cases.map(([caseId, prompt], place) => ({
    place, caseId: text(caseId), prompt: text(prompt), by: data.runs.map(() => null),
  }));
  data.runs.forEach((run, place) => {
    for (const values of run.outcomes) {
      const outcome = Object.fromEntries(FIELDS.map((name, i) => [name, values[i]]));
      for (const name of ["subject", "expected", "before", "after", "now"]) outcome[name] = text(outcome[name]);
      outcome.status = data.statuses[outcome.status];
      rows[outcome.case].by[place] = outcome;
    }
  });
  for (const row of rows) {
    const any = row.by.find(Boolean);
    Object.assign(row, { number: any.number, subject: any.subject, expected: any.expected });
    row.differs = new Set(row.by.filter(Boolean).map((outcome) => outcome.status)).size > 1;
  }
  return rows;
}

function status(name) {
  const [sign, kind] = SIGNS[name] ?? ["?", "other"];
  return element("span", { class: `status ${kind}` }, element("span", { class: "sign", "aria-hidden": "true" }, sign),
    element("span", { class: "words" }, name));
}

/** Columns: {title, number, of(row): what is sorted by, cell(row), wide: left out on a phone}. */
function columnsOf(data) {
  const single = data.runs.length === 1;
  const own = (name) => (row) => row.by[0]?.[name] ?? null;
  const plain = (title, name, extra) => ({ title, of: own(name), cell: (row) => row.by[0]?.[name] ?? "", ...extra });
  const start = [
    { title: "edit", number: true, of: (row) => row.number, cell: (row) => row.number || "" },
    { title: "case", of: (row) => row.caseId, cell: (row) => row.caseId, wide: true, key: true },
    { title: "subject", of: (row) => row.subject, cell: (row) => row.subject },
    { title: "wanted", of: (row) => row.expected, cell: (row) => row.expected, wide: true },
  ];
  if (!single) {
    return [...start, ...data.runs.map((run, place) => ({
      title: run.label, run: true,
      of: (row) => (row.by[place] ? data.statuses.indexOf(row.by[place].status) : null),
      cell: (row) => (row.by[place] ? [status(row.by[place].status), answer(row.by[place])] : "-"),
    }))];
  }
  const right = (outcome) => outcome?.questions.filter((question) => data.texts[question[0]] === "generalization") ?? [];
  const hits = (row) => right(row.by[0]).filter((question) => question[5]).length;
  return [
    ...start,
    plain("before", "before", { wide: true }), plain("right after", "after", { wide: true }), plain("now", "now"),
    { title: "status", of: (row) => data.statuses.indexOf(row.by[0].status), cell: (row) => status(row.by[0].status) },
    { title: "p now", number: true, wide: true, of: own("p"), cell: (row) => chance(row.by[0].p) },
    { title: "rephrasings", number: true, wide: true, of: (row) => (right(row.by[0]).length ? hits(row) / right(row.by[0]).length : null),
      cell: (row) => (right(row.by[0]).length ? `${hits(row)} of ${right(row.by[0]).length}` : "") },
    { title: "broken neighbours", number: true, wide: true, of: own("broken"), cell: (row) => row.by[0].broken ?? "" },
    { title: "change", number: true, wide: true, of: own("change"), cell: (row) => (row.by[0].change === null ? "" : shown(row.by[0].change)) },
  ];
}

function answer(outcome) {
  if (outcome.now === null || outcome.status === "holds") return null;
  return element("div", { class: "quiet wide" }, outcome.now);
}

function filtersOf(data) {
  const has = (name) => (outcome) => outcome.status === name;
  const found = data.statuses.filter((name) => data.runs.some((run) => run.outcomes.some((values) => data.statuses[values[7]] === name)))
    .map((name) => ({ title: name, some: has(name) }));
  found.push({ title: "neighbour broken", some: (outcome) => outcome.broken > 0 });
  if (data.runs.length > 1) found.push({ title: "differs between runs", row: (row) => row.differs });
  return [{ title: "all", row: () => true }, ...found];
}

function requests(data) {
  const rows = joined(data);
  if (!rows.length) return [element("p", {}, "No single edits are on file.")];
  const columns = columnsOf(data);
  const filters = filtersOf(data);
  const state = { filter: filters[0], run: null, words: "", by: columns[0], down: false, page: 0, open: new Set() };

  const matches = (row, filter) => {
    if (filter.row) return filter.row(row) && (state.run === null || row.by[state.run] !== null);
    const among = state.run === null ? row.by : [row.by[state.run]];
    return among.some((outcome) => outcome && filter.some(outcome));
  };
  const says = (row) => {
    row.text ??= [row.caseId, row.prompt, ...row.by.filter(Boolean).flatMap((one) => [one.subject, one.expected, one.before, one.after, one.now])]
      .join("\n").toLowerCase();
    return row.text.includes(state.words);
  };
  const order = (one, other) => {
    const [a, b] = [state.by.of(one), state.by.of(other)];
    if (a === null || b === null) return (a === null) - (b === null) || one.place - other.place; // unknown comes last
    const sign = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return (state.down ? -sign : sign) || one.place - other.place;
  };

  const body = element("tbody");
  const said = element("span", { role: "status", class: "quiet" });
  const turn = (by) => () => { state.page += by; draw(); };
  const back = element("button", { type: "button", click: turn(-1) }, "Previous");
  const on = element("button", { type: "button", click: turn(1) }, "Next");
  const buttons = filters.map((filter) => element("button", {
    type: "button", "data-filter": filter.title,
    click: () => { Object.assign(state, { filter, page: 0 }); draw(); },
  }));
  const heads = columns.map((column) => element("th", {
    scope: "col", class: classes(column),
  }, element("button", {
    type: "button",
    click: () => { Object.assign(state, { down: state.by === column && !state.down, by: column, page: 0 }); draw(); },
  }, column.title)));

  function draw() {
    const found = rows.filter((row) => matches(row, state.filter) && says(row)).sort(order);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const from = state.page * PAGE;
    body.replaceChildren(...found.slice(from, from + PAGE).flatMap((row) => lines(row)));
    said.textContent = found.length
      ? `${(from + 1).toLocaleString("en")} to ${Math.min(from + PAGE, found.length).toLocaleString("en")} of ${count(found.length, "edit")}`
      : "No edit is like that.";
    back.disabled = state.page === 0;
    on.disabled = state.page === pages - 1;
    buttons.forEach((button, place) => {
      const among = rows.filter((row) => matches(row, filters[place])).length;
      button.replaceChildren(filters[place].title, " ", element("span", { class: "count" }, among.toLocaleString("en")));
      button.setAttribute("aria-pressed", String(filters[place] === state.filter));
    });
    heads.forEach((head, place) => {
      head.setAttribute("aria-sort", columns[place] === state.by ? (state.down ? "descending" : "ascending") : "none");
    });
  }

  function lines(row) {
    const open = state.open.has(row.place);
    const name = `edit-${row.place}`;
    const button = element("button", {
      type: "button", class: "unfold", "aria-expanded": String(open), "aria-controls": open ? name : null,
      "aria-label": `Questions and answers of ${row.subject}`,
    }, open ? "▾" : "▸");
    const cells = columns.map((column, place) => element("td", { class: classes(column) }, place ? null : button, column.cell(row)));
    const line = element("tr", { class: "row", "data-case": row.caseId, click: (event) => {
      if (window.getSelection().toString()) return; // a text is being copied
      if (!state.open.delete(row.place)) state.open.add(row.place);
      draw();
      body.querySelector(`[data-row="${row.place}"] .unfold`).focus({ preventScroll: true });
    }, "data-row": row.place }, cells);
    if (!open) return [line];
    return [line, element("tr", { class: "unfolded", id: name }, element("td", { colspan: columns.length }, unfolded(data, row)))];
  }

  const search = element("input", {
    type: "search", placeholder: "Search prompts, subjects and answers", "aria-label": "Search prompts, subjects and answers",
    input: (event) => { Object.assign(state, { words: event.target.value.toLowerCase(), page: 0 }); draw(); },
  });
  const which = element("select", { change: (event) => {
    Object.assign(state, { run: event.target.value === "" ? null : Number(event.target.value), page: 0 });
    draw();
  } }, element("option", { value: "" }, "any run"), data.runs.map((run, place) => element("option", { value: place }, run.label)));
  draw();
  return [
    element("div", { class: "tools" }, search, data.runs.length > 1 ? element("label", {}, "Edits of", which) : null),
    element("div", { class: "tools", role: "group", "aria-label": "Show" }, buttons),
    element("div", { class: "scroll" }, element("table", { class: `requests${data.runs.length > 1 ? " several" : ""}` },
      element("caption", { class: "hidden-text" }, "All edits; a row unfolds to its questions and answers"),
      element("thead", {}, element("tr", {}, heads)), body)),
    element("div", { class: "tools" }, back, on, said),
  ];
}

/** Prompt and answers, then the probes. */
function unfolded(data, row) {
  const outcomes = row.by.map((outcome, run) => ({ outcome, run: data.runs[run] })).filter(({ outcome }) => outcome);
  const single = data.runs.length === 1;
  const parts = [element("p", {}, element("strong", {}, row.prompt))];
  if (single) parts.push(course(outcomes[0].outcome, outcomes[0].run));
  else {
    const columns = ["run", "wanted", "before", "right after", "now", "status", "p now", "course"].map((title) => ({ title }));
    parts.push(table(columns, outcomes.map(({ outcome, run }) => [run.label, outcome.expected, outcome.before ?? "", outcome.after ?? "",
      outcome.now ?? "", status(outcome.status), chance(outcome.p), history(outcome, run)]), { kind: "folding" }));
  }
  parts.push(probes(data, outcomes, single));
  return parts;
}

function pairs(entries) {
  return element("dl", { class: "pairs" }, entries.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function course(outcome, run) {
  const odds = (p, rank) => (p === null ? "" : ` (p of the wanted answer ${chance(p)}, rank ${rank})`);
  return pairs([
    ["wanted", outcome.expected],
    ["before", outcome.before],
    ["right after", outcome.after === null ? null : outcome.after + odds(outcome.pAfter, outcome.rankAfter)],
    ["now", outcome.now === null ? null : outcome.now + odds(outcome.p, outcome.rank)],
    ["course", history(outcome, run)],
    ["reason", outcome.reason],
    ["edit", [
      outcome.layers.length ? `layer${outcome.layers.length > 1 ? "s" : ""} ${outcome.layers.join(", ")}` : null,
      outcome.change === null ? null : `largest relative change ${shown(outcome.change)}`,
      outcome.steps === null ? null : `${count(outcome.steps, "step")} to a loss of ${shown(outcome.loss)}`,
      outcome.seconds === null ? null : `${shown(outcome.seconds)} s`,
    ].filter(Boolean).join(", ")],
  ]);
}

/** In words, since when the edit is what it is. */
function history(outcome, run) {
  const names = { h: "holds", f: "forgotten", n: "never written" };
  const steps = [...outcome.history].map((letter, place) => [names[letter], run.evaluations[place]]).filter(([name]) => name);
  return steps.filter(([name], place) => !place || name !== steps[place - 1][0])
    .map(([name, edits]) => `${name} after ${edits.toLocaleString("en")} edits`).join(", ");
}

/** The probes of an edit, with the answers of every run: grouped by kind. */
function probes(data, outcomes, single) {
  const text = (place) => (place === null ? "" : data.texts[place]);
  const groups = new Map();
  outcomes.forEach(({ outcome }, run) => {
    for (const [kind, prompt, expected, before, now, exact, p] of outcome.questions) {
      const rows = groups.get(kind) ?? groups.set(kind, new Map()).get(kind);
      const name = `${prompt} ${expected} ${before}`;
      const row = rows.get(name) ?? rows.set(name, { prompt, expected, before, by: outcomes.map(() => null) }).get(name);
      row.by[run] ??= { now, exact, p };
    }
  });
  if (!groups.size) return element("p", { class: "quiet" }, "No rephrasings or neighbours are on file.");
  const hit = (one) => (one === null ? "" : element("span", { class: one.exact ? "holds" : "forgotten" },
    element("span", { class: "sign", "aria-hidden": "true" }, one.exact ? "✓" : "✗"),
    element("span", { class: "hidden-text" }, one.exact ? "right: " : "wrong: "), text(one.now) || "(nothing)"));
  return [...groups].map(([kind, rows]) => {
    const keeps = ["locality", "same_subject"].includes(data.texts[kind]);
    const columns = [{ title: "prompt" }, ...(keeps ? [{ title: "before" }] : [{ title: "wanted" }, { title: "before" }]),
      ...(single ? [{ title: "now" }, { title: "p now", number: true }] : outcomes.map(({ run }) => ({ title: run.label })))];
    return [element("h3", {}, WORDS[data.texts[kind]] ?? data.texts[kind]), table(columns, [...rows.values()].map((row) => [
      text(row.prompt), ...(keeps ? [text(row.before)] : [text(row.expected), text(row.before)]),
      ...row.by.map(hit), ...(single ? [chance(row.by[0].p)] : []),
    ]), { kind: "folding" })];
  });
}
