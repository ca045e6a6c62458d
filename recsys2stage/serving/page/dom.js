// Building elements and numbers. Data reach the document as text nodes and attributes only, never as markup.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** Makes an element: `on...` attributes are listeners, null and false leave an attribute out. Children are nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Makes an SVG element. */
export function svg(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  return node;
}

/**
 * Replaces the children of a node. Keyboard focus inside stays on the control with the same data-key ("kind id"); if
 * that is gone, it goes to the control of its kind that took its place, else to `fallback`.
 */
export function fill(node, children, fallback = null) {
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  const key = focused?.dataset.key ?? "";
  const alike = () => [...node.querySelectorAll("[data-key]")].filter((other) => other.dataset.key.split(" ")[0] === key.split(" ")[0]);
  const at = alike().indexOf(focused);
  node.replaceChildren(...children);
  if (!focused) return;
  const now = alike();
  const next = now.find((other) => other.dataset.key === key) ?? now[Math.min(at, now.length - 1)];
  (next && !next.disabled ? next : fallback)?.focus();
}

/** A number with a true minus sign; scores need few digits, but small ones more. */
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return value.toFixed(digits).replace("-", "−");
}

/** A signed number: +0.31, −0.02. */
export const signed = (value, digits = 2) => (value >= 0 ? "+" : "") + number(value, digits);

/** 12,345. */
export const count = (value) => value.toLocaleString("en");

/** "1 event", "2 events". */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Seconds since 1970 as "2015-03-31 06:40". */
export function moment(seconds) {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? String(seconds) : date.toISOString().slice(0, 16).replace("T", " ");
}

/** Milliseconds: 0.12 ms, 6.1 ms, 120 ms. */
export const milliseconds = (value) => `${value < 1 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : Math.round(value)} ms`;
