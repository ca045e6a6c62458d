// The options of a request: how many, when, how diverse, and which items are allowed.

import { byId, count, el, fill } from "./dom.js";
import { titleOf } from "./who.js";

const CHIPS = 40; // values of a feature that are all shown; of more, one types
const KINDS = { any: "any of", all: "all of", none: "none of" };

/** The part of the page with the options. */
export class Options {
  /** @param {{state: object, info: object, changed: function(number=): void}} page */
  constructor(page) {
    this.page = page;
    const { state } = page;
    const changed = (wait) => {
      this.render();
      page.changed(wait);
    };
    this.changed = changed;
    byId("k").addEventListener("input", (event) => {
      if (!event.target.checkValidity() || event.target.value === "") return; // the field says what is wrong
      page.state.k = Number(event.target.value);
      page.changed(250);
    });
    byId("k").addEventListener("change", (event) => {
      if (event.target.value === "") event.target.value = page.state.k;
      event.target.reportValidity();
    });
    byId("diversity").addEventListener("input", (event) => {
      page.state.diversity = Number(event.target.value);
      changed(100);
    });
    byId("time").addEventListener("change", (event) => {
      const seconds = Math.floor(Date.parse(`${event.target.value}Z`) / 1000);
      page.state.time = Number.isFinite(seconds) ? seconds : null;
      changed();
    });
    byId("now").addEventListener("click", () => {
      page.state.time = null;
      changed();
      byId("time").focus();
    });
    byId("action").addEventListener("change", (event) => {
      page.state.action = event.target.value || null;
      changed();
    });
    byId("seen").addEventListener("change", (event) => {
      page.state.seen = event.target.value || null;
      changed();
    });
    byId("explain").addEventListener("change", (event) => {
      page.state.explain = event.target.checked;
      changed();
    });
    byId("filters-box").open = Object.keys(state.filters).length > 0;
  }

  /** Offers what the bundle knows. */
  start() {
    const { info, state } = this.page;
    byId("k").max = Math.min(info.limits?.max_k ?? 100, info.items);
    byId("time-row").hidden = !info.has_time;
    byId("action-row").hidden = info.next_action === "none" || !info.actions?.length;
    byId("action").replaceChildren(
      el("option", { value: "" }, "default"),
      ...(info.actions ?? []).map((name) => el("option", { value: name }, name)),
    );
    byId("filters-box").hidden = !info.features?.length;
    byId("filters").replaceChildren(...(info.features ?? []).map((feature, n) => this.feature(feature, n)));
    byId("filters-box").open = Object.keys(state.filters).length > 0;
    this.render();
  }

  render() {
    const { state } = this.page;
    if (document.activeElement !== byId("k")) byId("k").value = String(state.k);
    byId("diversity").value = String(state.diversity);
    byId("diversity-value").textContent = state.diversity === 0 ? "off" : state.diversity.toFixed(2);
    byId("time").value = state.time === null ? "" : new Date(state.time * 1000).toISOString().slice(0, 19);
    byId("now").hidden = state.time === null;
    byId("action").value = state.action ?? "";
    byId("seen").value = state.seen ?? "";
    byId("explain").checked = state.explain;
    const active = Object.values(state.filters).filter((filter) => !filter.values || filter.values.length).length;
    byId("filters-count").textContent = active ? `${active} set` : "";
    byId("excluded-box").hidden = state.exclude.length === 0;
    fill(
      byId("excluded"),
      state.exclude.map((id) => chip(titleOf(id), () => {
        state.exclude = state.exclude.filter((other) => other !== id);
        this.changed();
      })),
      byId("results-heading"),
    );
  }

  /** Leaves an item out. */
  exclude(id) {
    if (!this.page.state.exclude.includes(id)) this.page.state.exclude.push(id);
    this.changed();
  }

  feature(feature, n) {
    return feature.kind === "numeric" ? this.range(feature, n) : this.choice(feature, n);
  }

  range(feature, n) {
    const { state } = this.page;
    const end = (name, label, hint) => {
      const input = el("input", { type: "number", step: "any", placeholder: hint ?? "", "aria-label": `${feature.name}, ${label}`, oninput: () => {
        const filter = { min: null, max: null, ...state.filters[feature.name] };
        filter[name] = input.value === "" ? null : Number(input.value);
        if (filter.min === null && filter.max === null) delete state.filters[feature.name];
        else state.filters[feature.name] = filter;
        this.changed(250);
      } });
      input.value = state.filters[feature.name]?.[name] ?? "";
      return input;
    };
    return el("fieldset", { id: `filter-${n}` },
      el("legend", {}, feature.name),
      el("div", { class: "row" }, end("min", "at least", feature.min), el("span", { "aria-hidden": "true" }, "to"), end("max", "at most", feature.max)),
    );
  }

  choice(feature, n) {
    const { state } = this.page;
    const values = feature.values ?? [];
    const chosen = () => state.filters[feature.name]?.values ?? [];
    const mode = el("select", { "aria-label": `How ${feature.name} is filtered` },
      ...Object.entries(KINDS).filter(([kind]) => kind !== "all" || feature.kind === "multi").map(([kind, label]) => el("option", { value: kind }, label)));
    mode.value = state.filters[feature.name]?.mode ?? "any";
    const set = (next) => {
      if (next.length) state.filters[feature.name] = { mode: mode.value, values: next };
      else delete state.filters[feature.name];
      this.changed();
    };
    mode.addEventListener("change", () => chosen().length && set(chosen()));
    const body = values.length <= CHIPS && values.length === (feature.count ?? values.length) ? this.boxes(values, chosen, set) : this.typed(feature, values, chosen, set, n);
    return el("fieldset", { id: `filter-${n}` }, el("legend", {}, feature.name), mode, body);
  }

  boxes(values, chosen, set) {
    return el("div", { class: "chips" }, ...values.map((value) => {
      const box = el("input", { type: "checkbox", onchange: () =>
        set(box.checked ? [...chosen(), value] : chosen().filter((other) => other !== value)) });
      box.checked = chosen().includes(value);
      return el("label", { class: "chip" }, box, el("span", {}, value));
    }));
  }

  typed(feature, values, chosen, set, n) {
    const list = el("datalist", { id: `values-${n}` });
    const chips = el("ul", { class: "chips", "aria-label": `${feature.name}, chosen` });
    const render = () => fill(chips, chosen().map((value) => chip(value, () => {
      set(chosen().filter((other) => other !== value));
      render();
    })), input);
    const all = feature.count ?? values.length; // the service lists the first; it knows the others, too
    const takes = (value) => value !== "" && (all > values.length || values.includes(value));
    const input = el("input", {
      list: list.id, autocomplete: "off", "aria-label": `Add a value of ${feature.name}`, placeholder: `one of ${count(all)}`,
      oninput: (event) => {
        const typed = input.value.toLowerCase();
        list.replaceChildren(...values.filter((value) => value.toLowerCase().includes(typed)).slice(0, CHIPS).map((value) => el("option", { value })));
        if (event.inputType !== "insertText" && values.includes(input.value)) add(); // taken from the suggestions
      },
      onchange: () => takes(input.value) && add(),
    });
    const add = () => {
      if (!chosen().includes(input.value)) set([...chosen(), input.value]);
      input.value = "";
      render();
    };
    render();
    return el("div", { class: "typed" }, input, list, chips);
  }
}

/** Something chosen, with a button that takes it away. */
function chip(text, remove) {
  return el("li", { class: "chip" }, el("span", {}, text), el("button", { type: "button", class: "icon", "data-key": `chip ${text}`, "aria-label": `Remove ${text}`, onclick: remove }, "×"));
}
