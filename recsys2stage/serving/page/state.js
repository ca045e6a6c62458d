// What the page asks for, as an object, as the hash of the URL, and as the body of a request.

/**
 * @typedef {{id: string, time: ?number, rating: ?number, action: ?string}} Event  time in seconds; null: filled in
 * @typedef {{mode: "any"|"all"|"none", values: string[]}|{min: ?number, max: ?number}} Filter
 */

/** A request in which nothing is chosen yet. */
export const initial = () => ({
  mode: "history",
  user: "",
  /** @type {Event[]} oldest first */
  history: [],
  gap: 86400, // whole seconds between events without a time
  k: 10,
  diversity: 0,
  time: null, // seconds; null: left to the service
  action: null,
  seen: null,
  explain: true,
  /** @type {Object<string, Filter>} */
  filters: Object.create(null),
  exclude: [],
});

const KINDS = ["any", "all", "none"];
const numbers = (text) => (text ? text.split(",").map((word) => finite(word)) : []);
const finite = (word) => (word !== null && word.trim() !== "" && Number.isFinite(Number(word)) ? Number(word) : null);
const within = (value, low, high, otherwise) =>
  value === null ? otherwise : Math.min(Math.max(value, low), high);

/** The state as the hash of a URL, without what is at its default. */
export function toHash(state) {
  const words = new URLSearchParams();
  const add = (name, value, otherwise) => value !== otherwise && words.append(name, String(value));
  if (state.mode === "user") words.append("u", state.user);
  else for (const event of state.history) words.append("h", event.id);
  if (state.mode === "history") {
    for (const [name, field] of [["ht", "time"], ["hr", "rating"]]) {
      const values = state.history.map((event) => event[field] ?? "");
      if (values.some((value) => value !== "")) words.append(name, values.join(","));
    }
    if (state.history.some((event) => event.action !== null))
      for (const event of state.history) words.append("ha", event.action ?? "");
    add("gap", state.gap, 86400);
  }
  add("k", state.k, 10);
  add("diversity", state.diversity, 0);
  add("time", state.time, null);
  add("action", state.action, null);
  add("seen", state.seen, null);
  add("explain", state.explain ? 1 : 0, 1);
  for (const [name, filter] of Object.entries(state.filters)) {
    if (filter.values) for (const value of filter.values) words.append(`f.${name}.${filter.mode}`, value);
    else for (const end of ["min", "max"]) add(`f.${name}.${end}`, filter[end], null);
  }
  for (const id of state.exclude) words.append("x", id);
  return words.toString();
}

/** The state of a hash; what it does not say, or says wrongly, is at its default. */
export function fromHash(hash) {
  const words = new URLSearchParams(hash.replace(/^#/, ""));
  const state = initial();
  if (words.has("u")) [state.mode, state.user] = ["user", words.get("u")];
  const times = numbers(words.get("ht"));
  const ratings = numbers(words.get("hr"));
  const actions = words.getAll("ha");
  state.history = words.getAll("h").map((id, n) => ({
    id,
    time: times[n] ?? null,
    rating: ratings[n] ?? null,
    action: actions[n] || null,
  }));
  state.gap = Math.round(within(finite(words.get("gap")), 1, 1e9, state.gap));
  state.k = Math.round(within(finite(words.get("k")), 1, 1e6, state.k));
  state.diversity = within(finite(words.get("diversity")), 0, 1, state.diversity);
  state.time = finite(words.get("time"));
  state.action = words.get("action");
  if (["keep", "filter"].includes(words.get("seen"))) state.seen = words.get("seen");
  state.explain = words.get("explain") !== "0";
  for (const [key, value] of words) {
    const [, name, kind] = key.match(/^f\.(.*)\.(any|all|none|min|max)$/s) ?? [];
    if (name === undefined) continue;
    if (KINDS.includes(kind)) {
      const filter = state.filters[name]?.values ? state.filters[name] : { mode: kind, values: [] };
      filter.mode = kind;
      filter.values.push(value);
      state.filters[name] = filter;
    } else if (finite(value) !== null) {
      const filter = state.filters[name] && !state.filters[name].values ? state.filters[name] : { min: null, max: null };
      filter[kind] = finite(value);
      state.filters[name] = filter;
    }
  }
  state.exclude = words.getAll("x");
  return state;
}

/**
 * Seconds of each event of the history. Events without a time are the newest ones: they end one gap before the request,
 * with one gap between two, and none is older than the event before it.
 * @returns {number[]}
 */
export function eventTimes(state, now) {
  const end = state.time ?? now;
  const size = state.history.length;
  let newest = -Infinity;
  return state.history.map((event, n) => {
    newest = Math.max(newest, event.time ?? Math.max(end - (size - n) * state.gap, 0));
    return newest;
  });
}

/** Whether there is anyone to recommend for. */
export const isComplete = (state) => (state.mode === "user" ? state.user !== "" : state.history.length > 0);

/** The body of POST /v1/recommend; what is at its default is left out. */
export function requestBody(state, info, now = Math.floor(Date.now() / 1000)) {
  const body = {};
  if (state.mode === "user") body.user_id = state.user;
  else {
    body.history = { items: state.history.map((event) => event.id) };
    if (info.has_time) body.history.times = eventTimes(state, now);
    for (const [name, field] of [["ratings", "rating"], ["actions", "action"]])
      if (state.history.some((event) => event[field] !== null)) body.history[name] = state.history.map((event) => event[field]);
  }
  body.k = state.k;
  if (state.time !== null) body.request_time = state.time;
  if (state.action !== null) body.action = state.action;
  if (state.seen !== null) body.seen = state.seen;
  if (state.exclude.length) body.exclude = state.exclude;
  const filters = Object.entries(state.filters).flatMap(([name, filter]) => {
    if (filter.values) return filter.values.length ? [[name, { [filter.mode]: filter.values }]] : [];
    const ends = Object.entries(filter).filter(([, value]) => value !== null);
    return ends.length ? [[name, Object.fromEntries(ends)]] : [];
  });
  if (filters.length) body.filters = Object.fromEntries(filters);
  if (state.diversity > 0) body.diversity = state.diversity;
  body.stages = true;
  if (state.explain) body.explain = true;
  return body;
}
