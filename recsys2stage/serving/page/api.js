// Requests to the service. Paths are relative, so that the page also works behind a prefix.

const KEY = "recsys2stage.key";

/** What the service refused (RFC 9457), or why no answer came; `status` is 0 if none came. */
export class Problem extends Error {
  constructor(status, body, retryAfter = null) {
    super(body.title ?? `The service answered ${status}`);
    this.status = status;
    this.detail = body.detail ?? "";
    this.errors = Array.isArray(body.errors) ? body.errors : [];
    this.instance = body.instance ?? null;
    this.retryAfter = retryAfter;
  }
}

/** The API key of this tab, or null. */
export function getKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return memory;
  }
}

let memory = null; // where storage is blocked

/** Keeps the API key for this tab. */
export function setKey(key) {
  memory = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // `memory` has it.
  }
}

/** Where the API is, for what is copied from the page. */
export const address = (path) => new URL(path, document.baseURI.split("#")[0]).href;

/**
 * Calls a route.
 * @returns {Promise<{data: object, headers: Headers, elapsed: number}>} elapsed in milliseconds, as seen here
 * @throws {Problem} if the service refuses or does not answer; an AbortError if `signal` aborts
 */
export async function call(path, { body = null, signal = null } = {}) {
  const headers = { Accept: "application/json" };
  const key = getKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const start = performance.now();
  let response;
  let text;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, {
      title: "The service does not answer",
      detail: `No answer from ${address(path).split("?")[0]}. Check that recsys serve is running, then try again.`,
    });
  }
  let data = null;
  try {
    data = JSON.parse(text);
  } catch {
    // An answer of something between here and the service; its status says enough.
  }
  const wait = Number(response.headers.get("Retry-After")) || null;
  if (!response.ok) throw new Problem(response.status, data ?? { title: `${response.status} ${response.statusText}` }, wait);
  if (data === null) throw new Problem(response.status, { title: "The answer is not JSON", detail: text.slice(0, 200) });
  return { data, headers: response.headers, elapsed: performance.now() - start };
}

/** Server-Timing as [{name, milliseconds}], in the order of the header. */
export function timings(headers) {
  const stages = [];
  for (const part of (headers.get("Server-Timing") ?? "").split(",")) {
    const [name, ...parameters] = part.split(";").map((word) => word.trim());
    const duration = parameters.find((word) => word.startsWith("dur="));
    if (name && duration) stages.push({ name, milliseconds: Number(duration.slice(4)) });
  }
  return stages;
}
