// What the service runs: the bundle, what it was trained on, and how it was measured.

import { byId, count, el } from "./dom.js";

const TITLES = { hr: "HR", ndcg: "NDCG", mrr: "MRR", recall: "Recall" };
const title = (metric) => metric.replace(/^[a-z]+/, (name) => TITLES[name] ?? name);

/** @param {object} info of GET /v1/info */
export function showAbout(info) {
  byId("tagline").textContent = `${count(info.items)} items · ${info.stages.join(" → ")} · bundle ${info.bundle.hash}`;
  const facts = [
    ["bundle", [info.bundle.name, info.bundle.hash]],
    ["made", [info.bundle.created]],
    ["items", [count(info.items)]],
    ["stages", [info.stages.join(" → ")]],
    ["request time", [info.request_time === "none" ? "not read by the retriever" : `read by the retriever (${info.request_time})`]],
    ...(info.actions?.length ? [["actions", [info.actions.join(", ")]]] : []),
    ["features", [(info.features ?? []).map((feature) => feature.name).join(", ") || "none declared"]],
    ...Object.entries(flat(info.protocol ?? {})).map(([name, value]) => [name.replaceAll("_", " "), [value]]),
    ["version", [`${info.name} ${info.version}`]],
  ];
  byId("about-list").replaceChildren(
    ...facts.map(([name, values]) => el("div", {}, el("dt", {}, name), el("dd", {}, values.filter(Boolean).join(" · ")))),
  );
  showMetrics(info.metrics);
  byId("about").hidden = false;
}

/** {a: {b: 1}} as {"a b": "1"}; empty values are left out. */
function flat(value, name = "") {
  if (value === null || value === undefined) return {};
  if (typeof value !== "object" || Array.isArray(value)) return { [name]: [value].flat().join(", ") };
  return Object.assign({}, ...Object.entries(value).map(([part, inner]) => flat(inner, name ? `${name} ${part}` : part)));
}

function showMetrics(metrics) {
  const models = Object.entries(metrics ?? {}).filter(([, values]) => values && typeof values === "object");
  byId("metrics-box").hidden = models.length === 0;
  if (!models.length) return;
  const names = Object.keys(models[0][1]);
  byId("metrics-head").replaceChildren(el("tr", {}, el("th", { scope: "col" }, "stage"), ...names.map((name) => el("th", { scope: "col" }, title(name)))));
  byId("metrics-body").replaceChildren(...models.map(([model, values]) =>
    el("tr", {}, el("th", { scope: "row" }, model.replaceAll("_", " ")), ...names.map((name) => el("td", {}, ...cell(values[name]))))));
}

function cell(value) {
  if (value === null || value === undefined) return ["–"];
  if (typeof value === "number") return [value.toFixed(4)];
  const interval = value.low === undefined || value.low === null ? null : el("span", { class: "caption" }, ` ${value.low.toFixed(4)} to ${value.high.toFixed(4)}`);
  return [value.value.toFixed(4), interval].filter((part) => part !== null);
}
