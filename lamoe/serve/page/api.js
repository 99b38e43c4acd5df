// Talks to the server: the key, errors with their meaning, and OpenAI's server-sent events.

const KEY = "lamoe:key";
let memoryKey = null;  // where sessionStorage is not allowed

export const apiKey = {
  get() {
    try { return sessionStorage.getItem(KEY) ?? memoryKey; } catch { return memoryKey; }
  },
  set(value) {
    memoryKey = value;
    try { value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY); } catch { /* kept in memory */ }
  },
};

/** A refusal of the server. kind: key (401), busy (429), loading (503), refused (other). */
class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
    this.kind = { 401: "key", 429: "busy", 503: "loading" }[status] ?? "refused";
  }
}

/** The server did not answer, or stopped in the middle of an answer. */
class Unreachable extends Error {
  kind = "gone";
}

async function failure(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    const body = await response.json();
    message = body?.error?.message ?? body?.detail ?? message;
    if (typeof message !== "string") message = JSON.stringify(message);
  } catch { /* no JSON: the status line has to do */ }
  const after = Number(response.headers.get("retry-after"));
  return new ApiError(response.status, message, Number.isFinite(after) && after > 0 ? after : null);
}

/** fetch with the key. ApiError when refused, Unreachable when nobody answers, AbortError when `signal` says so. */
async function request(path, { body, signal, timeout } = {}) {
  const headers = {};
  const key = apiKey.get();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: signal ?? (timeout ? AbortSignal.timeout(timeout) : undefined),
      cache: "no-store",
      credentials: "omit",
    });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Unreachable("The server cannot be reached.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function getJson(path, timeout = 8000) {
  return (await request(path, { timeout })).json();
}

export async function postJson(path, body, timeout = 20000) {
  return (await request(path, { body, timeout })).json();
}

/** "ready", "loading" or "gone". Needs no key. */
export async function health() {
  try {
    await request("/health", { timeout: 5000 });
    return "ready";
  } catch (e) {
    return e instanceof ApiError ? (e.status === 503 ? "loading" : "ready") : "gone";
  }
}

/**
 * The chunks of a streamed chat completion, after {requestId}. Throws ApiError for an error event and Unreachable when the
 * connection ends before [DONE]. Leaving the loop closes the connection, by which the server stops.
 */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal });
  yield { requestId: response.headers.get("x-request-id") };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "", finished = false;
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (e) {
        if (e.name === "AbortError") throw e;
        throw new Unreachable("The connection to the server was lost.");
      }
      if (part.done) break;
      buffer += part.value.replaceAll("\r", "");
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const data = buffer.slice(0, end).split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trimStart()).join("\n");
        buffer = buffer.slice(end + 2);
        if (!data) continue;  // a comment that keeps the connection open
        if (data === "[DONE]") { finished = true; continue; }
        let chunk;
        try {
          chunk = JSON.parse(data);
        } catch {
          throw new ApiError(200, "The server sent an event that is not JSON.");
        }
        if (chunk.error) throw new ApiError(Number(chunk.error.code) || 500, chunk.error.message ?? "The server reported an error.");
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!finished) throw new Unreachable("The connection to the server was lost.");
}
