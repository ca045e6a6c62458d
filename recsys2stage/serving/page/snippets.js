// A request as a command or a script that can be pasted elsewhere. A key is never part of it, only its variable.

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** POST with curl. */
export function asCurl(url, body, hasKey) {
  const key = hasKey ? `\n  -H "Authorization: Bearer $RECSYS_API_KEY" \\` : "";
  return `curl -sS ${shell(url)} \\${key}\n  -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(body))}\n`;
}

/** A value as Python writes it; lists of plain values stay on one line. */
export function python(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value); // JSON's strings and numbers are also Python's
  const deeper = `${indent}    `;
  const list = Array.isArray(value);
  const parts = list
    ? value.map((part) => python(part, deeper))
    : Object.entries(value).map(([name, part]) => `${JSON.stringify(name)}: ${python(part, deeper)}`);
  const flat = (list ? "[%]" : "{%}").split("%").join(parts.join(", "));
  if (list || parts.length === 0) return flat;
  return `{\n${parts.map((part) => `${deeper}${part},\n`).join("")}${indent}}`;
}

/** POST with httpx. */
export function asPython(url, body, hasKey) {
  const key = hasKey ? `\n    headers={"Authorization": f"Bearer {os.environ['RECSYS_API_KEY']}"},` : "";
  return `${hasKey ? "import os\n\n" : ""}import httpx

response = httpx.post(
    ${JSON.stringify(url)},
    json=${python(body, "    ")},${key}
)
response.raise_for_status()
for item in response.json()["items"]:
    print(item["rank"], item["title"] or item["item_id"], item["score"])
`;
}

/** Copies text; false where the browser does not allow it (no HTTPS and not this machine). */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
