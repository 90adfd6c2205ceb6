// Charts. Vega interprets its expressions (ast: true): compiling them would need 'unsafe-eval' in the page's policy.

// The specs name no colours of texts and lines: `currentColor` follows the theme, also when the page is printed.
function chartConfig(narrow) {
  const font = getComputedStyle(document.documentElement).getPropertyValue("--sans").trim();
  const ink = "currentColor";
  return {
    background: "transparent",
    font,
    text: { color: ink },
    rule: { color: ink },
    tick: { color: ink },
    view: { stroke: "transparent" },
    title: { color: ink, subtitleColor: ink, fontWeight: 600, anchor: "start" },
    axis: {
      labelColor: ink,
      titleColor: ink,
      labelOpacity: 0.8,
      titleFontWeight: 500,
      domainColor: ink,
      domainOpacity: 0.4,
      tickColor: ink,
      tickOpacity: 0.4,
      gridColor: ink,
      gridOpacity: 0.12,
      labelLimit: narrow ? 110 : 260,
    },
    ...(narrow ? { axisX: { titleAnchor: "end" } } : {}), // a long title goes on below the labels of the other axis
    header: { labelColor: ink, titleColor: ink, titleFontWeight: 500 },
    legend: {
      labelColor: ink,
      titleColor: ink,
      titleFontWeight: 500,
      labelLimit: 220,
      symbolBaseFillColor: ink,
      symbolBaseStrokeColor: ink,
      ...(narrow ? { layout: { bottom: { anchor: "end", direction: "vertical" } } } : {}), // as the title, for room
    },
  };
}

function save(name, kind, address) {
  element("a", { href: address, download: `${name}.${kind}` }).click();
}

function saveButtons(name, view) {
  const svg = async () => {
    const address = URL.createObjectURL(new Blob([await view.toSVG()], { type: "image/svg+xml" }));
    save(name, "svg", address);
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  };
  const png = async () => save(name, "png", await view.toImageURL("png", 2));
  return element(
    "p",
    { class: "save" },
    element("button", { type: "button", onclick: svg }, "Save as SVG"),
    element("button", { type: "button", onclick: png }, "Save as PNG"),
  );
}

// Vega-Lite warns of every chart that is as wide as its place and as high as its rows need; the bundle does not hand out
// the part of it that takes a logger. What is wrong is thrown.
async function unwarned(work) {
  const warn = console.warn;
  console.warn = () => {};
  try {
    return await work();
  } finally {
    console.warn = warn;
  }
}

async function drawChart(box, spec) {
  const name = box.dataset.figure;
  const choices = element("div", { class: "controls" }); // where Vega puts what can be chosen
  const options = {
    bind: choices,
    mode: "vega-lite",
    ast: true,
    renderer: "svg",
    actions: false, // its menu would offer to send the chart to an editor on the web
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
    logLevel: 1, // errors
    config: chartConfig(box.clientWidth < 520),
  };
  box.replaceChildren();
  box.before(choices);
  try {
    const title = find("h3", box.parentElement).textContent;
    const described = { description: title, ...spec }; // for those who hear the page
    const { view } = await unwarned(() => window.vegaEmbed(box, described, options));
    // a line has the datum of its first point, and is of no run
    const runOf = (item) => (item?.mark?.marktype !== "line" && told.runs[item?.datum?.run_id] ? item.datum.run_id : null);
    view.addEventListener("click", (_, item) => {
      if (runOf(item)) location.hash = `#run=${encodeURIComponent(runOf(item))}`;
    });
    view.addEventListener("mouseover", (_, item) => box.classList.toggle("pointing", Boolean(runOf(item))));
    find("figcaption", box.parentElement).after(saveButtons(name, view));
  } catch (error) {
    box.replaceChildren(element("p", { class: "waiting" }, `This chart could not be drawn: ${error.message}`));
    console.error(`chart ${name}:`, error);
  }
}

async function setUpCharts() {
  const specs = data("figures");
  for (const box of findAll(".chart")) {
    await drawChart(box, specs[box.dataset.figure]);
    await new Promise((resume) => setTimeout(resume)); // the page stays usable meanwhile
  }
  document.documentElement.dataset.drawn = "yes";
}
