// Curves over edits: drawn once as SVG, coloured by the style sheet, read out under the pointer or the arrow keys.

const COLOURS = 8;
const DASHES = ["", "7 4", "2 3", "10 3 2 3"];
const MARKS = [
  "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M-2.8-2.8h5.6v5.6h-5.6z", "M0-3.6L3.4 2.6H-3.4z",
  "M0-3.9L3.9 0L0 3.9L-3.9 0z", "M0 3.6L3.4-2.6H-3.4z", "M-1.2-3.6h2.4v2.4h2.4v2.4h-2.4v2.4h-2.4v-2.4h-2.4v-2.4h2.4z",
];
const PLACE = { width: 350, height: 208, left: 44, right: 10, top: 10, bottom: 32 };
const MOST_MARKS = 12;
const hidden = new Set(); // runs switched off in the legend

/** Colour, dash and mark of a series by its place: no two of the first 24 share all three. */
function look(place) {
  return { colour: `s${place % COLOURS}`, dash: DASHES[place % DASHES.length], mark: MARKS[place % MARKS.length] };
}

function sample(place) {
  const { colour, dash, mark } = look(place);
  return drawn("svg", { viewBox: "0 0 44 14", class: colour, "aria-hidden": "true" },
    drawn("path", { class: "curve", d: "M0 7H44", "stroke-dasharray": dash || null }),
    drawn("path", { class: "mark", d: mark, transform: "translate(22 7)" }));
}

/** Round values between two bounds. */
function ticks(low, high, most = 5) {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((candidate) => candidate >= rough * 0.999);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) found.push(place * step + 0);
  return found;
}

function powers(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first + 1) / 5));
  const found = [];
  for (let power = first; power <= last; power += every) found.push(10 ** power);
  if (found.length > 1) return found;
  return [first - 1, first, first + 1].flatMap((power) => [1, 2, 5].map((factor) => factor * 10 ** power))
    .filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

/** A value beside an axis: powers of ten as such where the number would be long. */
function tick(value) {
  const power = Math.round(Math.log10(Math.abs(value)));
  if (value === 0 || (power > -4 && power < 6)) return value.toLocaleString("en", { maximumSignificantDigits: 3 });
  const factor = value / 10 ** power;
  const raised = `10${String(power).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])}`;
  return Math.abs(factor - 1) < 1e-6 ? raised : value.toExponential(1).replace("e+", "e");
}

/** Where a value is drawn: {at(value), marks}. */
function upright(values, scale) {
  const bottom = PLACE.height - PLACE.bottom;
  const between = (share) => bottom - share * (bottom - PLACE.top);
  let low = Math.min(...values);
  let high = Math.max(...values);
  const positive = values.filter((value) => value > 0);
  if (scale === "log" && positive.length && Math.max(...positive) / Math.min(...positive) > 8) {
    const room = (Math.max(...positive) / Math.min(...positive)) ** 0.05;
    low = Math.min(...positive) / room;
    high = Math.max(...positive) * room;
    const span = Math.log(high / low);
    return { at: (value) => (value > 0 ? between(Math.log(value / low) / span) : null), marks: powers(low, high) };
  }
  if (scale === "share") [low, high] = [Math.min(0, low), Math.max(1, high)];
  else if (high - low < 1e-6 * Math.max(Math.abs(high), Math.abs(low), 1e-300)) {
    const room = Math.abs(high) * 0.1 || 1; // rounding is no curve
    [low, high] = [low - room, high + room];
  } else {
    const room = (high - low) * 0.06;
    [low, high] = [low >= 0 && low < room * 8 ? 0 : low - room, high + room];
  }
  return { at: (value) => between((value - low) / (high - low)), marks: ticks(low, high) };
}

/** One panel. Series: {label, look, run, points: [[edits, value, low, high]]}; run: place of the run it belongs to. */
function chart({ title, note, series, scale = "linear", across = "edits", first = 0, say = shown }) {
  const known = series.map((one) => ({ ...one, points: one.points.filter((point) => point[1] !== null) }))
    .filter((one) => one.points.length);
  const caption = element("figcaption", {}, title, note ? element("span", { class: "quiet" }, note) : null);
  if (!known.length) return element("figure", {}, caption, element("p", {}, "No value is finite."));
  const all = known.flatMap((one) => one.points);
  const { at, marks } = upright(all.flatMap((point) => point.slice(1, 4)).filter((value) => value != null), scale);
  const last = Math.max(first + 1, ...all.map((point) => point[0]));
  const x = (edits) => PLACE.left + ((edits - first) / (last - first)) * (PLACE.width - PLACE.left - PLACE.right);
  const bottom = PLACE.height - PLACE.bottom;
  const parts = [];
  for (const value of marks) {
    const y = at(value);
    parts.push(drawn("path", { class: "grid", d: `M${PLACE.left} ${y}H${PLACE.width - PLACE.right}` }),
      drawn("text", { x: PLACE.left - 6, y: y + 4, "text-anchor": "end" }, tick(value)));
  }
  for (const value of ticks(first, last).filter(Number.isInteger)) {
    parts.push(drawn("text", { x: x(value), y: bottom + 15, "text-anchor": "middle" }, value.toLocaleString("en")));
  }
  parts.push(drawn("path", { class: "axis", d: `M${PLACE.left} ${bottom}H${PLACE.width - PLACE.right}` }),
    drawn("text", { x: PLACE.width - PLACE.right, y: PLACE.height - 3, "text-anchor": "end" }, across));
  for (const one of known) parts.push(curve(one, x, at));
  const rule = drawn("path", { class: "rule off" });
  const picture = drawn("svg", {
    viewBox: `0 0 ${PLACE.width} ${PLACE.height}`, tabindex: "0", role: "img",
    "aria-label": `${title}, curves of ${known.map((one) => one.label).join(", ")}. Arrow keys read values out.`,
  }, parts, rule);
  const made = element("figure", {}, caption, picture);
  readOut(made, picture, rule, known, x, across, say);
  return made;
}

function curve({ look: { colour, dash, mark }, points, run }, x, at) {
  const line = points.map(([edits, value]) => [x(edits), at(value)]).filter(([, y]) => y !== null);
  const band = points.filter((point) => point[2] != null && point[3] != null && at(point[2]) !== null);
  const parts = [];
  if (band.length > 1) {
    const upper = band.map((point) => `${x(point[0])} ${at(point[3])}`);
    const lower = band.map((point) => `${x(point[0])} ${at(point[2])}`).reverse();
    parts.push(drawn("path", { class: "band", d: `M${upper.join("L")}L${lower.join("L")}Z` }));
  }
  if (line.length) {
    parts.push(drawn("path", { class: "curve", d: `M${line.map((place) => place.join(" ")).join("L")}`, "stroke-dasharray": dash || null }));
  }
  const every = Math.ceil(line.length / MOST_MARKS);
  line.forEach(([left, top], place) => {
    if (mark && (line.length - 1 - place) % every === 0) {
      parts.push(drawn("path", { class: "mark", d: mark, transform: `translate(${left} ${top})` }));
    }
  });
  const off = run !== undefined && hidden.has(run) ? " off" : "";
  return drawn("g", { class: `${colour}${off}`, "data-run": run }, parts);
}

function readOut(made, picture, rule, series, x, across, say) {
  const counts = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const tip = element("div", { class: "tip", role: "status", hidden: true });
  made.append(tip);
  let place = counts.length - 1;
  const show = (wanted) => {
    place = Math.min(Math.max(wanted, 0), counts.length - 1);
    const lines = series.filter((one) => !hidden.has(one.run)).flatMap((one) => {
      const point = one.points.find(([edits]) => edits === counts[place]);
      if (!point) return [];
      const bounds = point[2] == null || point[3] == null ? "" : ` (${say(point[2])} to ${say(point[3])})`;
      return [element("p", {}, sample(one.place), `${one.label} ${say(point[1])}${bounds}`)];
    });
    tip.replaceChildren(element("p", {}, `${counts[place].toLocaleString("en")} ${across}`), ...lines);
    const left = x(counts[place]);
    rule.setAttribute("d", `M${left} ${PLACE.top}V${PLACE.height - PLACE.bottom}`);
    rule.classList.remove("off");
    tip.hidden = false;
    tip.style.top = `${picture.getBoundingClientRect().top - made.getBoundingClientRect().top}px`;
    const share = left / PLACE.width;
    tip.style.left = share < 0.5 ? `${share * 100 + 3}%` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `${(1 - share) * 100 + 3}%`;
  };
  const hide = () => {
    tip.hidden = true;
    rule.classList.add("off");
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const pointed = ((event.clientX - box.left) / box.width) * PLACE.width;
    const far = counts.map((edits) => Math.abs(x(edits) - pointed));
    show(far.indexOf(Math.min(...far)));
  });
  picture.addEventListener("pointerleave", hide);
  picture.addEventListener("focus", () => picture.matches(":focus-visible") && show(place));
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: counts.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      show(to);
    } else if (event.key === "Escape") hide();
  });
}

/** Switches runs on and off in every panel. */
function legend(labels) {
  return element("ul", { class: "legend", "aria-label": "Runs" }, labels.map((label, run) => {
    const button = element("button", {
      type: "button", "aria-pressed": "true", title: "Show or hide this run",
      click: () => {
        if (!hidden.delete(run)) hidden.add(run);
        button.setAttribute("aria-pressed", String(!hidden.has(run)));
        for (const group of document.querySelectorAll(`g[data-run="${run}"]`)) group.classList.toggle("off", hidden.has(run));
      },
    }, sample(run), label);
    return element("li", {}, button);
  }));
}

/** What the lines of a single panel are. */
function key(series) {
  return element("ul", { class: "legend" }, series.map((one) => element("li", {}, sample(one.place), one.label)));
}
