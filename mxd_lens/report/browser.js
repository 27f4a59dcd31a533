const PAGE = 200; // rows of the list that are made at a time
const BEFORE = 24, AFTER = 12; // tokens shown around the one that fires

// What is known of an expert

const { experts } = data;
const byId = new Map(experts.map((expert) => [expert.id, expert]));
const probesOf = new Map(); // id: [{of: class, rank, n: features of the smallest probe, f1}]
for (const of of data.classes) {
  for (const [id, rank, n, f1] of of.experts) {
    if (!probesOf.has(id)) probesOf.set(id, []);
    probesOf.get(id).push({ of, rank, n, f1 });
  }
}
const alone = (probe) => probe.f1 - probe.n; // F1 is at most 1: fewest features first
for (const probes of probesOf.values()) probes.sort((a, b) => alone(b) - alone(a));

const nearby = ([text, position]) => data.texts[text].slice(Math.max(0, position - BEFORE), position + AFTER + 1);
const isTop = (context) => context[3] === 1;
const firing = ([text, position]) => data.texts[text][position];

const haystacks = new Map();

/** What of an expert is searched: name, label, promoted tokens, strongest contexts. */
function haystack(expert) {
  if (!haystacks.has(expert.id)) {
    const promoted = (expert.promoted || []).map(([token]) => token);
    const contexts = expert.contexts.filter(isTop).map((context) => nearby(context).join(""));
    haystacks.set(expert.id, [expert.name, expert.label?.[0], ...promoted, ...contexts].join("\n").toLowerCase());
  }
  return haystacks.get(expert.id);
}

const isNumberOf = (word, expert) => word.replace(/^#/, "") === String(expert.id);
const matches = (expert, words) =>
  words.every((word) => isNumberOf(word, expert) || haystack(expert).includes(word));

// The list

const search = find("search"), order = find("order"), classes = find("class"), list = find("list");
let shown = []; // the experts that match, in order
let made = 0; // how many of them have a row
let active = -1; // the row the arrow keys are at
let rankOf = new Map(); // in the chosen class

const ORDERS = { // the largest comes first, null last
  meaningful: (expert) => (expert.meaningful ? 3 : 0) + (expert.coherence ?? -1),
  coherence: (expert) => expert.coherence,
  agreement: (expert) => expert.agreement,
  density: (expert) => expert.density,
  rare: (expert) => -expert.density,
  mean: (expert) => expert.mean,
  probe: (expert) => (probesOf.has(expert.id) ? alone(probesOf.get(expert.id)[0]) : null),
  id: (expert) => -expert.id,
  rank: (expert) => -rankOf.get(expert.id),
};

function refresh() {
  const words = search.value.toLowerCase().split(/\s+/).filter((word) => word);
  const chosen = classes.value === "" ? null : data.classes[classes.value];
  rankOf = new Map((chosen ? chosen.experts : []).map(([id], i) => [id, i]));
  const key = ORDERS[order.value];
  shown = experts
    .filter((expert) => (!chosen || rankOf.has(expert.id)) && matches(expert, words))
    .map((expert) => [key(expert) ?? -Infinity, expert])
    .sort(([a], [b]) => (a < b) - (a > b))
    .map(([, expert]) => expert);
  if (words.length === 1) {
    const exact = shown.findIndex((expert) => isNumberOf(words[0], expert));
    if (exact > 0) shown.unshift(...shown.splice(exact, 1));
  }
  made = 0;
  active = -1;
  list.replaceChildren();
  list.removeAttribute("aria-activedescendant");
  find("scroll").scrollTop = 0;
  more();
  const dead = chosen ? chosen.experts.filter(([id]) => !byId.has(id)).length : 0;
  find("status").textContent =
    `${shown.length.toLocaleString("en")} of ${experts.length.toLocaleString("en")} experts`
    + (dead ? `; ${dead} of the class fired nowhere here` : "");
}

function more() {
  const next = shown.slice(made, made + PAGE);
  list.append(...next.map((expert, i) => row(expert, made + i)));
  made += next.length;
  find("more").hidden = made >= shown.length;
  find("more").textContent = `Show more (${(shown.length - made).toLocaleString("en")} left)`;
}

function row(expert, i) {
  const probe = (probesOf.get(expert.id) || [])[0];
  const small = [
    expert.meaningful ? "meaningful" : null,
    `fires on ${percent(expert.density)}`,
    expert.coherence === null ? null : `coherence ${number(expert.coherence, 2)}`,
    order.value === "agreement" ? `agreement ${number(expert.agreement, 4)}` : null,
    order.value === "mean" ? `mean ${number(expert.mean, 2)}` : null,
    probe ? `F1 ${number(probe.f1, 2)}${probe.n > 1 ? ` of ${probe.n}` : ""}` : null,
  ];
  return el("li", { role: "option", id: `option-${expert.id}`, "data-row": i, "aria-selected": expert.id === selected() },
    el("span", { class: "id" }, `#${expert.id}`), nameOf(expert), labelOf(expert),
    el("span", { class: "small" }, small.filter((part) => part).join(" · ")));
}

/** Its name, or else what it fires on most strongly. */
function nameOf(expert) {
  if (expert.name) return el("span", { class: "name" }, expert.name);
  const token = expert.contexts.length ? firing(expert.contexts[0]) : "";
  return el("span", { class: "name none" }, "on “", ...visibleToken(token.trim() || token), "”");
}

/** Its label, where that is another name, and how well that tells its contexts. */
function labelOf({ name, label }) {
  if (!label) return null;
  const shown = label[0] && label[0] !== name ? [label[0]] : [];
  return el("span", { class: "small" }, [...shown, `detection F1 ${number(label[1], 2)}`].join(" · "));
}

function moveTo(i) {
  if (!shown.length) return;
  i = Math.max(0, Math.min(i, shown.length - 1));
  while (made <= i) more();
  if (list.children[active]) list.children[active].classList.remove("active");
  active = i;
  const option = list.children[active];
  option.classList.add("active");
  option.scrollIntoView({ block: "nearest" });
  list.setAttribute("aria-activedescendant", option.id);
}

// The expert that is open is the one in the address.

function selected() {
  const found = /^#expert-(\d+)$/.exec(location.hash);
  return found ? Number(found[1]) : null;
}

const link = (id) => `#expert-${id}`;

function open(id) {
  if (selected() === id) show();
  else location.hash = link(id);
}

function show() {
  const id = selected();
  for (const option of list.querySelectorAll('[aria-selected="true"]')) option.setAttribute("aria-selected", false);
  if (id === null) return;
  const option = find(`option-${id}`);
  if (option) option.setAttribute("aria-selected", true);
  const detail = find("detail");
  const within = detail.contains(document.activeElement);
  const expert = byId.get(id);
  detail.replaceChildren(...(expert ? describe(expert) : [el("p", {}, `Expert ${id} fired nowhere in these texts.`)]));
  find("back").hidden = false;
  if (within && expert) detail.querySelector("h3").focus({ preventScroll: true });
  const narrow = matchMedia("(max-width: 700px)").matches;
  const { top } = detail.getBoundingClientRect();
  if (narrow || top < 0 || top > innerHeight / 2) find(narrow ? "back" : "browser").scrollIntoView();
}

// One expert

function describe(expert) {
  const probes = probesOf.get(expert.id) || [];
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
    el("h3", { tabindex: "-1" }, el("span", { class: "id" }, `#${expert.id}`), nameOf(expert), labelOf(expert)),
    el("dl", { class: "numbers" }, ...numbers.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    ...part("Strongest contexts", expert.contexts.filter(isTop).map((context) => contextRow(context, expert))),
    el("div", { class: "columns" },
      box("Promotes", tokens(expert.promoted)),
      box("Suppresses", tokens(expert.suppressed)),
      box("Activation where it fires", histogram(expert)),
      box("Probe classes that chose it", probes.length ? el("ul", {}, ...probes.map(probeRow)) : null),
      box("Nearest by weights (cosine)", links(expert.nearest)),
      box("Most often active with (Jaccard)", links(expert.coactive))),
    ...[...lower].flatMap(([quantile, contexts]) =>
      part(`Contexts at the ${number(quantile * 100)}% quantile of its activation`,
        contexts.map((context) => contextRow(context, expert)))),
    ...part("Steered sample", expert.sample ? [el("p", { class: "sample" }, expert.sample)] : []),
  ];
}

const part = (title, children) => (children.length ? [el("h4", {}, title), ...children] : []);
const box = (title, child) => (child ? el("div", {}, el("h4", {}, title), child) : null);

function contextRow(context, expert) {
  const [text, position, value] = context;
  const words = data.texts[text];
  const shade = expert.max > 0 ? Math.min(1, value / expert.max) : 0;
  const body = el("div", { class: "text", dir: "auto" });
  const button = el("button", { type: "button", "aria-label": "Whole text", title: "Whole text" }, "⋯");
  const write = (whole) => {
    const start = whole ? 0 : Math.max(0, position - BEFORE);
    const end = whole ? words.length : Math.min(words.length, position + AFTER + 1);
    const mark = el("mark", { title: `activation ${number(value)}` }, ...visibleToken(words[position]));
    mark.style.backgroundColor = `rgba(255, 179, 0, ${0.15 + 0.5 * shade})`;
    body.replaceChildren(
      ...(start > 0 ? [el("span", { class: "sign" }, "… ")] : []),
      ...visible(words.slice(start, position).join("")), mark,
      ...visible(words.slice(position + 1, end).join("")),
      ...(end < words.length ? [el("span", { class: "sign" }, " …")] : []));
    button.setAttribute("aria-expanded", whole);
  };
  write(false);
  button.addEventListener("click", () => write(button.getAttribute("aria-expanded") === "false"));
  const cut = nearby(context).length < words.length;
  return el("div", { class: "context" }, el("span", { class: "value" }, number(value)), body, cut ? button : null);
}

function links(others) {
  if (!others || !others.length) return null;
  return el("ul", {}, ...others.map(([id, value]) => el("li", {},
    byId.has(id) ? el("a", { href: link(id) }, `#${id} `, nameOf(byId.get(id))) : `#${id}`,
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
find("more").addEventListener("click", more);
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
addEventListener("hashchange", show);
find("browser").hidden = false;
refresh();
show();
