// What the service runs: the bundle, what it was trained on, and how it was measured.

import { byId, count, el, moment } from "./dom.js";

const TITLES = { hr: "HR", ndcg: "NDCG", mrr: "MRR", recall: "Recall" };
const title = (metric) => metric.replace(/^[a-z]+/, (name) => TITLES[name] ?? name);

/** @param {object} info of GET /v1/info */
export function showAbout(info) {
  byId("tagline").textContent = `${count(info.items)} items · ${info.stages.join(" → ")} · bundle ${info.bundle.hash}`;
  const protocol = Object.entries(flat(info.protocol ?? {})).filter(([name]) => !(name in info));
  const facts = [
    ["bundle", [info.bundle.path, info.bundle.hash]],
    ["made", [info.bundle.created && moment(Date.parse(info.bundle.created) / 1000)]],
    ["items", [count(info.items)]],
    ["stages", [info.stages.join(" → ")]],
    ["candidates of the ranker", [info.stages.length > 1 && info.candidates && count(info.candidates)]],
    ["newest events read", [info.max_length && count(info.max_length)]],
    ["newest training event", [info.has_time && info.newest_time && moment(info.newest_time)]],
    ["request time", [info.request_time === "none" ? "not read by the retriever" : "read by the retriever"]],
    ["actions", [info.actions?.join(", ")]],
    ["item features", [(info.features ?? []).map((feature) => feature.name).join(", ") || "none declared"]],
    ...protocol.map(([name, value]) => [name.replaceAll("_", " "), [value]]),
    ["version", [`${info.name} ${info.version}`]],
  ].map(([name, values]) => [name, values.filter(Boolean).join(" · ")]);
  byId("about-list").replaceChildren(
    ...facts.filter(([, value]) => value).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
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
  const intervals = models.some(([, values]) => Object.values(values).some((value) => (value?.low ?? null) !== null));
  byId("metrics-caption").textContent = `Measured offline, on the test set${intervals ? ", with 95 % intervals" : ""}`;
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
