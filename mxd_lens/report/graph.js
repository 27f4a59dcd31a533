const GAP = 15, ROW = 34, LEFT = 70, SHOWN = 60; // pixels; edges drawn and listed at most, each way

// What is known of a node

const nodes = data.nodes.map((node, i) => ({ ...node, i, inputs: [], outputs: [] }));
for (const [source, target, weight] of data.links) {
  nodes[target].inputs.push({ other: nodes[source], weight });
  nodes[source].outputs.push({ other: nodes[target], weight });
}
for (const { inputs, outputs } of nodes) {
  for (const edges of [inputs, outputs]) edges.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}
const word = (position) => data.words[position];
const expertOf = (node) => data.experts[`${node.layer}:${node.unit}`];
const KINDS = { expert: "expert", error: "error", token: "token", target: "prediction" };

/** What it is, in words. */
function title(node) {
  if (node.kind === "token") return `token “${word(node.position)}”`;
  if (node.kind === "target") return `“${node.name}”, predicted`;
  const at = `at “${word(node.position)}”`;
  if (node.kind === "error") return `error of layer ${node.layer} ${at}`;
  return `${node.layer}#${node.unit} ${node.name ? `${node.name} ` : ""}${at}`;
}

function haystack(node) {
  const promoted = ((expertOf(node) || {}).promoted || []).map(([token]) => token);
  return [title(node), KINDS[node.kind], ...promoted].join("\n").toLowerCase();
}

// Where it is: tokens below, what is predicted above, layers in between.

const rows = [...new Set(nodes.map((node) => node.row))].sort((a, b) => b - a);
const cells = new Map();
for (const node of nodes) {
  const key = `${node.row}:${node.position}`;
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(node);
}
const widths = data.words.map((text, position) => {
  const most = Math.max(...rows.map((row) => (cells.get(`${row}:${position}`) || []).length));
  return Math.max(most * GAP + GAP, Math.min(text.length, 12) * 7 + 14);
});
const starts = [LEFT];
for (const width of widths) starts.push(starts.at(-1) + width);
for (const cell of cells.values()) {
  cell.sort((a, b) => a.influence - b.influence).forEach((node, i) => {
    const middle = (starts[node.position] + starts[node.position + 1]) / 2;
    node.x = middle + (i - (cell.length - 1) / 2) * GAP;
    node.y = ROW * (rows.indexOf(node.row) + 0.5);
  });
}
const height = ROW * (rows.length + 1), width = starts.at(-1) + GAP;
const nameOfRow = { [rows[0]]: "predicts", [rows.at(-1)]: "token" };

function shape(node) {
  const { x, y } = node, size = 5;
  const named = node.kind === "expert" && node.name ? " named" : "";
  const kind = { token: "token-node" }[node.kind] || node.kind;
  const drawn = {
    class: `node ${kind}${named}`, tabindex: "-1", role: "button", "aria-pressed": "false", "aria-label": title(node),
  };
  const label = svg("title", {}, title(node));
  if (node.kind === "expert") return svg("circle", { ...drawn, cx: x, cy: y, r: size }, label);
  const turn = node.kind === "error" ? { transform: `rotate(45 ${x} ${y})` } : {};
  return svg("rect", { ...drawn, ...turn, x: x - size, y: y - size, width: 2 * size, height: 2 * size }, label);
}

const lines = rows.map((row, i) => svg("line", { class: "line", x1: LEFT, x2: width, y1: ROW * (i + 1), y2: ROW * (i + 1) }));
const layers = rows.map((row, i) => svg("text", { class: "layers", x: 4, y: ROW * (i + 0.5) + 4 }, nameOfRow[row] || `layer ${row}`));
const words = data.words.map((text, position) => {
  const shown = text.trim().length > 12 ? `${text.trim().slice(0, 11)}…` : text.trim() || "␣";
  const at = { class: "words", x: (starts[position] + starts[position + 1]) / 2, y: ROW * rows.length + 16, "text-anchor": "middle" };
  return svg("text", at, shown.replace(/[\n\r\t]/g, (sign) => SIGNS[sign]), svg("title", {}, text));
});
const edges = svg("g", {});
const drawn = nodes.map(shape);
find("graph").append(svg("svg",
  { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": "Attribution graph" },
  ...lines, ...layers, ...words, edges, ...drawn));

/** A curve from source to target, as thick as the edge is strong beside the strongest of the node's. */
function curve(source, target, weight, strongest) {
  const middle = (source.y + target.y) / 2;
  const path = `M${source.x},${source.y} C${source.x},${middle} ${target.x},${middle} ${target.x},${target.y}`;
  const share = Math.abs(weight) / strongest;
  return svg("path", {
    class: `edge${weight < 0 ? " minus" : ""}`, d: path, "stroke-width": 0.5 + 4 * share, opacity: 0.25 + 0.65 * share,
  });
}

function drawEdges(node) {
  const shown = node ? [node.inputs.slice(0, SHOWN), node.outputs.slice(0, SHOWN)] : [[], []];
  const strongest = (edges) => Math.abs(edges[0]?.weight || 1);
  edges.replaceChildren(
    ...shown[0].map(({ other, weight }) => curve(other, node, weight, strongest(shown[0]))),
    ...shown[1].map(({ other, weight }) => curve(node, other, weight, strongest(shown[1]))));
  const near = new Set([node, ...shown.flat().map(({ other }) => other)]);
  nodes.forEach((each, i) => {
    drawn[i].classList.toggle("faint", Boolean(node) && !near.has(each));
    drawn[i].classList.toggle("near", Boolean(node) && near.has(each));
  });
}

// The node that is chosen is the one in the address.

let chosen = null;

function choose(node) {
  if (chosen) drawn[chosen.i].setAttribute("aria-pressed", "false");
  chosen = node;
  drawn[node.i].setAttribute("aria-pressed", "true");
  stop(node);
  drawEdges(node);
  find("detail").replaceChildren(...describe(node));
  history.replaceState(null, "", `#${node.id}`);
}

/** The one node that the tab key stops at. */
function stop(node) {
  for (const other of drawn) other.setAttribute("tabindex", "-1");
  drawn[node.i].setAttribute("tabindex", "0");
}

function describe(node) {
  const expert = node.kind === "expert" ? expertOf(node) : undefined;
  const value = { expert: "activation", target: "probability" }[node.kind];
  const numbers = [
    ...(value ? [[value, number(node.value)]] : []),
    ...(node.influence === null ? [] : [["among the first", `${percent(node.influence)} of influence`]]),
    ...(expert ? [["fires on", `${percent(expert.density)} of tokens`]] : []),
  ];
  return [
    el("h3", { dir: "auto" }, ...visible(title(node))),
    el("dl", { class: "numbers" }, ...numbers.map(([name, of]) => el("div", {}, el("dt", {}, name), el("dd", {}, of)))),
    ...list("Adds up", node.inputs), ...list("Adds to", node.outputs),
    ...(expert ? describeExpert(expert) : []),
    ...(node.kind === "expert" && !expert ? [el("p", {}, "Not described yet: ",
      el("code", {}, `mxd-lens experts ${data.folders[node.layer]}`))] : []),
  ];
}

function list(name, edges) {
  if (!edges.length) return [];
  const more = edges.length > SHOWN ? `, the strongest ${SHOWN} of ${edges.length}` : "";
  return [el("h4", {}, name + more), el("ul", { class: "scroll" }, ...edges.slice(0, SHOWN).map(({ other, weight }) => {
    const button = el("button", { type: "button" },
      el("span", { class: `weight${weight < 0 ? " minus" : ""}` }, (weight > 0 ? "+" : "") + number(weight)),
      el("span", { dir: "auto" }, ...visible(title(other))));
    button.addEventListener("click", () => { choose(other); drawn[other.i].focus(); });
    button.addEventListener("mouseenter", () => drawn[other.i].classList.remove("faint"));
    return el("li", {}, button);
  }))];
}

function describeExpert(expert) {
  const box = (name, child) => (child ? [el("h4", {}, name), child] : []);
  const contexts = expert.contexts.map(([before, token, after, value]) => el("div", { class: "context" },
    el("span", { class: "value" }, number(value)),
    el("div", { class: "text", dir: "auto" }, ...visible(before), el("mark", {}, ...visibleToken(token)), ...visible(after))));
  return [
    ...box("Promotes", tokens(expert.promoted)), ...box("Suppresses", tokens(expert.suppressed)),
    ...(contexts.length ? [el("h4", {}, "Strongest contexts"), ...contexts] : []),
  ];
}

// Moving by keys: along a row, or to the nearest node of the next one.

function neighbour(node, key) {
  const along = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (along) {
    const row = nodes.filter((other) => other.row === node.row).sort((a, b) => a.x - b.x);
    return row[row.indexOf(node) + along];
  }
  const next = { ArrowUp: -1, ArrowDown: 1 }[key];
  if (!next) return undefined;
  const row = rows[rows.indexOf(node.row) + next];
  return nodes.filter((other) => other.row === row).sort((a, b) => Math.abs(a.x - node.x) - Math.abs(b.x - node.x))[0];
}

nodes.forEach((node, i) => {
  drawn[i].addEventListener("click", () => choose(node));
  drawn[i].addEventListener("mouseenter", () => drawEdges(node));
  drawn[i].addEventListener("mouseleave", () => drawEdges(chosen));
  drawn[i].addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") choose(node);
    const other = neighbour(node, event.key);
    if (other) { stop(other); drawn[other.i].focus(); }
    if (other || event.key === "Enter" || event.key === " ") event.preventDefault();
  });
});

find("search").addEventListener("input", () => {
  const wanted = find("search").value.toLowerCase().split(/\s+/).filter((part) => part);
  const found = nodes.filter((node, i) => {
    const fits = wanted.every((part) => haystack(node).includes(part));
    drawn[i].classList.toggle("missed", !fits);
    return fits;
  });
  find("status").textContent = wanted.length ? `${found.length} of ${nodes.length} nodes` : "";
});

const asked = nodes.find((node) => `#${node.id}` === location.hash);
choose(asked || nodes.find((node) => node.kind === "target"));
find("graph").scrollLeft = find("graph").scrollWidth;
