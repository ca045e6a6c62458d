// The answer: both lists, the lines between them, the reasons, and the time in the server.

import { byId, count, el, fill, milliseconds, number, plural, signed, svg } from "./dom.js";
import { remember, titleOf } from "./who.js";

const BRIEF = 2; // reasons in the line of an item; all of them once it is opened
const STAGES = { queue: "waiting", encode: "history", search: "search", signals: "signals", rank: "ranking" };

/** The part of the page with the answer. */
export class Results {
  /** @param {{add: function(string): void, exclude: function(string): void}} actions */
  constructor(actions) {
    this.actions = actions;
    this.open = new Set(); // ids of the items whose reasons are all shown
    this.lines = [];
    const lists = byId("lists");
    for (const type of ["mouseover", "focusin"])
      lists.addEventListener(type, (event) => this.highlight(event.target.closest("li[data-id]")?.dataset.id ?? null));
    lists.addEventListener("mouseleave", () => this.highlight(null));
    lists.addEventListener("focusout", (event) => !lists.contains(event.relatedTarget) && this.highlight(null));
    this.resized = new ResizeObserver(() => this.draw());
    for (const id of ["lists", "retrieved", "final"]) this.resized.observe(byId(id));
  }

  /** No answer: nothing to show. */
  clear() {
    byId("lists").hidden = byId("timing").hidden = true;
  }

  /**
   * @param {object} answer of POST /v1/recommend
   * @param {{name: string, milliseconds: number}[]} stages
   * @param {number} elapsed milliseconds of the request as the browser saw it
   * @param {{info: object, diversity: number}} context
   */
  show(answer, stages, elapsed, { info, diversity }) {
    const { items } = answer;
    const retrieved = answer.retrieved ?? [];
    remember([...retrieved, ...items].map(({ item_id, title }) => ({ item_id, title })));
    const two = info.stages.length > 1;
    this.items = items;
    this.retrieved = two || diversity > 0 ? retrieved : [];
    const before = places();
    byId("lists").hidden = false;
    byId("lists").classList.toggle("single", this.retrieved.length === 0);
    byId("retrieved-box").hidden = byId("lines").hidden = false;
    byId("final-heading").textContent = (two ? "Ranker" : "Retriever") + (diversity > 0 ? ", diversified" : "");
    byId("final-caption").textContent = answer.fallback
      ? `by ${answer.fallback}, for nothing is known of the user`
      : `the final list, by ${two ? "the last stage's score" : "the nearest vectors"}${diversity > 0 ? " and unlike the items above" : ""}`;
    byId("retrieved-caption").textContent = `its first ${retrieved.length}, by its own score`;
    const place = new Map(items.map((item) => [item.item_id, item.rank]));
    this.place = new Map(this.retrieved.map((item) => [item.item_id, item.rank]));
    fill(byId("retrieved"), this.retrieved.map((item) => this.retrievedRow(item, place.get(item.item_id))), byId("results-heading"));
    const widest = Math.max(...items.flatMap((item) => (item.reasons ?? []).map((reason) => Math.abs(reason.effect))), 1e-9);
    fill(byId("final"), items.map((item) => this.finalRow(item, two, widest)), byId("results-heading"));
    this.lines = lines(this.retrieved, items);
    this.draw();
    this.glide(before);
    showTimes(stages, elapsed);
  }

  retrievedRow(item, place) {
    const after = place === undefined ? "left out" : `then ${place}`;
    return el("li", { "data-id": item.item_id, class: place === undefined ? "gone" : null },
      el("span", { class: "rank" }, String(item.rank)),
      el("div", { class: "what" },
        el("span", { class: "title" }, titleOf(item.item_id)),
        el("span", { class: "caption" }, el("span", { class: "score" }, number(item.score)), el("span", {}, after)),
      ),
    );
  }

  finalRow(item, two, widest) {
    const id = item.item_id;
    const title = titleOf(id);
    const reasons = item.reasons ?? [];
    const opened = this.open.has(id);
    const button = (name, label, text, act) =>
      el("button", { type: "button", class: "icon", "data-key": `${name} ${id}`, "aria-label": `${label}: ${title}`, title: label, onclick: act }, text);
    const full = el("div", { class: "why", hidden: !opened }, ...this.why(item, two, widest));
    const toggle = el("button", { type: "button", class: "because", "data-key": `why ${id}`, "aria-expanded": String(opened),
      onclick: () => {
        if (!this.open.delete(id)) this.open.add(id);
        full.hidden = !this.open.has(id);
        toggle.setAttribute("aria-expanded", String(!full.hidden));
      } },
      el("span", { class: "unseen" }, `Why ${title}: `),
      ...(reasons.length ? reasons.slice(0, BRIEF).map((reason) => el("span", { class: "reason" }, `${reason.signal} `, effect(reason.effect))) : ["Details"]));
    return el("li", { "data-id": id, "data-key": `item ${id}` },
      el("span", { class: "rank" }, String(item.rank)),
      el("div", { class: "what" },
        el("span", { class: "title" }, title),
        el("span", { class: "caption" }, this.retrieved.length ? movement(item, this.place.get(id)) : null, el("span", { class: "score" }, number(item.score)), toggle),
      ),
      full,
      el("div", { class: "acts" },
        button("add", "Add to the history", "+", () => this.actions.add(id)),
        button("exclude", "Exclude", "×", () => this.actions.exclude(id)),
      ),
    );
  }

  why(item, two, widest) {
    const scores = el("dl", { class: "facts" }, ...[
      ["item", item.item_id],
      ["score", number(item.score, 4)],
      ...(two ? [["retriever's score", number(item.retriever_score, 4)], ["retriever's place", item.retriever_rank === null || item.retriever_rank === undefined ? "not among its candidates" : count(item.retriever_rank)]] : []),
    ].flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
    const reasons = item.reasons ?? [];
    if (!reasons.length) return [scores];
    const bars = reasons.map((reason) => {
      const bar = el("span", { class: reason.effect < 0 ? "fill down" : "fill up" });
      bar.style.width = `${(Math.abs(reason.effect) / widest) * 50}%`;
      return el("li", {}, el("span", { class: "signal" }, reason.signal), el("span", { class: "track", "aria-hidden": "true" }, bar), effect(reason.effect));
    });
    return [scores, el("p", { class: "caption" }, "What each signal adds to the score, against its mean over the candidates"), el("ul", { class: "bars" }, ...bars)];
  }

  /** Draws the lines between the lists where their rows are now. */
  draw() {
    const canvas = byId("lines");
    const box = canvas.getBoundingClientRect();
    if (byId("lists").hidden || box.width === 0) return;
    const middle = (list) => new Map([...byId(list).children].map((row) => {
      // offsets, for a box would include the transform of a row on its way
      const inset = row.clientTop + parseFloat(getComputedStyle(row).paddingTop);
      return [row.dataset.id, row.offsetTop + inset + row.querySelector(".rank").offsetHeight / 2];
    }));
    const [left, right] = [middle("retrieved"), middle("final")];
    const bottom = box.height - 2;
    canvas.replaceChildren(...this.lines.map(({ id, kind }) => {
      const from = left.get(id) ?? bottom;
      const to = right.get(id) ?? bottom;
      const width = box.width;
      const path = svg("path", { class: kind, d: `M0 ${from}C${width * 0.5} ${from} ${width * 0.5} ${to} ${width} ${to}` });
      path.dataset.id = id;
      return path;
    }));
    this.highlight(this.active ?? null);
  }

  highlight(id) {
    this.active = id;
    byId("lists").classList.toggle("tracing", id !== null);
    for (const node of byId("lists").querySelectorAll("[data-id]")) node.classList.toggle("active", node.dataset.id === id);
  }

  /** Rows that were shown before move to their new places, unless motion is unwelcome. */
  glide(before) {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    const options = { duration: 220, easing: "cubic-bezier(.2, .7, .2, 1)" };
    for (const [key, row] of rows()) {
      const old = before.get(key);
      const shift = old === undefined ? 0 : old - row.offsetTop;
      if (old === undefined) row.animate([{ opacity: 0 }, { opacity: 1 }], options);
      else if (shift) row.animate([{ transform: `translateY(${shift}px)` }, { transform: "none" }], options);
    }
    byId("lines").animate([{ opacity: 0 }, { opacity: 1 }], { ...options, duration: 360 });
  }
}

/** The lines: items of both lists, of the final list alone (enters), and of the retriever's list alone (leaves). */
export function lines(retrieved, items) {
  const first = new Map(retrieved.map((item, n) => [item.item_id, n]));
  const last = new Map(items.map((item, n) => [item.item_id, n]));
  const kind = (id) => {
    if (!first.has(id)) return "enters";
    const step = first.get(id) - last.get(id);
    return step > 0 ? "up" : step < 0 ? "down" : "same";
  };
  const left = retrieved.filter((item) => !last.has(item.item_id)).map((item) => ({ id: item.item_id, kind: "leaves" }));
  return retrieved.length ? [...left, ...items.map((item) => ({ id: item.item_id, kind: kind(item.item_id) }))] : [];
}

/** How an item moved between the lists, as an arrow and in words for who cannot see it. */
function movement(item, place) {
  const mark = (kind, text, words) => el("span", { class: `moved ${kind}` }, el("span", { "aria-hidden": "true" }, text), el("span", { class: "unseen" }, words));
  if (place === undefined) {
    const rank = item.retriever_rank;
    return rank ? mark("enters", `↗ from ${count(rank)}`, `from the retriever's place ${rank}`) : mark("enters", "↗ new", "not a candidate of the retriever");
  }
  const step = place - item.rank;
  if (step === 0) return mark("same", "=", "at the same place");
  return step > 0 ? mark("up", `↑ ${step}`, `up ${step} from place ${place}`) : mark("down", `↓ ${-step}`, `down ${-step} from place ${place}`);
}

const effect = (value) => el("span", { class: value < 0 ? "effect down" : "effect up" }, signed(value));

const rows = () => ["retrieved", "final"].flatMap((list) => [...byId(list).children].map((row) => [`${list} ${row.dataset.id}`, row]));

const places = () => new Map(rows().map(([key, row]) => [key, row.offsetTop]));

/** The time of each stage, as a bar and as numbers. */
function showTimes(stages, elapsed) {
  const total = stages.find((stage) => stage.name === "total");
  const parts = stages.filter((stage) => stage !== total);
  byId("timing").hidden = stages.length === 0;
  const sum = Math.max(total?.milliseconds ?? 0, parts.reduce((all, stage) => all + stage.milliseconds, 0), 1e-9);
  byId("timing-bar").replaceChildren(...parts.map((stage, n) => {
    const segment = el("span", { class: `stage-${n % 5}` });
    segment.style.width = `${(stage.milliseconds / sum) * 100}%`;
    return segment;
  }));
  const fact = (name, value, n) => el("div", {}, el("dt", { class: n === undefined ? null : `stage-${n % 5}` }, name), el("dd", {}, milliseconds(value)));
  byId("timing-list").replaceChildren(
    ...parts.map((stage, n) => fact(STAGES[stage.name] ?? stage.name, stage.milliseconds, n)),
    ...(total ? [fact("in all", total.milliseconds)] : []),
    fact("seen from here", elapsed),
  );
}

/** One sentence about an answer. */
export function summary(answer, stages) {
  const total = stages.find((stage) => stage.name === "total");
  const made = answer.user_id === null || answer.user_id === undefined ? "" : ` of user ${answer.user_id}`;
  const time = total ? `, in ${milliseconds(total.milliseconds)}` : "";
  if (!answer.items.length) return "No item is left: the filters, exclusions and seen items leave none. Remove one of them.";
  return `${plural(answer.items.length, "item")} after ${plural(answer.known_events, "event")}${made}${time}`;
}
