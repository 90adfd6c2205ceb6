// What stands behind one run: a dialog at #run=ID.

const told = data("details");

function plot(name, steps, values) {
  const [width, height, left, bottom, top] = [320, 150, 44, 18, 6];
  const points = steps.map((step, i) => [step, values[i]]).filter(([, value]) => value != null);
  const figure = element("figure");
  const readout = element("span", {}, `${shortNumber(points.at(-1)?.[1])} at the end`);
  figure.append(element("figcaption", {}, element("b", {}, name), readout));
  if (!points.length) return figure;
  const [first, last] = [steps[0], steps.at(-1)];
  let [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - 6);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const picture = element("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  picture.setAttribute("aria-label", `${name} from ${shortNumber(points[0][1])} to ${shortNumber(points.at(-1)[1])}`);
  for (const value of [low, (low + high) / 2, high]) {
    picture.append(
      element("svg:line", { x1: left, x2: width - 6, y1: y(value), y2: y(value) }),
      element("svg:text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, shortNumber(Number(value.toPrecision(3)))),
    );
  }
  picture.append(
    element("svg:text", { x: left, y: height - 3 }, `step ${first}`),
    element("svg:text", { x: width - 6, y: height - 3, "text-anchor": "end" }, last === first ? "" : String(last)),
  );
  const pieces = [[]]; // a value that is no number leaves a gap
  steps.forEach((step, i) => {
    if (values[i] == null) pieces.push([]);
    else pieces.at(-1).push(`${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`);
  });
  for (const piece of pieces) {
    if (piece.length > 1) picture.append(element("svg:polyline", { points: piece.join(" ") }));
    else if (piece.length) {
      const [cx, cy] = piece[0].split(",");
      picture.append(element("svg:circle", { cx, cy, r: 2 }));
    }
  }
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const nearest = points.reduce((best, p) => (Math.abs(x(p[0]) - at) < Math.abs(x(best[0]) - at) ? p : best));
    readout.textContent = `step ${nearest[0]}: ${shortNumber(nearest[1])}`;
  });
  figure.append(picture);
  return figure;
}

function facts(pairs) {
  const shown = (value) => (value != null && typeof value === "object" ? JSON.stringify(value) : shortNumber(value));
  return element(
    "dl",
    { class: "facts" },
    ...pairs.map(([key, value]) => element("div", {}, element("dt", {}, key), element("dd", {}, shown(value)))),
  );
}

function scoresTable(scores) {
  const heads = ["step", "benchmark", "metric", "value", "standard error", "items"];
  const numbers = [true, false, false, true, true, true];
  const rows = scores.map(([step, number, value, error, n]) => {
    const [benchmark, metric, judge] = told.names[number];
    return [step, benchmark, judge ? `${metric} (${judge})` : metric, value, error, n];
  });
  const cell = (value, i) => element("td", numbers[i] ? { class: "number" } : {}, shortNumber(value));
  const head = heads.map((text, i) => element("th", { scope: "col", class: numbers[i] && "number" }, text));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Scores" }, table);
}

function runLink(id) {
  return element("a", { href: `#run=${encodeURIComponent(id)}` }, told.runs[id]?.label ?? id);
}

function runContents(id, run) {
  const parts = [];
  const add = (title, ...children) => parts.push(element("h3", {}, title), ...children);
  parts.push(element("p", { class: "note" }, `${run.kind ?? "run"}, ${run.state ?? "missing"}. ${id}`));
  if (run.reason) parts.push(element("p", { class: "reason" }, run.reason));
  for (const fault of run.faults ?? []) parts.push(element("p", { class: "reason" }, fault));
  if (run.scores.length) add("Scores", scoresTable(run.scores));
  else add("Scores", element("p", {}, "It has no scores."));
  const curves = Object.entries(run.curves);
  if (curves.length) {
    const plots = curves.map(([name, [steps, values]]) => plot(name, told.steps[steps], values));
    add("While it was trained", element("div", { class: "plots" }, ...plots));
  }
  if (run.parents?.length) {
    const links = run.parents.map((parent) => element("li", {}, runLink(parent)));
    add("Made from", element("ul", {}, ...links));
  }
  const cost = Object.entries(run.cost ?? {}).filter(([, value]) => value != null);
  if (cost.length) add("Cost", facts(cost.map(([key, value]) => [key.replaceAll("_", " "), value])));
  if (run.config.length) add("Config", facts(run.config.map((number) => told.settings[number])));
  const own = answersOf(id);
  if (own.length) add(`Answers (${own.length})`, ...own);
  return parts;
}

function showRun(id) {
  const dialog = find("#run");
  const run = told.runs[id];
  find("#run-heading").textContent = run ? run.label : "No such run";
  const missing = () => [element("p", {}, `This report has no run ${id}.`)];
  find("#run-body").replaceChildren(...(run ? runContents(id, run) : missing()));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  find("#run-heading").focus();
}

function followAddress() {
  const dialog = find("#run");
  if (location.hash.startsWith("#run=")) {
    let id = location.hash.slice("#run=".length);
    try {
      id = decodeURIComponent(id);
    } catch {
      // a stray % in a link that someone typed: then it is meant as it is
    }
    showRun(id);
  } else if (dialog.open) dialog.close();
}

function setUpRuns() {
  const dialog = find("#run");
  find("#close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop is part of the dialog
  });
  dialog.addEventListener("close", () => {
    if (location.hash.startsWith("#run=")) history.replaceState(null, "", location.href.split("#")[0]);
  });
  addEventListener("hashchange", followAddress);
  followAddress();
}
