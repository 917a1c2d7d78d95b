// Elements, numbers and words. Whatever comes from data becomes a text node, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

/** An element; functions among the attributes listen to the event of their name. */
const element = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const drawn = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** A number in three digits, as the table at the end of a run shows it. */
function shown(value) {
  if (value === null || value === undefined) return "n/a";
  if (value !== 0 && Math.abs(value) < 1e-6) return "~ 0";
  if (Math.abs(value) >= 1e6) return value.toExponential(2).replace("e+", "e");
  if (Math.abs(value) >= 999.5) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}


/** A probability: small ones are told from 0, large ones from 1. */
function chance(value) {
  if (value === null || value === undefined) return "";
  return value && value < 0.001 ? "< 0.001" : value < 1 && value > 0.999 ? "> 0.999" : value.toFixed(3);
}

const classes = (column) => ["number", "wide", "key", "run"].filter((name) => column[name]).join(" ") || null;

/** A table of texts, numbers and elements. Columns: {title, number, wide}: wide ones are left out on a phone. */
function table(columns, rows, { caption, kind } = {}) {
  const heads = columns.map((column) =>
    element("th", { scope: "col", class: classes(column) }, column.title));
  const body = rows.map((row) =>
    element("tr", {}, row.map((cell, place) =>
      element(place ? "td" : "th", {
        scope: place ? null : "row",
        class: classes(columns[place]),
        "data-name": columns[place].title,
      }, cell ?? ""))));
  const made = element("table", { class: kind }, caption ? element("caption", {}, caption) : null,
    element("thead", {}, element("tr", {}, heads)), element("tbody", {}, body));
  return element("div", { class: "scroll" }, made);
}

/** Something that is made when it is first opened. */
function folded(title, make) {
  const made = element("details", {}, element("summary", {}, title));
  made.addEventListener("toggle", () => {
    if (made.open && made.children.length === 1) made.append(make());
  });
  return made;
}

const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
