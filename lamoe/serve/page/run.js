// One reply, from request to end: streams into a version (store.js) and waits where waiting helps. No DOM here.

import { chat, getJson } from "./api.js";
import { count } from "./dom.js";
import { server } from "./panel.js";
import { messagesFor, samplingFor } from "./store.js";

/** An empty version of a reply. */
export const newVersion = () => ({ content: "", finish: null, error: null, usage: null, timing: { first: null, total: null }, window: null });

let leaving = false;  // the browser cuts connections before it tells the page
addEventListener("beforeunload", () => (leaving = true));
addEventListener("pagehide", () => (leaving = true));
addEventListener("pageshow", () => (leaving = false));

async function modelName() {
  if (server.stats?.model) return server.stats.model;
  return (await getJson("/v1/models")).data[0].id;
}

const WAITS = {
  busy: (left) => `The server's queue is full. Trying again in ${left} s`,
  loading: (left) => `The model is not ready yet. Trying again in ${left} s`,
  gone: (left) => `The server cannot be reached. Trying again in ${left} s`,
};

/** Wait, counting down; shorter when the server is there again. Throws AbortError when stopped. */
async function wait(kind, length, version, signal, changed) {
  const until = Date.now() + 1000 * length;
  const wasDown = kind !== "busy" && server.state !== "ready";
  for (;;) {
    const left = Math.ceil((until - Date.now()) / 1000);
    if (left <= 0 || (wasDown && server.state === "ready")) break;
    version.status = WAITS[kind](left);
    changed();
    await new Promise((done) => setTimeout(done, 250));
    signal.throwIfAborted();
  }
  delete version.status;
  changed();
}

/**
 * Fill `version` with the reply to the conversation's first `end` messages. It always ends with version.finish set. hooks: changed() after
 * every change; needKey() asks for a key and gives whether there is one now; started(requestId) when the server has accepted.
 */
export async function reply(conversation, version, end, signal, hooks) {
  const { changed, needKey, started } = hooks;
  for (let tries = 0; version.finish === null; tries++) {
    const start = performance.now();
    const since = () => (performance.now() - start) / 1000;
    let finish = null;
    try {
      const body = { model: await modelName(), messages: messagesFor(conversation, end), ...samplingFor(conversation, server.stats?.max_model_len) };
      for await (const chunk of chat(body, signal)) {
        if (chunk.requestId !== undefined) {
          version.window = server.stats?.max_model_len ?? null;
          if (chunk.requestId) started(chunk.requestId);
          continue;
        }
        if (chunk.usage) version.usage = chunk.usage;
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) {
          version.timing.first ??= since();
          version.content += choice.delta.content;
          version.timing.total = since();
        }
        finish = choice?.finish_reason ?? finish;
        changed();
      }
      version.finish = finish === "length" ? "length" : finish === "abort" ? "lost" : "stop";
    } catch (e) {
      if (signal.aborted) version.finish = "stopped";
      else if (leaving) version.finish = "interrupted";
      else if (e.kind === "key") {
        if (!(await needKey())) Object.assign(version, { finish: "error", error: "The server wants a key and has none from you." });
      } else if (e.kind in WAITS && !version.content) {
        try {
          await wait(e.kind, Math.min(e.retryAfter ?? 2 ** Math.min(tries + 1, 4), 60), version, signal, changed);
        } catch { version.finish = "stopped"; }
      } else if (e.kind === "gone") version.finish = "lost";
      else Object.assign(version, { finish: "error", error: e.message });
    }
  }
  delete version.status;
  changed();
}

/** What to say about a long draft: {text, bad, tooLong}. `n`: tokens of the conversation with it, or null while they are not known. */
export function draftNote(characters, n) {
  const window = server.stats?.max_model_len;
  if (n === null) return { text: `${count(characters)} characters`, bad: false, tooLong: false };
  if (window && n >= window) return { text: `${count(n)} tokens with the conversation; this model reads ${count(window)}. Shorten it to send.`, bad: true, tooLong: true };
  return { text: `${count(n)} tokens with the conversation${window ? `, of ${count(window)}` : ""}`, bad: false, tooLong: false };
}
