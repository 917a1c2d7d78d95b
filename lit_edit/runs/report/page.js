// The page, part by part, from the data that stand compressed in it.

const STAGES = ["layers", "values", "keys", "solve", "restrain", "write", "score", "other", "mending"];
const FIRST_SPECTRA = 3; // drawn at once
const BEFORE = 7; // the look of unedited weights beside those of the runs: grey
const ROOMS = ["model", "data", "retention", "stability", "downstream"]; // whose settings come first

async function unpacked() {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser is too old: the page needs Chrome 123, Firefox 120 or Safari 17.5, or a newer one.");
  }
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function verdicts(data) {
  const several = data.runs.length > 1;
  const names = ["method", "model", "data", "edits", "seed", "took"].filter((name) => data.runs.some((run) => run.about[name]));
  const alike = several ? names.filter((name) => new Set(data.runs.map((run) => run.about[name])).size === 1) : [];
  const facts = (run, which) => element("ul", { class: "facts quiet" }, which.filter((name) => run.about[name])
    .map((name) => element("li", {}, ["edits", "seed", "took"].includes(name) ? `${name} ${run.about[name]}` : run.about[name])));
  const cards = element("ul", { class: several ? "verdicts cards" : "verdicts" }, data.runs.map((run, place) => {
    const number = new Map(data.statuses.map((name) => [name, 0]));
    for (const values of run.outcomes) number.set(data.statuses[values[7]], number.get(data.statuses[values[7]]) + 1);
    const present = [...number].filter(([, edits]) => edits);
    const share = present.map(([name, edits]) => {
      const part = element("span", { class: SIGNS[name]?.[1] ?? "other" });
      part.style.flexGrow = edits;
      return part;
    });
    return element("li", {},
      several ? element("p", { class: "name" }, element("strong", {}, sampleOf(data, place), run.label)) : null,
      element("p", { class: "verdict" }, run.verdict),
      element("div", { class: "share", "aria-hidden": "true" }, share),
      element("ul", { class: "facts" }, present.map(([name, edits]) => element("li", {}, status(name), ` ${edits.toLocaleString("en")}`))),
      facts(run, names.filter((name) => !alike.includes(name))),
      element("div", {}, run.missing.map((what) => element("p", { class: "missing" }, what))));
  }));
  return element("div", {}, alike.length ? facts(data.runs[0], alike) : null, cards);
}

function sampleOf(data, place) {
  const made = sample(place);
  made.style.display = "inline-block";
  made.style.width = "44px";
  made.style.marginRight = "8px";
  made.style.verticalAlign = "middle";
  return made;
}

function named(data, key) {
  const { title, note } = data.figures[key];
  return [title, note ? element("span", { class: "note quiet wide" }, note) : null];
}

/** A figure as tables show it: shares with three decimals, so that they stand below each other. */
const told = (data, key, value) => (data.figures[key].scale === "share" && value != null ? value.toFixed(3) : shown(value));
function within(data, key, bounds) {
  return bounds ? bounds.map((value) => told(data, key, value)).join(bounds[0] < 0 ? " to " : "–") : "";
}
function change(data, key, value) {
  const text = data.figures[key].scale === "share" ? Math.abs(value).toFixed(3) : shown(Math.abs(value));
  return Number(text.replaceAll(",", "")) === 0 || text === "~ 0" ? text : (value < 0 ? "−" : "+") + text;
}

function results(data) {
  const present = Object.keys(data.figures);
  const made = data.runs.length === 1 ? [final(data, present)] : compared(data, present);
  const ways = judged(data);
  return [...made, ways];
}

function final(data, present) {
  const run = data.runs[0];
  const columns = [{ title: "figure" }, { title: "before", number: true }, { title: "now", number: true },
    { title: "95 % interval", number: true }, { title: "change", number: true, wide: true }, { title: "questions", number: true, wide: true }];
  return table(columns, present.map((key) => {
    const { before, now, bounds, questions, at } = run.final[key];
    const late = at === run.made ? "" : ` (after ${at})`;
    return [named(data, key), before === null ? "" : told(data, key, before), told(data, key, now) + late, within(data, key, bounds),
      before === null || now === null ? "" : change(data, key, now - before), questions ? questions.toLocaleString("en") : ""];
  }), { caption: `After ${count(run.made, "edit")}. Intervals: 95 %, bootstrap over edits.` });
}

/** Several runs side by side, at the last count that all were judged at; differences to a run that can be chosen. */
function compared(data, present) {
  if (data.common === null) {
    return [element("p", { class: "missing" }, "The runs were never judged after the same number of edits: their last figures stand side by side, and no differences are taken."),
      sideBySide(data, present, (run, key) => run.final[key]?.now ?? null, (run, key) => run.final[key]?.bounds, () => null)];
  }
  const at = (run, key) => run.curves[key]?.find(([edits]) => edits === data.common);
  const value = (run, key) => at(run, key)?.[1] ?? null;
  const bounds = (run, key) => (at(run, key)?.[2] != null ? at(run, key).slice(2) : null);
  const known = present.filter((key) => data.runs.some((run) => at(run, key)));
  const holder = element("div");
  /** [difference, low, high, clear, how] of a run to another one. */
  const between = (place, base, key) => {
    const found = data.differences.find(([one, other, name]) => name === key
      && ((one === place && other === base) || (one === base && other === place)));
    if (!found) return null;
    const [one, , , difference, low, high, clear, how] = found;
    return one === place ? [difference, low, high, clear, how] : [-difference, high === null ? null : -high, low === null ? null : -low, clear, how];
  };
  const draw = (base) => holder.replaceChildren(
    sideBySide(data, known, value, bounds, (place, key) => {
      const found = place === base ? null : between(place, base, key);
      if (!found) return null;
      return element("div", { class: found[3] ? "clear" : "quiet" }, found[3] === false ? "no clear difference" : change(data, key, found[0]));
    }),
    folded("The differences with their intervals", () => table(
      [{ title: "figure" }, ...data.runs.map((run) => ({ title: run.label, number: true }))],
      known.map((key) => [data.figures[key].title, ...data.runs.map((run, place) => {
        const found = place === base ? null : between(place, base, key);
        if (!found) return "-";
        const [difference, low, high, , how] = found;
        const interval = low === null ? how : `${change(data, key, low)} to ${change(data, key, high)}, ${how}`;
        return [change(data, key, difference), element("span", { class: "quiet bounds" }, ` (${interval})`)];
      })]),
      { caption: `What each run is above ${data.runs[base].label}, with the 95 % interval of the difference.` })),
  );
  const select = element("select", { change: (event) => draw(Number(event.target.value)) },
    data.runs.map((run, place) => element("option", { value: place }, run.label)));
  draw(0);
  const others = data.same_edits ? "" : " The runs did not make the same edits: differences are taken from the intervals, not edit by edit.";
  return [
    element("p", { class: "quiet" }, `After ${count(data.common, "edit")}, the last count that all runs were judged at. Beside each figure stands its 95 % interval, below it what it differs by; a difference whose own 95 % interval contains 0 is not called one. Figures without an interval are not judged.${others}`),
    element("div", { class: "tools" }, element("label", {}, "Differences to", select)), holder,
  ];
}

function sideBySide(data, present, value, bounds, extra) {
  const columns = [{ title: "figure" }, ...data.runs.map((run) => ({ title: run.label, number: true }))];
  return table(columns, present.map((key) => [named(data, key), ...data.runs.map((run, place) => {
    const number = value(run, key);
    if (number === null && !run.final[key]) return "-";
    const interval = within(data, key, bounds(run, key));
    return [told(data, key, number), interval ? element("span", { class: "quiet bounds" }, ` (${interval})`) : null, extra(place, key)];
  })]));
}

function judged(data) {
  const rows = new Map();
  for (const [place, run] of data.runs.entries()) {
    for (const [way, figures] of Object.entries(run.ways)) {
      for (const [name, value] of Object.entries(figures)) {
        const key = `${way.replace("_", " ")}: ${name}`;
        (rows.get(key) ?? rows.set(key, data.runs.map(() => "")).get(key))[place] = value === null ? "n/a" : value.toFixed(3);
      }
    }
  }
  if (!rows.size) return null;
  const columns = [{ title: "judged by" }, ...data.runs.map((run) => ({ title: run.label, number: true }))];
  return folded("The same answers judged in other ways", () => table(columns, [...rows].map(([name, values]) => [name, ...values]),
    { caption: "Last evaluation. Token accuracy: share of the answer's tokens. Probability: the wanted answer is more probable than the other one on record. Generation: the greedy continuation begins with it." }));
}

function curves(data) {
  const present = Object.keys(data.figures);
  const isKnown = (key) => data.figures[key].note !== "" || data.figures[key].panel !== "";
  const single = data.runs.length === 1;
  const panels = (keys) => {
    if (!single) return keys.map((key) => panelOf(data, key));
    const found = new Map();
    for (const key of keys) {
      const name = data.figures[key].panel || key;
      found.set(name, [...(found.get(name) ?? []), key]);
    }
    return [...found].map(([name, members]) => (members.length > 1 ? shared(data, name, members) : panelOf(data, members[0])));
  };
  const others = present.filter((key) => !isKnown(key));
  return [
    single ? null : legend(data.runs.map((run) => run.label)),
    element("p", { class: "quiet" }, "Bands are 95 % intervals. Point at a panel, or focus it and use the arrow keys, to read its values."),
    element("div", { class: "charts" }, panels(present.filter(isKnown))),
    others.length ? folded(`${count(others.length, "further figure")} of other callbacks`, () => element("div", { class: "charts" }, panels(others))) : null,
  ];
}

function panelOf(data, key) {
  const { title, note, scale } = data.figures[key];
  const several = data.runs.length > 1;
  const series = data.runs.map((run, place) => ({
    label: several ? run.label : title, place, run: several ? place : undefined, look: look(place), points: run.curves[key] ?? [],
  })).filter((one) => one.points.length);
  return chart({ title, note, series, scale, say: (value) => told(data, key, value) });
}

function shared(data, title, members) {
  const series = members.map((key, place) => ({
    label: data.figures[key].title.replace(/^(ability|right after): /, ""), place, look: look(place), points: data.runs[0].curves[key],
  }));
  const made = chart({ title, series, scale: data.figures[members[0]].scale, say: (value) => told(data, members[0], value) });
  made.insertBefore(key(series), made.querySelector("svg[role]"));
  return made;
}

function weights(data) {
  const parts = [];
  const parameters = [...new Set(data.runs.flatMap((run) => Object.keys(run.spectra)))]
    .map((parameter) => [parameter, Math.max(...data.runs.map((run) => moved(run.spectra[parameter])))])
    .sort((one, other) => other[1] - one[1]).map(([parameter]) => parameter);
  if (parameters.length) {
    const panels = (names) => element("div", { class: "charts" }, names.map((parameter) => spectrum(data, parameter)));
    const rest = parameters.slice(FIRST_SPECTRA);
    parts.push(element("h3", {}, "Singular values, largest first"),
      element("p", { class: "quiet" }, "The weights whose singular values moved most come first."),
      key(spectraKey(data)), panels(parameters.slice(0, FIRST_SPECTRA)),
      rest.length ? folded(`Spectra of ${count(rest.length, "further weight")}`, () => panels(rest)) : null);
  }
  for (const run of data.runs) {
    const names = Object.keys(run.weights);
    if (names.length) parts.push(folded(`${data.runs.length > 1 ? `${run.label}: ` : ""}${count(names.length, "weight")} one by one`, () => eachWeight(run, names)));
  }
  return parts.length ? parts : null;
}

/** How far a spectrum moved, relative to its size; what is not finite moved furthest. */
function moved(spectrum) {
  if (!spectrum) return 0;
  const square = (sum, value) => sum + value * value;
  const size = spectrum.before.map(([, value]) => value ?? 0).reduce(square, 0);
  const steps = spectrum.after.map(([, value], place) => (value === null ? Infinity : value - (spectrum.before[place]?.[1] ?? 0)));
  return Math.sqrt(steps.reduce(square, 0) / (size || 1));
}

/** All lines that spectra have, whichever weights the runs edited. */
function spectraKey(data) {
  const found = new Map();
  for (const run of data.runs) {
    for (const parameter of Object.keys(run.spectra)) for (const one of spectra(data, parameter)) found.set(one.place, one);
  }
  return [...found.values()].sort((one, other) => (other.place === BEFORE) - (one.place === BEFORE) || one.place - other.place);
}

function eachWeight(run, names) {
  const kinds = [...new Set(names.flatMap((name) => Object.keys(run.weights[name])))];
  const title = (kind) => kind.replaceAll("_", " ");
  const of = (kind) => names.map((name, place) => ({ label: name, place, look: look(place), points: run.weights[name][kind] ?? [] }));
  const ends = (points) => (points ? `${shown(points[0][1])} → ${shown(points.at(-1)[1])}` : "-");
  return element("div", {},
    table([{ title: "weight" }, ...kinds.map((kind) => ({ title: title(kind), number: true }))],
      names.map((name) => [name, ...kinds.map((kind) => ends(run.weights[name][kind]))]), { caption: "First and last measurement." }),
    key(of(kinds[0])),
    element("div", { class: "charts" }, kinds.map((kind) => chart({ title: title(kind), series: of(kind), scale: kind.endsWith("drift") ? "linear" : "log" }))));
}

function spectra(data, parameter) {
  const first = data.runs.find((run) => run.spectra[parameter]);
  const series = [{ label: "before", place: BEFORE, look: { ...look(BEFORE), mark: null }, points: first.spectra[parameter].before }];
  data.runs.forEach((run, place) => {
    const found = run.spectra[parameter];
    const own = place < BEFORE ? place : place + 1;
    if (found) series.push({ label: data.runs.length > 1 ? `after ${run.label}` : "after", place: own, look: { ...look(own), mark: null }, points: found.after });
  });
  return series;
}

function spectrum(data, parameter) {
  return chart({ title: parameter, series: spectra(data, parameter), scale: "log", across: "place", first: 1 });
}

function seconds(data) {
  const stages = [...new Set(data.runs.flatMap((run) => Object.keys(run.seconds)))].sort((one, other) => STAGES.indexOf(one) - STAGES.indexOf(other));
  if (!stages.length) return [element("p", {}, "No seconds are on file.")];
  const total = (run) => Object.values(run.seconds).reduce((sum, value) => sum + value, 0);
  const brief = (value) => (value && value < 0.0005 ? "< 0.001" : value.toFixed(3));
  const longest = Math.max(...data.runs.map(total));
  const bars = data.runs.filter((run) => total(run)).map((run) => {
    const bar = element("div", { class: "stack", "aria-hidden": "true" }, stages.map((stage, place) => {
      if (!run.seconds[stage]) return null;
      const part = element("span", { class: `s${place % COLOURS}`, title: `${stage}: ${shown(run.seconds[stage] ?? 0)} s` });
      part.style.width = `${(100 * (run.seconds[stage] ?? 0)) / longest}%`;
      return part;
    }));
    return [element("div", {}, data.runs.length > 1 ? `${run.label}: ` : "", `${shown(total(run))} s`), bar];
  });
  const square = (place) => {
    const made = drawn("svg", { viewBox: "0 0 14 14", class: `s${place % COLOURS}`, "aria-hidden": "true" },
      drawn("path", { d: "M1 1h12v12H1z", fill: "currentColor" }));
    Object.assign(made.style, { width: "14px", display: "inline-block", marginRight: "6px", verticalAlign: "-2px" });
    return made;
  };
  const columns = [{ title: "stage" }, ...data.runs.map((run) => ({ title: run.label, number: true }))];
  const rows = stages.map((stage, place) => [element("span", {}, square(place), stage), ...data.runs.map((run) => (stage in run.seconds ? brief(run.seconds[stage]) : "-"))]);
  rows.push(["all", ...data.runs.map((run) => (total(run) ? brief(total(run)) : "-"))]);
  return [...bars, table(columns, rows, { caption: "Mean seconds of an edit, without evaluation." })];
}

function tables(data) {
  const block = (title, text) => {
    const pre = element("pre", { tabindex: "0", "aria-label": title }, text);
    const button = element("button", { type: "button", class: "copy", click: async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        window.getSelection().selectAllChildren(pre); // the browser allows no more: Ctrl-C takes it
        button.textContent = "Selected: press Ctrl-C";
      }
    } }, "Copy");
    return [element("h3", {}, title), button, pre];
  };
  return [element("p", { class: "quiet" }, "Half the width of the 95 % interval stands behind ±."),
    ...block("Markdown", data.tables.markdown), ...block("LaTeX (package booktabs)", data.tables.latex)];
}

function about(data) {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.about)))];
  const several = data.runs.length > 1;
  const columns = [{ title: "" }, ...data.runs.map((run) => ({ title: several ? run.label : "this run" }))];
  const rows = names.map((name) => [name, ...data.runs.map((run) => run.about[name] ?? "-")]);
  const place = (name) => {
    const room = ROOMS.indexOf(name.split(".")[0]);
    return name.startsWith("trainer.") ? 99 : room < 0 ? 98 : room;
  };
  const settings = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))]
    .sort((one, other) => place(one) - place(other) || one.localeCompare(other));
  const row = (name) => [name, ...data.runs.map((run) => run.settings[name] ?? "-")];
  const differ = settings.filter((name) => new Set(data.runs.map((run) => run.settings[name])).size > 1);
  return [
    table(columns, rows, { kind: "names" }),
    several && differ.length ? [element("h3", {}, "Settings that differ"), table(columns, differ.map(row), { kind: "names" })] : null,
    settings.length ? folded(`All ${settings.length} settings`, () => table(columns, settings.map(row), { kind: "names" })) : null,
  ].flat();
}

function switchTheme() {
  const button = document.getElementById("theme");
  const dark = () => {
    const chosen = document.documentElement.style.colorScheme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.style.colorScheme = dark() ? "light" : "dark";
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}

async function open() {
  switchTheme();
  const data = await unpacked();
  const several = data.runs.length > 1;
  const parts = [
    ["results", several ? "Side by side" : "Results", results],
    ["curves", "Curves over edits", curves],
    ["edits", "Every edit", requests],
    ["weights", "Weights", weights],
    ["pictures", "Pictures", pictures],
    ["time", "Seconds by stage", seconds],
    ["tables", "Tables for a paper", tables],
    ["about", "What was run", about],
  ];
  const main = document.getElementById("content");
  const nav = document.querySelector("nav");
  main.replaceChildren(verdicts(data));
  for (const [id, title, make] of parts) {
    const made = make(data);
    if (made === null) continue;
    main.append(element("section", { "aria-labelledby": id }, element("h2", { id }, title), made));
    nav.append(element("a", { href: `#${id}` }, title));
  }
  document.documentElement.dataset.ready = Math.round(performance.now());
}

open().catch((error) => {
  document.getElementById("content").replaceChildren(element("p", { class: "missing" }, `The page cannot be shown: ${error.message}`));
  throw error;
});
