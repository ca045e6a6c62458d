// The page of a running recsys2stage service: one request, as it is asked and as it is answered.

import { showAbout } from "./about.js";
import { address, call, getKey, Problem, setKey, timings } from "./api.js";
import { byId, el } from "./dom.js";
import { Options } from "./options.js";
import { Results, summary } from "./results.js";
import { asCurl, asPython, copy } from "./snippets.js";
import { fromHash, isComplete, requestBody, toHash } from "./state.js";
import { Who } from "./who.js";

const ROUTE = "v1/recommend";
const HEADINGS = { 422: "The service refused this request", 429: "The service is busy", 504: "The service took too long" };

class Page {
  constructor() {
    this.state = fromHash(location.hash);
    this.info = null;
    this.asked = null; // the body of the request that is shown
    this.running = null; // the AbortController of the request under way
    this.timer = null;
    this.summary = ""; // of the answer that is shown
    this.who = new Who(this);
    this.options = new Options(this);
    this.results = new Results({ add: (id) => this.who.add(id), exclude: (id) => this.options.exclude(id) });
    this.wire();
  }

  wire() {
    byId("skip").addEventListener("click", () => this.toResults());
    byId("jump").addEventListener("click", () => this.toResults());
    byId("invite-random").addEventListener("click", () => this.who.random());
    byId("copy-link").addEventListener("click", () => this.copy("link", location.href));
    byId("copy-curl").addEventListener("click", () => this.copy("curl command", asCurl(address(ROUTE), this.asked, getKey() !== null)));
    byId("copy-python").addEventListener("click", () => this.copy("Python script", asPython(address(ROUTE), this.asked, getKey() !== null)));
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      setKey(byId("key").value.trim());
      byId("key-form").hidden = true;
      this.start();
    });
    const theme = byId("theme");
    theme.value = document.documentElement.dataset.theme ?? "auto";
    theme.addEventListener("change", () => chooseTheme(theme.value));
    addEventListener("hashchange", () => {
      if (location.hash.slice(1) === toHash(this.state)) return;
      this.state = fromHash(location.hash);
      if (this.info === null) return;
      this.options.start();
      this.who.render();
      this.who.name().catch((error) => this.failed(error));
      this.ask();
    });
    new IntersectionObserver(([entry]) => {
      this.away = !entry.isIntersecting && entry.boundingClientRect.top > 0;
      this.offerJump();
    }).observe(byId("results-heading"));
  }

  /** Asks the service what it is, then shows what the URL says. */
  async start() {
    this.clearError();
    try {
      this.info = (await call("v1/info")).data;
      showAbout(this.info);
      this.options.start();
      this.who.render();
      this.ask();
      await this.who.start();
    } catch (error) {
      this.failed(error, () => this.start());
    }
  }

  /** The state changed: the URL follows at once, the lists after `wait` milliseconds without a further change. */
  changed(wait = 0) {
    history.replaceState(null, "", `#${toHash(this.state)}`);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), wait);
  }

  async ask() {
    this.running?.abort();
    const complete = isComplete(this.state);
    byId("invitation").hidden = complete;
    byId("copy-curl").disabled = byId("copy-python").disabled = !complete;
    this.complete = complete;
    this.offerJump();
    if (!complete) {
      this.asked = null;
      this.clearError();
      this.results.clear();
      this.summarise("");
      return;
    }
    this.asked = requestBody(this.state, this.info);
    const running = (this.running = new AbortController());
    const diversity = this.state.diversity;
    byId("lists").setAttribute("aria-busy", "true");
    try {
      const { data, headers, elapsed } = await call(ROUTE, { body: this.asked, signal: running.signal });
      const stages = timings(headers);
      this.clearError();
      this.results.show(data, stages, elapsed, { info: this.info, diversity });
      this.summarise(summary(data, stages));
    } catch (error) {
      if (error.name === "AbortError") return; // another request took its place
      this.summarise("");
      this.failed(error, () => this.ask());
    }
    if (running === this.running) byId("lists").removeAttribute("aria-busy");
  }

  /** Shows what went wrong and what to do; a 401 asks for the key. */
  failed(error, again = null) {
    if (!(error instanceof Problem)) console.error(error);
    const refused = error.status === 401;
    if (refused) {
      byId("key-detail").textContent = getKey() ? "It refused the key that was given. The key is sent with every request and kept in this tab only." : "The key is sent with every request and kept in this tab only.";
      byId("key-form").hidden = false;
      byId("key").focus();
      return;
    }
    const known = error.errors?.filter((one) => one.detail && !error.detail.includes(one.detail)) ?? [];
    const passing = !(error.status >= 400 && error.status < 500) || error.status === 429; // the same request may succeed later
    const retry = again && passing && el("button", { type: "button", onclick: () => again() }, "Try again");
    byId("error").replaceChildren(
      el("h3", {}, HEADINGS[error.status] ?? error.message),
      ...(error.detail ? [el("p", {}, error.detail)] : []),
      ...(known.length ? [el("ul", {}, ...known.map((one) => el("li", {}, one.field ? el("code", {}, one.field) : "", one.field ? ": " : "", one.detail)))] : []),
      ...(error.retryAfter ? [el("p", {}, `The service asks to wait ${error.retryAfter} s.`)] : []),
      ...(retry ? [retry] : []),
    );
    byId("error").hidden = false;
    byId("lists").classList.add("stale");
  }

  clearError() {
    byId("error").hidden = true;
    byId("error").replaceChildren();
    byId("lists").classList.remove("stale");
  }

  toResults() {
    byId("results-heading").focus({ preventScroll: true });
    byId("results-heading").scrollIntoView();
  }

  /** On a phone the lists are below the request: a button leads there. */
  offerJump() {
    byId("jump").hidden = !(this.complete && this.away);
  }

  /** Says something for a while in place of the summary. */
  say(text) {
    byId("status").textContent = text;
    clearTimeout(this.saying);
    this.saying = setTimeout(() => (byId("status").textContent = this.summary), 2500);
  }

  summarise(text) {
    clearTimeout(this.saying);
    byId("status").textContent = this.summary = text;
  }

  async copy(what, text) {
    if (await copy(text)) {
      this.say(`Copied the ${what}`);
      return;
    }
    byId("copy-heading").textContent = `Copy the ${what}`;
    byId("copy-text").value = text;
    byId("copy-dialog").showModal();
    byId("copy-text").select();
  }
}

function chooseTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("recsys2stage.theme", theme);
  } catch {
    // Storage is blocked: the choice lasts until the page is closed.
  }
}

new Page().start();
