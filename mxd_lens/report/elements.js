"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

// Making elements. Strings become text nodes: nothing of the data is ever read as HTML.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣" };

const BREAKS = /([\n\r\t])/, SPACES = /([\n\r\t ])/;

/** Text with signs for line breaks. */
function visible(text, signs = BREAKS) {
  return text.split(signs).filter((part) => part !== "").map((part) =>
    signs.test(part) ? el("span", { class: "sign" }, SIGNS[part]) : part);
}

/** A token by itself: with signs for spaces as well, where it is nothing else. */
const visibleToken = (token) =>
  (token === "" ? ["∅"] : visible(token, token.trim() === "" ? SPACES : BREAKS));

const number = (value, digits = 3) => (value === null ? "–" : String(Number(value.toPrecision(digits))));
const percent = (share) => `${number(share * 100)}%`;

function tokens(changes) {
  if (!changes || !changes.length) return null;
  return el("div", { class: "tokens" }, ...changes.map(([token, change]) =>
    el("span", { class: "token" }, ...visibleToken(token), el("small", {}, (change > 0 ? "+" : "") + number(change, 2)))));
}
