// The live panel: what the server's cache holds beside what other attention would hold, speed, prefix hits, queue, experts.
// One poll feeds it and everything else that wants to know how the server is (`watch`).

import { $, bytes, count, h, many, percent, rate, seconds, text } from "./dom.js";
import { getJson, health } from "./api.js";
import { redrawHeat, showExperts } from "./heat.js";

const SAMPLES = 60;
const NAMES = { mqa: "MQA, one head cached", gqa: "GQA, grouped heads", mha: "MHA, every head" };
const speeds = [];
let last = null;  // tokens and bytes of the cache when it last held something
let hurry = () => {}, again = false;

// state: connecting | ready | loading | gone | key; why: the last problem, in the server's words
export const server = { state: "connecting", stats: null, why: "" };

/**
 * Ask the server how it is, for ever: every second while `busy()`, else every three, hardly ever while nobody looks. `changed()` runs after
 * every answer.
 */
export async function watch(busy, changed) {
  for (;;) {
    again = false;
    await ask();
    show();
    changed();
    const pause = document.hidden ? 30000 : server.state === "key" ? 15000 : server.state !== "ready" ? 2000 : busy() || server.stats?.running ? 1000 : 3000;
    if (!again) await new Promise((done) => {
      const timer = setTimeout(done, pause);
      hurry = () => (clearTimeout(timer), done());
    });
  }
}

/** Ask again now. */
export const askNow = () => ((again = true), hurry());
document.addEventListener("visibilitychange", () => document.hidden || askNow());

async function ask() {
  try {
    server.stats = await getJson("/lamoe/stats");
    server.state = "ready";
  } catch (e) {
    server.why = e.message;
    if (e.kind === "key" || e.kind === "loading") server.state = e.kind;
    else server.state = await health();  // the engine may be deep in a long prompt: then numbers come late, and the server is there all the same
  }
}

function show() {
  const s = server.stats;
  if (!s || server.state !== "ready") return;
  cache(s.cache);
  speeds.push(s.tokens_per_s);
  if (speeds.length > SAMPLES) speeds.shift();
  text($("speed"), rate(s.tokens_per_s));
  spark();
  text($("hits-all"), s.prompt_tokens ? `${percent(s.cached_tokens, s.prompt_tokens)} of ${count(s.prompt_tokens)}` : "–");
  text($("drafts"), s.drafted ? `${percent(s.accepted, s.drafted)} of ${count(s.drafted)}` : "–");
  text($("queue"), `${count(s.running)}, ${count(s.waiting)}`);
}

/** Bars of what is held now; when nothing is, of what was held last; before that, of one token. */
function cache(c) {
  const now = c.used_tokens > 0;
  if (now) last = { tokens: c.used_tokens, bytes: c.used_bytes };
  const { tokens, bytes: own } = last ?? { tokens: 1, bytes: c.bytes_per_token };
  text($("cache-now"), bytes(own));
  text($("cache-tokens"), !last ? "for each token" : `for ${now ? "" : "the last "}${many(tokens, "token")}`);
  const others = Object.entries(c.compare).map(([k, each]) => [NAMES[k] ?? k, each * tokens]).sort((a, b) => a[1] - b[1]);
  const rows = [[`This model, ${c.format.replace(/^(\d+)bit$/, "$1 bits")}`, own], ...others];
  const most = Math.max(...rows.map((r) => r[1]), 1);
  const list = $("bars");
  if (list.children.length !== rows.length) {
    list.replaceChildren(...rows.map((_, i) => h("li", { class: i ? "" : "own" }, h("div", { class: "bar-line" }, h("span"), h("span")),
      h("div", { class: "track", "aria-hidden": "true" }, h("i")))));
  }
  rows.forEach(([name, n], i) => {
    const [line, track] = list.children[i].children;
    text(line.children[0], name);
    text(line.children[1], bytes(n));
    track.firstChild.style.width = `${(100 * n) / most}%`;
  });
  const times = others.length && own ? Math.max(...others.map((o) => o[1])) / own : 0;
  text($("cache-note"), times > 1 ? `${times.toFixed(1)} times smaller than MHA at 16 bits, with the same heads.` : "Others at 16 bits, with the same heads.");
  text($("pool-text"), `${count(c.used_tokens)} of ${count(c.total_tokens)} tokens, ${bytes(c.total_bytes)}`);
  $("pool-bar").style.width = `${c.total_tokens ? Math.min(100, (100 * c.used_tokens) / c.total_tokens) : 0}%`;
}

function spark() {
  const canvas = $("spark"), scale = devicePixelRatio || 1, pen = canvas.getContext("2d");
  canvas.width = Math.round((canvas.clientWidth || 280) * scale);
  canvas.height = Math.round(40 * scale);
  const most = Math.max(...speeds, 1), step = canvas.width / (SAMPLES - 1), floor = canvas.height - scale;
  const y = (v) => floor - (v / most) * (floor - 3 * scale);
  const x = (i) => canvas.width - (speeds.length - 1 - i) * step;
  pen.strokeStyle = pen.fillStyle = getComputedStyle(canvas).color;
  pen.lineWidth = 1.5 * scale;
  pen.lineJoin = "round";
  pen.beginPath();
  speeds.forEach((v, i) => (i ? pen.lineTo(x(i), y(v)) : pen.moveTo(x(i), y(v))));
  pen.stroke();
  pen.lineTo(canvas.width, canvas.height);
  pen.lineTo(x(0), canvas.height);
  pen.globalAlpha = 0.13;
  pen.fill();
}

/** What is known of one reply (a version of store.js, or null): first token, prefix hits, experts. */
export function showReply(version) {
  const usage = version?.usage;
  text($("first"), version?.timing?.first != null ? seconds(version.timing.first) : "–");
  const hit = usage?.prompt_tokens_details?.cached_tokens;
  text($("hits-reply"), usage ? `${count(hit ?? 0)} of ${count(usage.prompt_tokens)} tokens` : "–");
  showExperts(version?.experts ?? null);
}

/** The expert load of request `id` so far, or null when the server has none. */
export async function fetchExperts(id) {
  try {
    return await getJson(`/lamoe/requests/${encodeURIComponent(id)}/experts`);
  } catch {
    return null;  // 404: forgotten by now. The reply is what counts
  }
}

/** Draw the canvases again: the theme has changed. */
export function redraw() {
  if (speeds.length) spark();
  redrawHeat();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(redraw));
