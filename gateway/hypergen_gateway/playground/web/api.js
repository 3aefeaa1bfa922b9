// The server, seen from the page: the key, errors in OpenAI's shape, and streams of images.

import { bodyOf } from "./request.js";

const KEY = "hypergen-api-key";

let lastKey = "";

/** The key of this tab. Where the browser lets the page store nothing, it is kept until the page is left. */
export function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return lastKey;
  }
}

export function storeKey(key) {
  lastKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Kept above.
  }
}

/** What the server said was wrong; `param` names the field, if it is about one. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

/** What the served model can do. */
export async function capabilities() {
  return (await call("v1/capabilities")).json();
}

/** The events of a request for images, as they come. Aborting `signal` ends the work on the server too. */
export async function* generate(request, signal) {
  const response = await call(request.path, { method: "POST", ...bodyOf(request), signal });
  let missing = Number(request.fields.find(([name]) => name === "n")?.[1] ?? 1);
  for await (const data of events(response.body)) {
    const event = JSON.parse(data);
    if (event.error) throw toError(event.error, response);
    missing -= event.type.endsWith(".completed");
    yield event;
  }
  if (missing > 0) throw new ApiError("The connection ended before the images were finished.");
}

async function call(path, options = {}) {
  const key = storedKey();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw toError(body.error ?? {}, response);
}

function toError({ message, param }, response) {
  const text = message ?? `The server responded with ${response.status} ${response.statusText}`.trim();
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new ApiError(text, { status: response.status, param, retryAfter });
}

/** The data of each server-sent event of a body; comments are skipped. */
async function* events(body) {
  let buffered = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      // An image comes in many parts: only what is new can hold the end of an event.
      const searched = Math.max(buffered.length - 1, 0);
      buffered += part.value;
      for (let end = buffered.indexOf("\n\n", searched); end >= 0; end = buffered.indexOf("\n\n")) {
        const data = dataOf(buffered.slice(0, end));
        buffered = buffered.slice(end + 2);
        if (data) yield data;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost.");
  }
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}
