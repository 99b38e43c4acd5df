// Generates one reply: streams it into a version (see store.js) and retries after failures that may
// pass. This module does not touch the page.

import { chat, getJson } from "./api.js";
import { server } from "./panel.js";
import { messagesFor, samplingFor } from "./store.js";

/** Make an empty version of a reply. */
export const newVersion = () => ({
  content: "",
  finish: null,
  error: null,
  usage: null,
  timing: { first: null, total: null }, // seconds
  window: null, // context length of the model
});

// The browser cuts connections before it hides the page, so the reason must be known earlier.
let isLeaving = false;
addEventListener("beforeunload", () => (isLeaving = true));
addEventListener("pagehide", () => (isLeaving = true));
addEventListener("pageshow", () => (isLeaving = false));

async function modelName() {
  if (server.stats?.model) return server.stats.model;
  return (await getJson("/v1/models")).data[0].id;
}

const WAIT_MESSAGES = {
  busy: (left) => `The server's queue is full. Trying again in ${left} s`,
  loading: (left) => `The model is not ready yet. Trying again in ${left} s`,
  gone: (left) => `The server cannot be reached. Trying again in ${left} s`,
};

/**
 * Count down before the next attempt. The wait ends early when a server that was down is ready
 * again. Throws AbortError if `signal` is aborted.
 */
async function wait(kind, duration, version, signal, changed) {
  const end = performance.now() + 1000 * duration;
  const wasDown = kind !== "busy" && server.state !== "ready";
  for (;;) {
    const left = Math.ceil((end - performance.now()) / 1000);
    if (left <= 0 || (wasDown && server.state === "ready")) break;
    version.status = WAIT_MESSAGES[kind](left);
    changed();
    await new Promise((resolve) => setTimeout(resolve, 250));
    signal.throwIfAborted();
  }
  delete version.status;
  changed();
}

/**
 * Fill `version` with the reply to the first `end` messages of a conversation. In every case,
 * `version.finish` is set at the end.
 *
 * hooks: changed() is called after each change; needKey() asks for a key and resolves to whether
 * there is one; started(requestId) is called when the server has accepted the request.
 */
export async function reply(conversation, version, end, signal, hooks) {
  for (let attempt = 1; version.finish === null; attempt++) {
    try {
      const body = {
        model: await modelName(),
        messages: messagesFor(conversation, end),
        ...samplingFor(conversation, server.stats?.max_model_len),
      };
      await stream(body, version, signal, hooks);
    } catch (e) {
      await handleError(e, version, attempt, signal, hooks);
    }
  }
  delete version.status;
  hooks.changed();
}

async function stream(body, version, signal, { changed, started }) {
  const start = performance.now();
  const elapsed = () => (performance.now() - start) / 1000;
  let finish = null;
  for await (const chunk of chat(body, signal)) {
    if (chunk.requestId !== undefined) {
      version.window = server.stats?.max_model_len ?? null;
      if (chunk.requestId) started(chunk.requestId);
      continue;
    }
    if (chunk.usage) version.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      version.timing.first ??= elapsed();
      version.content += choice.delta.content;
      version.timing.total = elapsed();
    }
    finish = choice?.finish_reason ?? finish;
    changed();
  }
  version.finish = { length: "length", abort: "lost" }[finish] ?? "stop";
}

/** Set `version.finish`, or leave it null after a wait if another attempt makes sense. */
async function handleError(error, version, attempt, signal, { changed, needKey }) {
  if (signal.aborted) {
    version.finish = "stopped";
  } else if (isLeaving) {
    version.finish = "interrupted";
  } else if (error.kind === "key") {
    if (await needKey()) return;
    version.finish = "error";
    version.error = "The server wants a key and has none from you.";
  } else if (error.kind in WAIT_MESSAGES && !version.content) {
    const duration = Math.min(error.retryAfter ?? 2 ** Math.min(attempt, 4), 60);
    try {
      await wait(error.kind, duration, version, signal, changed);
    } catch {
      version.finish = "stopped";
    }
  } else if (error.kind === "gone") {
    version.finish = "lost";
  } else {
    version.finish = "error";
    version.error = error.message;
  }
}
