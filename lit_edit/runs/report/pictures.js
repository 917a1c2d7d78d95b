// Pictures of analysis callbacks: lines, scatter and heat map, from the data of `pictures/`.

const FIRST_PICTURES = 6; // drawn at once
const DOT = 2.2;

function pictures(data) {
  const several = data.runs.length > 1;
  const having = data.runs.filter((run) => run.pictures.length);
  if (!having.length) return null;
  const parts = having.map((run) => {
    const charts = (some) => element("div", { class: "charts" }, some.map(pictureOf));
    const rest = run.pictures.slice(FIRST_PICTURES);
    const made = () => element("div", {}, charts(run.pictures.slice(0, FIRST_PICTURES)),
      rest.length ? folded(count(rest.length, "further picture"), () => charts(rest)) : null);
    return several ? folded(`${run.label}: ${count(run.pictures.length, "picture")}`, made) : made();
  });
  return [element("p", { class: "quiet" }, "By analysis callbacks; the folder pictures of the run has each as PNG and SVG."), ...parts];
}

function pictureOf(picture) {
  if (picture.kind === "heatmap") return heatmap(picture);
  if (picture.kind === "scatter") return scatter(picture);
  const series = Object.entries(picture.series).map(([label, points], place) => ({ label, place, look: look(place), points }));
  const first = Math.min(...series.flatMap((one) => one.points.map((point) => point[0])));
  const made = chart({ title: picture.title, note: picture.note, series, scale: picture.scale, across: picture.across, first });
  if (series.length > 1) made.insertBefore(key(series), made.querySelector("svg[role]"));
  return made;
}

function scatter({ title, note, series, across, up, scale }) {
  const known = Object.entries(series).map(([label, points], place) => ({
    label, place, look: look(place), points: points.filter(([x, y]) => x !== null && y !== null),
  })).filter((one) => one.points.length);
  const caption = element("figcaption", {}, title, note ? element("span", { class: "quiet" }, note) : null);
  if (!known.length) return element("figure", {}, caption, element("p", {}, "No value is finite."));
  const all = known.flatMap((one) => one.points);
  const { at, marks } = upright(all.map(([, y]) => y), scale);
  const xs = all.map(([x]) => x);
  const room = (Math.max(...xs) - Math.min(...xs)) * 0.04 || 1;
  const [low, high] = [Math.min(...xs) - room, Math.max(...xs) + room];
  const x = (value) => PLACE.left + ((value - low) / (high - low)) * (PLACE.width - PLACE.left - PLACE.right);
  const bottom = PLACE.height - PLACE.bottom;
  const dot = (left, top) => `M${left - DOT} ${top}a${DOT} ${DOT} 0 1 0 ${2 * DOT} 0a${DOT} ${DOT} 0 1 0 ${-2 * DOT} 0`;
  const parts = marks.map((value) => [
    drawn("path", { class: "grid", d: `M${PLACE.left} ${at(value)}H${PLACE.width - PLACE.right}` }),
    drawn("text", { x: PLACE.left - 6, y: at(value) + 4, "text-anchor": "end" }, tick(value)),
  ]);
  parts.push(ticks(low, high).map((value) => drawn("text", { x: x(value), y: bottom + 15, "text-anchor": "middle" }, tick(value))),
    drawn("path", { class: "axis", d: `M${PLACE.left} ${bottom}H${PLACE.width - PLACE.right}` }),
    drawn("text", { x: PLACE.width - PLACE.right, y: PLACE.height - 3, "text-anchor": "end" }, across));
  for (const one of known) {
    const d = one.points.map(([left, top]) => (at(top) === null ? "" : dot(x(left), at(top)))).join("");
    parts.push(drawn("path", { class: `${one.look.colour} dots`, d }));
  }
  const said = known.map((one) => `${one.label} (${count(one.points.length, "point")})`).join(", ");
  const picture = drawn("svg", { viewBox: `0 0 ${PLACE.width} ${PLACE.height}`, role: "img", "aria-label": `${title}, ${up}: ${said}.` }, parts);
  return element("figure", {}, caption, known.length > 1 ? key(known) : null, picture);
}

function heatmap({ title, note, matrix, labels, across, up }) {
  const caption = element("figcaption", {}, title, note ? element("span", { class: "quiet" }, note) : null);
  const values = matrix.flat().filter((value) => value !== null);
  if (!values.length) return element("figure", {}, caption, element("p", {}, "No value is finite."));
  const most = Math.max(...values) || 1;
  const side = PLACE.height - PLACE.top - PLACE.bottom;
  const cell = side / matrix.length;
  const left = PLACE.left + 20;
  const parts = [];
  matrix.forEach((row, i) => row.forEach((value, j) => {
    if (value === null) return;
    const words = `${across} ${labels[i]} and ${labels[j]}: ${shown(value)}`;
    parts.push(drawn("rect", { x: left + j * cell, y: PLACE.top + i * cell, width: cell, height: cell, "fill-opacity": (value / most).toFixed(2) },
      drawn("title", {}, words)));
  }));
  const every = Math.ceil(labels.length / 6);
  labels.forEach((label, i) => {
    if (i % every) return;
    parts.push(drawn("text", { x: left - 5, y: PLACE.top + (i + 0.5) * cell + 4, "text-anchor": "end" }, label),
      drawn("text", { x: left + (i + 0.5) * cell, y: PLACE.top + side + 14, "text-anchor": "middle" }, label));
  });
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const said = `${up}: mean ${shown(mean)}, largest ${shown(Math.max(...values))}, which is drawn darkest.`;
  const picture = drawn("svg", { viewBox: `0 0 ${PLACE.width} ${PLACE.height}`, role: "img", class: "s0 cells", "aria-label": `${title}. ${said}` }, parts,
    drawn("path", { class: "axis", fill: "none", d: `M${left} ${PLACE.top}h${side}v${side}h${-side}z` }));
  return element("figure", {}, caption, picture, element("p", { class: "quiet" }, said));
}
