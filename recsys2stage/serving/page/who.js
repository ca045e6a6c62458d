// For whom to recommend: a history clicked together, or a known user.

import { call } from "./api.js";
import { byId, count, el, fill, moment, plural } from "./dom.js";
import { eventTimes } from "./state.js";

const HITS = 30; // titles shown of a search
const EVENTS = 200; // events shown of a known user
const PAGE = 100; // of a request for events or users

/** The titles and features of items met so far, by id. */
export const known = new Map();

/** Remembers the items of an answer. */
export function remember(items) {
  for (const item of items) known.set(item.item_id, { ...known.get(item.item_id), ...item });
}

/** The title of an item, or its id. */
export const titleOf = (id) => known.get(id)?.title || id;

/** The declared features of an item in one line. */
export function featureLine(id) {
  const values = Object.values(known.get(id)?.features ?? {}).flat();
  return values.filter((value) => value !== null && value !== "").join(" · ");
}

/** The part of the page that says for whom. */
export class Who {
  /** @param {{state: object, info: object, changed: function(): void, failed: function(Error): void}} page */
  constructor(page) {
    this.page = page;
    this.search = null; // the AbortController of the search under way
    this.hits = [];
    for (const radio of document.querySelectorAll("input[name=mode]"))
      radio.addEventListener("change", () => {
        page.state.mode = radio.value;
        this.render();
        page.changed();
      });
    const search = byId("search");
    search.addEventListener("input", () => this.find());
    search.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") {
        event.preventDefault();
        this.addFirst();
      }
      if (event.key === "ArrowDown") {
        event.preventDefault();
        byId("hits").querySelector("button")?.focus();
      }
    });
    byId("hits").addEventListener("keydown", (event) => moveAmongHits(event));
    byId("history").addEventListener("keydown", (event) => this.moveByKey(event));
    byId("clear").addEventListener("click", () => {
      page.state.history = [];
      this.edited();
      search.focus();
    });
    byId("gap").addEventListener("change", (event) => {
      page.state.gap = Number(event.target.value);
      this.edited();
    });
    byId("user").addEventListener("change", (event) => this.choose(event.target.value.trim()));
    byId("random").addEventListener("click", () => this.random());
    byId("adopt").addEventListener("click", async () => (await this.adopt()) && search.focus());
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest("input:not([type=radio], [type=checkbox], [type=range]), textarea, dialog");
      if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey || page.state.mode !== "history") return;
      event.preventDefault();
      search.focus();
    });
  }

  /** Fills what needs the service: popular titles, suggestions of users, titles of what the URL names. */
  async start() {
    await Promise.all([this.find(), this.suggest(), this.name()]);
  }

  async suggest() {
    const { data } = await call(`v1/users?limit=${PAGE}`);
    this.total = data.total;
    byId("users").replaceChildren(...data.users.map((id) => el("option", { value: id })));
    byId("random").disabled = byId("invite-random").disabled = data.total === 0;
    if (data.total === 0) byId("events-caption").textContent = "This service knows no users: it was started without their histories.";
  }

  /** Looks up the titles of history and exclusions that came with the URL. */
  async name() {
    const { state } = this.page;
    const ids = [...state.history.map((event) => event.id), ...state.exclude].filter((id) => !known.has(id));
    if (ids.length) {
      await lookUp(ids);
      this.render();
    }
    if (state.mode === "user" && state.user) await this.load(state.user);
  }

  render() {
    const { state } = this.page;
    for (const radio of document.querySelectorAll("input[name=mode]")) radio.checked = radio.value === state.mode;
    byId("history-panel").hidden = state.mode !== "history";
    byId("user-panel").hidden = state.mode !== "user";
    byId("user").value = state.user;
    this.renderHistory();
  }

  renderHistory() {
    const { state, info } = this.page;
    const { history } = state;
    byId("history-empty").hidden = history.length > 0;
    byId("clear").hidden = history.length === 0;
    byId("gap-row").hidden = !info.has_time || history.every((event) => event.time !== null);
    const gap = byId("gap");
    if (![...gap.options].some((option) => Number(option.value) === state.gap))
      gap.append(el("option", { value: state.gap }, `${count(state.gap)} seconds`));
    gap.value = String(state.gap);
    const times = info.has_time ? eventTimes(state, Math.floor(Date.now() / 1000)) : [];
    const rows = history.map((event, n) => {
      const title = titleOf(event.id);
      const button = (name, label, text, act, disabled) =>
        el("button", { type: "button", class: "icon", "data-key": `${name} ${event.id} ${occurrence(history, n)}`, "aria-label": `${label}: ${title}`, title: label, disabled, onclick: act }, text);
      return el(
        "li",
        {},
        el("span", { class: "what" }, el("span", { class: "title" }, title), el("span", { class: "caption" }, detail(event, times[n]))),
        this.actionOf(event, title),
        button("up", "Move earlier", "↑", () => this.move(n, -1), n === 0),
        button("down", "Move later", "↓", () => this.move(n, 1), n === history.length - 1),
        button("remove", "Remove", "×", () => this.remove(n), false),
      );
    });
    fill(byId("history"), rows, byId("search"));
  }

  /** A choice of the event's action, for models that know actions. */
  actionOf(event, title) {
    const { actions = [] } = this.page.info;
    if (!actions.length) return null;
    const choice = el("select", { "aria-label": `Action: ${title}`, onchange: () => {
      event.action = choice.value || null;
      this.edited();
    } }, el("option", { value: "" }, "–"), ...actions.map((name) => el("option", { value: name }, name)));
    choice.value = event.action ?? "";
    return choice;
  }

  edited() {
    this.renderHistory();
    this.page.changed();
  }

  /** Adds an item as the newest event; to a known user's events, which thereby become a history. */
  async add(id) {
    const { state } = this.page;
    if (state.mode === "user" && !(await this.adopt())) return;
    state.history.push({ id, time: null, rating: null, action: null });
    this.render();
    byId("hits-caption").textContent = `Added ${titleOf(id)}`;
    byId("history").lastElementChild?.scrollIntoView({ block: "nearest" });
    this.page.changed();
  }

  async addFirst() {
    await this.finding;
    if (this.hits.length) this.add(this.hits[0].item_id);
    byId("search").select();
  }

  remove(n) {
    this.page.state.history.splice(n, 1);
    this.edited();
  }

  /** Swaps an event with its neighbor; the times stay where they are, so that they ascend. */
  move(n, step) {
    const { history } = this.page.state;
    const other = n + step;
    if (other < 0 || other >= history.length) return;
    [history[n], history[other]] = [history[other], history[n]];
    [history[n].time, history[other].time] = [history[other].time, history[n].time];
    this.edited();
    const row = byId("history").children[other];
    const name = step < 0 ? "up" : "down";
    const button = row.querySelector(`[data-key^=${name}]`);
    (button.disabled ? row.querySelector("[data-key^=remove]") : button).focus();
  }

  moveByKey(event) {
    if (!event.altKey || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    const row = event.target.closest("li");
    if (!row) return;
    event.preventDefault();
    this.move([...byId("history").children].indexOf(row), event.key === "ArrowUp" ? -1 : 1);
  }

  find() {
    this.finding = this.findNow();
    return this.finding;
  }

  async findNow() {
    this.search?.abort();
    this.search = new AbortController();
    const q = byId("search").value.trim();
    try {
      const { data } = await call(`v1/items?${new URLSearchParams({ q, limit: HITS })}`, { signal: this.search.signal });
      remember(data.items);
      this.hits = data.items;
      const more = data.total > data.items.length ? `, the ${data.items.length} most popular shown` : "";
      byId("hits-caption").textContent = q ? `${plural(data.total, "title")} found${more}` : "Most popular";
      fill(byId("hits"), data.items.map((item) => this.hit(item)), byId("search"));
      byId("hits").scrollTop = 0;
    } catch (error) {
      if (error.name !== "AbortError") this.page.failed(error);
    }
  }

  hit(item) {
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", "data-key": `hit ${item.item_id}`, onclick: () => this.add(item.item_id) },
        el("span", { class: "title" }, titleOf(item.item_id)),
        el("span", { class: "caption" }, featureLine(item.item_id)),
      ),
    );
  }

  /** Takes any known user but the one that is shown. */
  async random() {
    if (!this.total) return;
    try {
      const { data } = await call(`v1/users?limit=2&offset=${Math.floor(Math.random() * Math.max(this.total - 1, 1))}`);
      const others = data.users.filter((id) => id !== this.page.state.user);
      if (data.users.length) this.choose(others.length ? others[Math.floor(Math.random() * others.length)] : data.users[0]);
    } catch (error) {
      this.page.failed(error);
    }
  }

  choose(id) {
    const { state } = this.page;
    [state.mode, state.user] = ["user", id];
    this.render();
    this.load(id).catch((error) => this.page.failed(error));
    this.page.changed();
  }

  /** Shows a known user's events, newest first. */
  async load(id) {
    const list = byId("events");
    byId("adopt").hidden = true;
    if (!id) {
      list.replaceChildren();
      byId("events-caption").textContent = "Name a user, or take one at random.";
      return;
    }
    byId("events-caption").textContent = `Looking up ${id} …`;
    let user;
    try {
      user = await eventsOf(id, EVENTS);
    } catch (error) {
      list.replaceChildren();
      byId("events-caption").textContent = error.detail || error.message;
      if (error.status === 404) return; // the recommendation says so, too
      throw error;
    }
    if (this.page.state.user !== id) return; // another one was chosen meanwhile
    const { events, total } = user;
    const older = total > events.length ? `, the newest ${count(events.length)} shown` : "";
    byId("events-caption").textContent = `${plural(total, "event")}, newest first${older}`;
    byId("adopt").hidden = events.length === 0;
    list.replaceChildren(...events.map((event) =>
      el(
        "li",
        {},
        el("span", { class: "what" },
          el("span", { class: "title" }, event.title || event.item_id),
          el("span", { class: "caption" }, detail(event, this.page.info.has_time ? event.time : undefined)),
        ),
      ),
    ));
  }

  /** Makes the user's events, as many as the service takes, a history that can be edited; false if it could not. */
  async adopt() {
    const { state, info } = this.page;
    try {
      const { events } = state.user ? await eventsOf(state.user, info.limits?.max_list ?? EVENTS) : { events: [] };
      remember(events.map(({ item_id, title }) => ({ item_id, title })));
      state.history = events.reverse().map((event) => ({
        id: event.item_id,
        time: info.has_time ? event.time : null,
        rating: event.rating ?? null,
        action: event.action ?? null,
      }));
    } catch (error) {
      this.page.failed(error);
      return false;
    }
    state.mode = "history";
    this.render();
    this.page.changed();
    return true;
  }
}

/** The newest events of a known user, at most `most`, as {events, total}. */
async function eventsOf(id, most) {
  const events = [];
  let total = 0;
  do {
    const { data } = await call(`v1/users/${encodeURIComponent(id)}?limit=${PAGE}&offset=${events.length}`);
    total = data.total;
    if (!data.events.length) break;
    events.push(...data.events);
  } while (events.length < Math.min(total, most));
  return { events: events.slice(0, most), total };
}

/** Asks for the titles of items; ids that the service does not know stay ids. */
async function lookUp(ids) {
  for (let start = 0; start < ids.length; start += PAGE) {
    const words = new URLSearchParams({ limit: PAGE });
    for (const id of ids.slice(start, start + PAGE)) words.append("item_id", id);
    remember((await call(`v1/items?${words}`)).data.items);
  }
}

/** Which event of this item in the history the nth one is. */
const occurrence = (history, n) => history.slice(0, n).filter((event) => event.id === history[n].id).length;

function detail(event, time) {
  const when = time === undefined || time === null ? null : moment(time);
  const stars = event.rating === null || event.rating === undefined ? null : `rated ${event.rating}`;
  return [when, stars, event.source === "store" ? "new" : null, event.source && event.action ? event.action : null]
    .filter((word) => word !== null)
    .join(" · ");
}

function moveAmongHits(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") byId("search").focus();
  if (!step) return;
  const buttons = [...byId("hits").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement) + step;
  event.preventDefault();
  (at < 0 ? byId("search") : buttons[Math.min(at, buttons.length - 1)]).focus();
}
