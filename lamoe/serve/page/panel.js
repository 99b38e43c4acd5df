// The live panel: cache size, speed, prefix hits, queue and experts.
// It also polls the server's state, which other modules read from `server`.

import { $, bytes, count, h, many, percent, rate, seconds, text } from "./dom.js";
import { getJson, health } from "./api.js";
import { redrawHeat, showExperts } from "./heat.js";

const MAX_SPEEDS = 60; // points of the speed curve
const NAMES = { mqa: "MQA, one head cached", gqa: "GQA, grouped heads", mha: "MHA, every head" };
const speeds = [];
let lastUse = null; // {tokens, bytes} of the cache when it last held something
let endPause = () => {};
let again = false;

/**
 * The state of the server: "connecting", "loading", "ready", "gone" or "key" (a key is needed),
 * the last response of /lamoe/stats, and the message of the last error.
 */
export const server = { state: "connecting", stats: null, why: "" };

/**
 * Poll the server for ever. `isBusy()` tells whether this page has running requests, which makes
 * polling more frequent. `changed()` is called after each poll.
 */
export async function watch(isBusy, changed) {
  for (;;) {
    again = false;
    await poll();
    show();
    changed();
    if (again) continue;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, pauseMs(isBusy()));
      endPause = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

function pauseMs(isBusy) {
  if (document.hidden) return 30000;
  if (server.state === "key") return 15000;
  if (server.state !== "ready") return 2000;
  return isBusy || server.stats?.running ? 1000 : 3000;
}

/** Poll now instead of at the end of the pause. */
export function pollNow() {
  again = true;
  endPause();
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) pollNow();
});

async function poll() {
  try {
    server.stats = await getJson("/lamoe/stats");
    server.state = "ready";
  } catch (e) {
    server.why = e.message;
    if (e.kind === "key" || e.kind === "loading") server.state = e.kind;
    // A long engine step delays the statistics. /health still answers then.
    else server.state = await health();
  }
}

function show() {
  const { stats } = server;
  if (!stats || server.state !== "ready") return;
  showCache(stats.cache);
  speeds.push(stats.tokens_per_s);
  if (speeds.length > MAX_SPEEDS) speeds.shift();
  text($("speed"), rate(stats.tokens_per_s));
  drawSpeeds();
  const share = (part, whole) => (whole ? `${percent(part, whole)} of ${count(whole)}` : "–");
  text($("hits-all"), share(stats.cached_tokens, stats.prompt_tokens));
  text($("drafts"), share(stats.accepted, stats.drafted));
  text($("queue"), `${count(stats.running)}, ${count(stats.waiting)}`);
}

/**
 * Compare the cache with the caches of other attention forms, for the tokens that it holds now.
 * An empty cache is shown as it was last in use, or for one token if it never was.
 */
function showCache(cache) {
  const inUse = cache.used_tokens > 0;
  if (inUse) lastUse = { tokens: cache.used_tokens, bytes: cache.used_bytes };
  const { tokens, bytes: ownBytes } = lastUse ?? { tokens: 1, bytes: cache.bytes_per_token };
  text($("cache-now"), bytes(ownBytes));
  const forTokens = `for ${inUse ? "" : "the last "}${many(tokens, "token")}`;
  text($("cache-tokens"), lastUse ? forTokens : "for each token");

  const others = Object.entries(cache.compare)
    .map(([name, perToken]) => [NAMES[name] ?? name, perToken * tokens])
    .sort((a, b) => a[1] - b[1]);
  const format = cache.format.replace(/^(\d+)bit$/, "$1 bits");
  showBars([[`This model, ${format}`, ownBytes], ...others]);

  const largest = Math.max(0, ...others.map(([, size]) => size));
  const ratio = ownBytes ? largest / ownBytes : 0;
  const note =
    ratio > 1
      ? `${ratio.toFixed(1)} times smaller than MHA at 16 bits, with the same heads.`
      : "Others at 16 bits, with the same heads.";
  text($("cache-note"), note);
  const { used_tokens: used, total_tokens: total } = cache;
  text($("pool-text"), `${count(used)} of ${count(total)} tokens, ${bytes(cache.total_bytes)}`);
  $("pool-bar").style.width = `${total ? Math.min(100, (100 * used) / total) : 0}%`;
}

/** Show [name, bytes] pairs as bars; the first one is this model. */
function showBars(rows) {
  const list = $("bars");
  if (list.children.length !== rows.length) list.replaceChildren(...rows.map(emptyBar));
  const maximum = Math.max(...rows.map(([, size]) => size), 1);
  rows.forEach(([name, size], i) => {
    const [line, track] = list.children[i].children;
    text(line.children[0], name);
    text(line.children[1], bytes(size));
    track.firstChild.style.width = `${(100 * size) / maximum}%`;
  });
}

function emptyBar(_, i) {
  const line = h("div", { class: "bar-line" }, h("span"), h("span"));
  const track = h("div", { class: "track", "aria-hidden": "true" }, h("i"));
  return h("li", { class: i ? "" : "own" }, line, track);
}

function drawSpeeds() {
  const canvas = $("spark");
  const scale = devicePixelRatio || 1;
  const context = canvas.getContext("2d");
  canvas.width = Math.round((canvas.clientWidth || 280) * scale);
  canvas.height = Math.round(40 * scale);
  const maximum = Math.max(...speeds, 1);
  const step = canvas.width / (MAX_SPEEDS - 1);
  const floor = canvas.height - scale;
  const x = (i) => canvas.width - (speeds.length - 1 - i) * step;
  const y = (speed) => floor - (speed / maximum) * (floor - 3 * scale);
  context.strokeStyle = context.fillStyle = getComputedStyle(canvas).color;
  context.lineWidth = 1.5 * scale;
  context.lineJoin = "round";
  context.beginPath();
  speeds.forEach((speed, i) => context.lineTo(x(i), y(speed)));
  context.stroke();
  // close the area below the curve and tint it
  context.lineTo(canvas.width, canvas.height);
  context.lineTo(x(0), canvas.height);
  context.globalAlpha = 0.13;
  context.fill();
}

/** Show time to first token, prefix hits and experts of a version (see store.js), or of none. */
export function showReply(version) {
  const first = version?.timing?.first;
  text($("first"), first != null ? seconds(first) : "–");
  const usage = version?.usage;
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const hits = usage ? `${count(cached)} of ${count(usage.prompt_tokens)} tokens` : "–";
  text($("hits-reply"), hits);
  showExperts(version?.experts ?? null);
}

/** Fetch the expert load of a request. Returns null if the server no longer has it. */
export async function fetchExperts(requestId) {
  try {
    return await getJson(`/lamoe/requests/${encodeURIComponent(requestId)}/experts`);
  } catch {
    return null; // the load is optional, so an error is not shown
  }
}

/** Draw the canvases again after a change of the theme. */
export function redraw() {
  if (speeds.length) drawSpeeds();
  redrawHeat();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(redraw));
