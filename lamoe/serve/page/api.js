// Talks to the server: API key, error responses, and streams of server-sent events.

const KEY = "lamoe:key";
let memoryKey = null; // used where sessionStorage is not allowed

export const apiKey = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? memoryKey;
    } catch {
      return memoryKey;
    }
  },
  set(value) {
    memoryKey = value;
    try {
      value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY);
    } catch {
      // the key stays in memory
    }
  },
};

/** An error response. `kind`: "key" (401), "busy" (429), "loading" (503), "refused" (others). */
class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, or null
    this.kind = { 401: "key", 429: "busy", 503: "loading" }[status] ?? "refused";
  }
}

/** The server did not respond, or the connection broke during a response. */
class Unreachable extends Error {
  kind = "gone";
}

async function errorFrom(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    const body = await response.json();
    message = body?.error?.message ?? body?.detail ?? message;
    if (typeof message !== "string") message = JSON.stringify(message);
  } catch {
    // the body is not JSON, so the status line is the message
  }
  const seconds = Number(response.headers.get("retry-after"));
  return new ApiError(response.status, message, seconds > 0 ? seconds : null);
}

/**
 * Send a request with the API key. With a `body` it is a POST of JSON, else a GET.
 * Throws ApiError for an error response, Unreachable without a response, and AbortError if
 * `signal` is aborted.
 */
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
  if (!response.ok) throw await errorFrom(response);
  return response;
}

export async function getJson(path, timeout = 8000) {
  return (await request(path, { timeout })).json();
}

export async function postJson(path, body, timeout = 20000) {
  return (await request(path, { body, timeout })).json();
}

/** Return "ready", "loading" or "gone". Needs no key. */
export async function health() {
  try {
    await request("/health", { timeout: 5000 });
    return "ready";
  } catch (e) {
    if (!(e instanceof ApiError)) return "gone";
    return e.status === 503 ? "loading" : "ready";
  }
}

/**
 * Stream a chat completion: yields {requestId}, then the chunks of the response.
 * Throws ApiError for an error event, and Unreachable if the connection ends before [DONE].
 * Leaving the loop closes the connection, which stops the generation.
 */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  yield { requestId: response.headers.get("x-request-id") };
  let done = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      done = true;
      continue;
    }
    const chunk = parseEvent(data);
    if (chunk.error) {
      const message = chunk.error.message ?? "The server reported an error.";
      throw new ApiError(Number(chunk.error.code) || 500, message);
    }
    yield chunk;
  }
  if (!done) throw new Unreachable("The connection to the server was lost.");
}

/** Yield the data of each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const part = await read(reader);
      if (part.done) return;
      buffer += part.value.replaceAll("\r", "");
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const lines = buffer.slice(0, end).split("\n");
        buffer = buffer.slice(end + 2);
        const data = lines
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart())
          .join("\n");
        if (data) yield data; // an event without data only keeps the connection open
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Unreachable("The connection to the server was lost.");
  }
}

function parseEvent(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(200, "The server sent an event that is not JSON.");
  }
}
