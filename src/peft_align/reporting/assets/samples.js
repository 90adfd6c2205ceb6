// Samples: the same prompts, answered by several runs.

const samples = data("answers");
const PAGE = 20; // prompts at a time
const SIDE = 4; // answers side by side, before all are asked for

const turnsOf = (prompt) => (Array.isArray(prompt) ? prompt : [prompt]);
const textOf = (turn) => (typeof turn === "string" ? turn : String(turn?.content ?? turn?.text ?? JSON.stringify(turn)));

// A text of others: its own direction, its own line breaks, and the words that are looked for marked.
function textBlock(text, query, kind = "") {
  const block = element("p", { class: `text ${kind}`.trim(), dir: "auto" });
  if (!query) {
    block.textContent = text;
    return block;
  }
  const lower = text.toLowerCase();
  let from = 0;
  // where lower case has another length (İ), places do not agree: then nothing is marked
  for (let at = lower.length === text.length ? lower.indexOf(query) : -1; at >= 0; at = lower.indexOf(query, from)) {
    block.append(text.slice(from, at), element("mark", {}, text.slice(at, at + query.length)));
    from = at + query.length;
  }
  block.append(text.slice(from));
  return block;
}

function promptBlocks(prompt, query) {
  return turnsOf(prompt).map((turn) => {
    const role = typeof turn === "object" && turn?.role;
    return element("div", { class: "turn" }, role ? element("b", {}, role) : null, textBlock(textOf(turn), query, "said"));
  });
}

function answerBlock([run, text, cut, scores], query, titled = true) {
  const [id, label] = samples.runs[run];
  const notes = Object.entries(scores).map(([name, value]) => `${name} ${shortNumber(value)}`);
  if (cut) notes.unshift("cut here");
  const link = id in told.runs ? element("a", { href: `#run=${encodeURIComponent(id)}` }, label) : label;
  return element(
    "div",
    { class: "answer" },
    titled ? element("h4", {}, link) : null,
    text === "" ? element("p", { class: "note" }, "(an empty answer)") : textBlock(text, query),
    notes.length ? element("p", { class: "note" }, notes.join(", ")) : null,
  );
}

// What may harm is shown to those alone who ask for it.
function folded(sensitive, children) {
  if (!sensitive) return children;
  return [element("details", { class: "warning" }, element("summary", {}, "May contain harmful text: show"), ...children)];
}

function promptNote(sample, ...more) {
  const parts = [sample.benchmark, sample.model, ...more, sample.prompt_cut ? "its middle is left out" : null];
  return element("p", { class: "note" }, parts.filter(Boolean).join(", "));
}

function referenceBlock(reference, query) {
  return element(
    "div",
    { class: "answer reference" },
    element("h4", {}, `${reference.label} (what answers are compared with)`),
    textBlock(reference.text, query),
    reference.cut ? element("p", { class: "note" }, "cut here") : null,
  );
}

function promptCard(sample, answers, query) {
  const blocks = answers.map((answer) => answerBlock(answer, query));
  if (sample.reference) blocks.push(referenceBlock(sample.reference, query));
  const side = element("div", { class: "answers" }, ...(query ? blocks : blocks.slice(0, SIDE)));
  const inner = [...promptBlocks(sample.prompt, query), side];
  const left = blocks.length - side.children.length;
  if (left) {
    const all = element("button", { type: "button", class: "more" }, `${left} more beside these`);
    all.addEventListener("click", () => {
      side.append(...blocks.slice(SIDE));
      all.remove();
    });
    inner.push(all);
  }
  return element("article", { class: "prompt" }, promptNote(sample, sample.chosen), ...folded(sample.sensitive, inner));
}

function answersOf(id) {
  const run = samples.runs.findIndex(([own]) => own === id);
  if (run < 0) return [];
  return samples.prompts.flatMap((sample) => {
    const answer = sample.answers.find(([number]) => number === run);
    if (!answer) return [];
    const inner = [...promptBlocks(sample.prompt, ""), answerBlock(answer, "", false)];
    return [element("article", { class: "prompt" }, promptNote(sample), ...folded(sample.sensitive, inner))];
  });
}

function setUpSamples() {
  const place = find("#sample-list");
  if (!place) return;
  const chosen = new Set(samples.runs.map((_, number) => number));
  let room = PAGE;
  const search = element("input", { type: "search", placeholder: "words of a prompt or an answer" });
  const names = [...new Set(samples.prompts.map((sample) => sample.benchmark))];
  const options = names.map((name) => element("option", { value: name }, name));
  const benchmark = element("select", {}, element("option", { value: "" }, "all"), ...options);
  const count = element("output", { class: "count" });
  const list = element("div");
  const runsTitle = element("summary");
  const lower = samples.prompts.map((sample) => ({
    prompt: turnsOf(sample.prompt).map(textOf).join("\n").toLowerCase(),
    answers: sample.answers.map((answer) => answer[1].toLowerCase()),
  }));

  function render() {
    const query = search.value.trim().toLowerCase();
    const matching = [];
    samples.prompts.forEach((sample, i) => {
      if (benchmark.value && sample.benchmark !== benchmark.value) return;
      const answers = sample.answers.filter(([run]) => chosen.has(run));
      if (!answers.length) return;
      const inAnswers = sample.answers.some(([run], j) => chosen.has(run) && lower[i].answers[j].includes(query));
      if (!query || inAnswers || lower[i].prompt.includes(query)) matching.push([sample, answers]);
    });
    runsTitle.textContent = `Runs shown (${chosen.size} of ${samples.runs.length})`;
    count.textContent = `${matching.length} of ${samples.prompts.length} prompts`;
    list.replaceChildren(...matching.slice(0, room).map(([sample, answers]) => promptCard(sample, answers, query)));
    if (matching.length > room) {
      const more = () => {
        room += PAGE;
        render();
      };
      list.append(element("button", { type: "button", onclick: more }, `Show ${Math.min(PAGE, matching.length - room)} more`));
    }
  }

  function renderAnew() {
    room = PAGE;
    render();
  }

  const boxes = samples.runs.map(([, label], number) => {
    const box = element("input", { type: "checkbox", checked: chosen.has(number) });
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(number);
      else chosen.delete(number);
      renderAnew();
    });
    return element("label", {}, box, element("span", {}, label));
  });
  const choose = (all) => {
    samples.runs.forEach((_, number) => (all ? chosen.add(number) : chosen.delete(number)));
    for (const label of boxes) find("input", label).checked = all;
    renderAnew();
  };
  const both = element(
    "p",
    { class: "controls" },
    element("button", { type: "button", onclick: () => choose(true) }, "All"),
    element("button", { type: "button", onclick: () => choose(false) }, "None"),
  );
  search.addEventListener("input", renderAnew);
  benchmark.addEventListener("change", renderAnew);
  place.append(
    element(
      "div",
      { class: "controls" },
      element("label", {}, "Search ", search),
      element("label", {}, "Benchmark ", benchmark),
      count,
    ),
    element("details", {}, runsTitle, both, element("div", { class: "chips" }, ...boxes)),
    list,
  );
  render();
}

setUpTheme();
setUpNavigation();
setUpTables();
setUpSamples();
setUpRuns();
setUpCharts();
