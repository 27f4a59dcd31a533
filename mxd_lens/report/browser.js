const SPARE = 5; // rows of the list that are made beyond those that are seen, on both sides
const BEFORE = 24, AFTER = 12; // tokens shown around the one that fires

/** The experts of a layer: of each a line of the page, and the rest in a shard that is read when it is opened. */
class Layer {
  shards = new Map(); // number: promise of its experts
  probesOf = new Map(); // id: [{of: class, rank, n: features of the smallest probe, f1}]

  /** name: id of its data in the page, from which those of its shards follow; link: address of an expert. */
  constructor(name, data, link) {
    Object.assign(this, { name, data, link });
    this.experts = data.experts.map((
      [id, name, density, mean, max, coherence, same_token, meaningful, agreement, top, promotes, label], i,
    ) => ({
      layer: this, i, id, name, density, mean, max, coherence, same_token, meaningful, agreement, top, promotes, label,
    }));
    this.byId = new Map(this.experts.map((expert) => [expert.id, expert]));
    for (const of of data.classes) {
      for (const [id, rank, n, f1] of of.experts) {
        if (!this.probesOf.has(id)) this.probesOf.set(id, []);
        this.probesOf.get(id).push({ of, rank, n, f1 });
      }
    }
    for (const probes of this.probesOf.values()) probes.sort((a, b) => alone(b) - alone(a));
  }

  shard(n) {
    const { name, data: { folder }, shards } = this;
    if (!shards.has(n)) {
      shards.set(n, folder === null
        ? Promise.resolve(JSON.parse(find(`${name}-${n}`).textContent))
        : new Promise((resolve, reject) => {
          const script = el("script", { src: `${folder}/${n}.js` });
          script.take = resolve;
          script.addEventListener("error", () => { shards.delete(n); reject(new Error(script.src)); });
          document.head.append(script);
        }));
    }
    return shards.get(n);
  }
}

/** What a script beside the page calls. */
function take(number, rows) {
  document.currentScript.take(rows);
}

const alone = (probe) => probe.f1 - probe.n; // F1 is at most 1: fewest features first
const bestProbe = ({ layer, id }) => (layer.probesOf.get(id) || [null])[0];

const own = new Layer("data", data, (id) => `#expert=${id}`), { experts, byId } = own;

let theirs = null;

/** The layer whose experts are beside them, null if there is none; it is read once it is needed. */
const layerBeside = () => (theirs ??= find("beside")
  && new Layer("beside", JSON.parse(find("beside").textContent), (id) => `${own.link(selected())}&beside=${id}`));

/** All that is known of it. */
const whole = async (expert) => {
  const { shard: size } = expert.layer.data;
  return { ...expert, ...(await expert.layer.shard(Math.floor(expert.i / size)))[expert.i % size] };
};

const isTop = (context) => context[3] === 1;

// Search: name, promoted tokens, strongest contexts

const searched = { // in lower case, once it is needed
  get texts() { return this.own ??= data.texts.map((words) => words.map((word) => word.toLowerCase())); },
  get joined() { return this.whole ??= this.texts.map((words) => words.join("")); },
  get tokens() { return this.promoted ??= data.tokens.map((token) => token.toLowerCase()); },
  get names() { return this.named ??= experts.map(({ name, label }) => [name, label?.[0]].join("\n").toLowerCase()); },
};

/** For each text that has the word: at which token, at the earliest, ends one that begins at this token or later. */
function ends(word) {
  return searched.joined.map((text, n) => {
    let at = text.indexOf(word);
    if (at < 0) return null;
    const words = searched.texts[n], end = new Float64Array(words.length).fill(Infinity);
    let first = 0, start = 0; // a token, and its first character
    for (; at >= 0; at = text.indexOf(word, at + 1)) {
      while (start + words[first].length <= at) start += words[first++].length;
      let last = first, stop = start + words[first].length;
      while (stop < at + word.length) stop += words[++last].length;
      end[first] = Math.min(end[first], last);
    }
    for (let i = words.length - 2; i >= 0; i--) end[i] = Math.min(end[i], end[i + 1]);
    return end;
  });
}

/** What an expert must be for a word. */
function matcher(word) {
  const isNumber = isNumberOf(word), found = ends(word), hit = searched.tokens.map((token) => token.includes(word));
  const inContext = (top) => {
    for (let i = 0; i < top.length; i += 2) {
      const end = found[top[i]];
      if (end && end[Math.max(0, top[i + 1] - BEFORE)] <= top[i + 1] + AFTER) return true;
    }
    return false;
  };
  return (expert) => isNumber(expert) || searched.names[expert.i].includes(word)
    || expert.promotes.some((token) => hit[token]) || inContext(expert.top);
}

const isNumberOf = (word) => (expert) => word.replace(/^#/, "") === String(expert.id);

// Filters

const NUMBERS = { // as they are asked for
  density: (expert) => expert.density * 100,
  coherence: (expert) => expert.coherence,
  agreement: (expert) => expert.agreement,
  f1: (expert) => bestProbe(expert)?.f1 ?? null,
  mean: (expert) => expert.mean,
  same_token: (expert) => expert.same_token * 100,
};

/** What an expert must be for the numbers that are filled in; without such a number it is not. */
function bounds() {
  const kept = Object.entries(NUMBERS).flatMap(([name, value]) => {
    const [least, most] = ["least", "most"].map((end) => find(`${end}-${name}`).valueAsNumber);
    if (Number.isNaN(least) && Number.isNaN(most)) return [];
    return [(expert) => value(expert) !== null && !(value(expert) < least) && !(value(expert) > most)];
  });
  return find("meaningful").checked ? [...kept, (expert) => expert.meaningful] : kept;
}

// The list, of which only what is seen is made

const search = find("search"), order = find("order"), classes = find("class"), list = find("list");
const box = find("scroll");
let shown = []; // the experts that match, in order
let made = ""; // which of them have a row
let active = -1; // the row the arrow keys are at
let rankOf = new Map(); // in the chosen class

const ORDERS = { // the largest comes first, null last
  meaningful: (expert) => (expert.meaningful ? 3 : 0) + (expert.coherence ?? -1),
  coherence: (expert) => expert.coherence,
  agreement: (expert) => expert.agreement,
  density: (expert) => expert.density,
  rare: (expert) => -expert.density,
  mean: (expert) => expert.mean,
  probe: (expert) => (bestProbe(expert) ? alone(bestProbe(expert)) : null),
  id: (expert) => -expert.id,
  rank: (expert) => -rankOf.get(expert.id),
};

function refresh() {
  const words = search.value.toLowerCase().split(/\s+/).filter((word) => word);
  const chosen = classes.value === "" ? null : data.classes[classes.value];
  rankOf = new Map((chosen ? chosen.experts : []).map(([id], i) => [id, i]));
  const key = ORDERS[order.value], asked = [...bounds(), ...words.map(matcher)];
  shown = experts
    .filter((expert) => (!chosen || rankOf.has(expert.id)) && asked.every((holds) => holds(expert)))
    .map((expert) => [key(expert) ?? -Infinity, expert])
    .sort(([a], [b]) => (a < b) - (a > b))
    .map(([, expert]) => expert);
  if (words.length === 1) {
    const exact = shown.findIndex(isNumberOf(words[0]));
    if (exact > 0) shown.unshift(...shown.splice(exact, 1));
  }
  active = -1;
  list.removeAttribute("aria-activedescendant");
  list.style.setProperty("--rows", shown.length);
  box.scrollTop = 0;
  drawRows(true);
  const dead = chosen ? chosen.experts.filter(([id]) => !byId.has(id)).length : 0;
  find("status").textContent =
    `${shown.length.toLocaleString("en")} of ${experts.length.toLocaleString("en")} experts`
    + (dead ? `; ${dead} of the class fired nowhere here` : "");
}

const rowHeight = () => list.getBoundingClientRect().height / shown.length || 1;

/** Make the rows that are seen, unless they are there and unchanged. */
function drawRows(changed) {
  const first = Math.max(0, Math.floor(box.scrollTop / rowHeight()) - SPARE);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / rowHeight()) + SPARE);
  if (!changed && made === `${first}-${last}`) return;
  made = `${first}-${last}`;
  list.replaceChildren(...shown.slice(first, last).map((expert, i) => row(expert, first + i)));
}

function row(expert, i) {
  const probe = bestProbe(expert);
  const small = [
    expert.meaningful ? "meaningful" : null,
    `fires on ${percent(expert.density)}`,
    expert.coherence === null ? null : `coherence ${number(expert.coherence, 2)}`,
    order.value === "agreement" ? `agreement ${number(expert.agreement, 4)}` : null,
    order.value === "mean" ? `mean ${number(expert.mean, 2)}` : null,
    probe ? `F1 ${number(probe.f1, 2)}${probe.n > 1 ? ` of ${probe.n}` : ""}` : null,
  ];
  const option = el("li", {
    role: "option", id: `option-${expert.id}`, class: i === active ? "active" : "", "data-row": i,
    "aria-selected": expert.id === selected(), "aria-posinset": i + 1, "aria-setsize": shown.length,
  },
  el("span", { class: "id" }, `#${expert.id}`), nameOf(expert),
  el("span", { class: "small" }, [labelOf(expert), ...small].filter((part) => part).join(" · ")));
  option.style.setProperty("--at", i);
  return option;
}

/** Its name, or else what it fires on most strongly. */
function nameOf({ layer, name, top }) {
  if (name) return el("span", { class: "name" }, name);
  const token = top.length ? layer.data.texts[top[0]][top[1]] : "";
  return el("span", { class: "name none" }, "on “", ...visibleToken(token.trim() || token), "”");
}

/** Its label, where that is another name, and how well that tells its contexts. */
function labelOf({ name, label }) {
  if (!label) return null;
  const shown = label[0] && label[0] !== name ? [label[0]] : [];
  return [...shown, `detection F1 ${number(label[1], 2)}`].join(" · ");
}

/** Scroll the list as little as is needed to see a row. */
function reveal(i) {
  const top = i * rowHeight(), least = top + rowHeight() - box.clientHeight;
  if (box.scrollTop > top || box.scrollTop < least) box.scrollTop = Math.min(Math.max(box.scrollTop, least), top);
  drawRows(true);
}

function moveTo(i) {
  if (!shown.length) return;
  active = Math.max(0, Math.min(i, shown.length - 1));
  reveal(active);
  list.setAttribute("aria-activedescendant", `option-${shown[active].id}`);
}

// The expert that is open is the one in the address, #expert=7, or as it was before, #expert-7; so is the one of the
// other layer beside it, #expert=7&beside=3, where that is not the nearest.

function address() {
  const found = /^#expert[=-](\d+)(?:&beside=(\d+))?$/.exec(location.hash) ?? [];
  return [1, 2].map((i) => (found[i] === undefined ? null : Number(found[i])));
}

const selected = () => address()[0];

function open(id) {
  if (selected() === id) show();
  else location.hash = own.link(id);
}

let opened = null; // the expert that is seen: where it stays, another of the other layer is asked for

async function show() {
  const [id, beside] = address(), { hash } = location;
  if (id === null) return drawRows(true);
  const expert = byId.get(id), detail = find("detail");
  const place = shown.indexOf(expert);
  if (place >= 0) {
    active = place;
    reveal(place);
  } else drawRows(true);
  const described = await shownOf(own, id, (known) => (layerBeside() ? pair(known, beside) : describe(known)));
  if (location.hash !== hash) return;
  const within = detail.contains(document.activeElement), across = opened === id && beside !== null;
  opened = id;
  detail.replaceChildren(...described);
  find("back").hidden = false;
  find("across").hidden = !detail.querySelector(".pair");
  const seen = (across && detail.querySelector("section + section")) || detail;
  if (within) seen.querySelector("h3")?.focus({ preventScroll: true });
  const narrow = matchMedia("(max-width: 700px)").matches;
  const { top } = seen.getBoundingClientRect(), far = top < 0 || top > innerHeight / 2;
  if (seen !== detail && far) seen.scrollIntoView();
  if (seen === detail && (narrow || far)) find(narrow ? "back" : "browser").scrollIntoView();
}

/** What is shown of an expert of a layer, or why it is not. */
async function shownOf(layer, id, say = describe) {
  const expert = layer.byId.get(id);
  if (!expert) return [el("p", {}, `Expert ${id} fired nowhere in these texts.`)];
  let known;
  try {
    known = await whole(expert);
  } catch {
    const missing = `What is known of expert ${id} is in the folder ${layer.data.folder} beside this page, and not there now.`;
    return [el("p", {}, `${missing} Load the page again if it has been made anew; else bring its folder along.`)];
  }
  return say(known);
}

/** An expert and, in a second column, those of the other layer that are nearest, one of them open. */
async function pair(expert, beside) {
  const other = layerBeside(), id = beside ?? expert.beside[0]?.[0];
  const column = (layer, ...children) => el("section", { "aria-label": layer.data.layer },
    el("p", { class: "small" }, layer.data.layer), ...children);
  const near = links(expert.beside, other, id) ?? el("p", {}, "None of its experts fires where this one does.");
  return [el("div", { class: "pair" },
    column(own, ...describe(expert)),
    column(other, el("div", { class: "near" }, el("h4", {}, "Nearest by firing (Jaccard)"), near),
      ...(id === undefined ? [] : await shownOf(other, id))))];
}

// One expert

function describe(expert) {
  const { layer } = expert, probes = layer.probesOf.get(expert.id) || [];
  const numbers = [
    ["fires on", `${percent(expert.density)} of tokens`],
    ["activation, mean", number(expert.mean)],
    ["activation, largest", number(expert.max)],
    ["coherence of contexts", number(expert.coherence)],
    ["on the same token", percent(expert.same_token)],
    ...(expert.agreement === null ? [] : [["agreement of what it promotes", number(expert.agreement, 4)]]),
    ["rank", number(expert.rank, 6)],
    ["effective rank", number(expert.effective_rank)],
    ["meaningful", expert.meaningful ? "yes" : "no"],
  ];
  const lower = new Map();
  for (const context of expert.contexts.filter((context) => !isTop(context))) {
    if (!lower.has(context[3])) lower.set(context[3], []);
    lower.get(context[3]).push(context);
  }
  return [
    el("h3", { tabindex: "-1" }, el("a", { class: "id", href: layer.link(expert.id), title: "Link to this expert" }, `#${expert.id}`), nameOf(expert), el("span", { class: "small" }, labelOf(expert) ?? "")),
    el("dl", { class: "numbers" }, ...numbers.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    ...part("Strongest contexts", expert.contexts.filter(isTop).map((context) => contextRow(context, expert))),
    el("div", { class: "columns" },
      column("Promotes", tokens(expert.promoted)),
      column("Suppresses", tokens(expert.suppressed)),
      column("Activation where it fires", histogram(expert)),
      column("Probe classes that chose it", probes.length ? el("ul", {}, ...probes.map(probeRow)) : null),
      column("Nearest by weights (cosine)", links(expert.nearest, layer)),
      column("Most often active with (Jaccard)", links(expert.coactive, layer))),
    ...[...lower].flatMap(([quantile, contexts]) =>
      part(`Contexts at the ${number(quantile * 100)}% quantile of its activation`,
        contexts.map((context) => contextRow(context, expert)))),
    ...part("Steered sample", expert.sample ? [el("p", { class: "sample" }, expert.sample)] : []),
  ];
}

const part = (title, children) => (children.length ? [el("h4", {}, title), ...children] : []);
const column = (title, child) => (child ? el("div", {}, el("h4", {}, title), child) : null);

function contextRow(context, expert) {
  const [text, position, value] = context;
  const words = expert.layer.data.texts[text];
  const share = expert.max > 0 ? Math.min(1, value / expert.max) : 0;
  const body = el("div", { class: "text", dir: "auto" });
  const button = el("button", { type: "button", "aria-label": "Whole text", title: "Whole text" }, "⋯");
  const write = (whole) => {
    const start = whole ? 0 : Math.max(0, position - BEFORE);
    const end = whole ? words.length : Math.min(words.length, position + AFTER + 1);
    const mark = el("mark", { title: `activation ${number(value)}` }, ...visibleToken(words[position]));
    mark.style.setProperty("--share", share);
    body.replaceChildren(
      ...(start > 0 ? [el("span", { class: "sign" }, "… ")] : []),
      ...visible(words.slice(start, position).join("")), mark,
      ...visible(words.slice(position + 1, end).join("")),
      ...(end < words.length ? [el("span", { class: "sign" }, " …")] : []));
    button.setAttribute("aria-expanded", whole);
  };
  write(false);
  button.addEventListener("click", () => write(button.getAttribute("aria-expanded") === "false"));
  const cut = position > BEFORE || position + AFTER + 1 < words.length;
  return el("div", { class: "context" }, el("span", { class: "value" }, number(value)), body, cut ? button : null);
}

/** Experts of a layer and how near they are, that which is open marked. */
function links(others, { byId, link }, open = null) {
  if (!others || !others.length) return null;
  return el("ul", {}, ...others.map(([id, value]) => el("li", {},
    byId.has(id)
      ? el("a", { href: link(id), ...(id === open && { "aria-current": "true" }) }, `#${id} `, nameOf(byId.get(id)))
      : `#${id}`,
    el("span", { class: "value" }, ` ${number(value, 2)}`))));
}

function probeRow({ of, rank, n, f1 }) {
  const button = el("button", { type: "button" }, `${of.data}: ${of.class}`);
  button.title = "List the experts of this class";
  button.addEventListener("click", () => chooseClass(String(data.classes.indexOf(of))));
  return el("li", {}, button,
    el("span", { class: "small" }, `rank ${rank}; F1 ${number(f1)} ${n > 1 ? `of a probe on ${n} features` : "by itself"}`));
}

function histogram(expert) {
  const counts = expert.histogram;
  const highest = Math.max(...counts);
  if (!highest) return null;
  const width = 320, height = 90, bar = width / counts.length, size = expert.max / counts.length;
  const bars = counts.map((count, i) => {
    const tall = count ? Math.max(1, count / highest * height) : 0;
    return svg("rect", { x: i * bar, y: height - tall, width: bar - 1, height: tall },
      svg("title", {}, `${number(i * size)} to ${number((i + 1) * size)}: ${count.toLocaleString("en")} tokens`));
  });
  const label = `Histogram from 0 to ${number(expert.max)}, at most ${highest.toLocaleString("en")} tokens a bar`;
  return el("div", {},
    svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, ...bars),
    el("div", { class: "axis" }, el("span", {}, "0"), el("span", {}, number(expert.max))));
}

// Events

/** Show the experts that probes of a class read, by rank; the order before comes back after. */
function chooseClass(index) {
  const rank = order.querySelector('[value="rank"]');
  if (index === "" && order.value === "rank") order.value = orderBefore;
  if (index !== "" && order.value !== "rank") orderBefore = order.value;
  rank.disabled = index === "";
  if (index !== "") order.value = "rank";
  classes.value = index;
  refresh();
}
let orderBefore = "meaningful";

const KEYS = {
  ArrowDown: () => active + 1,
  ArrowUp: () => active - 1,
  PageDown: () => active + 10,
  PageUp: () => active - 10,
  Home: () => 0,
  End: () => shown.length - 1,
};

// The page

const groups = new Map();
data.classes.forEach((of, i) => {
  if (!groups.has(of.data)) groups.set(of.data, classes.appendChild(el("optgroup", { label: of.data })));
  groups.get(of.data).append(el("option", { value: i }, of.class));
});
for (const name of ["coherence", "agreement", "probe"]) { // what has not been measured
  if (experts.every((expert) => ORDERS[name](expert) === null)) order.querySelector(`[value="${name}"]`).remove();
}
for (const [name, value] of Object.entries(NUMBERS)) {
  if (experts.some((expert) => value(expert) !== null)) continue;
  const least = find(`least-${name}`);
  for (const node of [least.labels[0], least.nextElementSibling, find(`most-${name}`), least]) node.remove();
  delete NUMBERS[name];
}
for (const node of [classes, classes.labels[0]]) node.hidden = !data.classes.length;
search.addEventListener("input", refresh);
search.addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown" && event.key !== "Enter") return;
  event.preventDefault();
  list.focus();
  moveTo(0);
  if (event.key === "Enter" && shown.length) open(shown[0].id);
});
order.addEventListener("change", refresh);
classes.addEventListener("change", () => chooseClass(classes.value));
find("filters").addEventListener("input", refresh);
find("filters").addEventListener("reset", () => setTimeout(refresh));
box.addEventListener("scroll", () => drawRows(false));
new ResizeObserver(() => drawRows(false)).observe(box);
list.addEventListener("click", (event) => {
  const option = event.target.closest('[role="option"]');
  if (!option) return;
  moveTo(Number(option.dataset.row));
  open(shown[active].id);
});
list.addEventListener("keydown", (event) => {
  if (event.key in KEYS) moveTo(KEYS[event.key]());
  else if ((event.key === "Enter" || event.key === " ") && active >= 0) open(shown[active].id);
  else return;
  event.preventDefault();
});
find("back").addEventListener("click", () => {
  find("controls").scrollIntoView();
  list.focus({ preventScroll: true });
});
find("across").addEventListener("click", () => {
  const column = find("detail").querySelector("section + section");
  column.scrollIntoView();
  (column.querySelector("a") ?? column).focus({ preventScroll: true });
});
addEventListener("hashchange", show);
find("browser").hidden = false;
refresh();
show();
