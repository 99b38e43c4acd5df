// The page: which conversation is open, what is being written, and what keys and buttons do. Start reading here.
// dom (small things), api (HTTP), store (localStorage), run (one reply), messages + markdown (how it looks), sidebar, settings, layout,
// key, panel + heat (the live side). Everything is plain modules; nothing is loaded from elsewhere.

import { $, announce, count, download, h, text, toast } from "./dom.js";
import { postJson } from "./api.js";
import * as store from "./store.js";
import { askKey, wasAsked } from "./key.js";
import { buildLayout, closeOver, showTab, toggle } from "./layout.js";
import { editInPlace, messageElement } from "./messages.js";
import { askNow, fetchExperts, server, showReply, watch } from "./panel.js";
import { draftNote, newVersion, reply } from "./run.js";
import { buildSettings, showSettings } from "./settings.js";
import { buildSidebar, showList } from "./sidebar.js";

const MOST_AT_ONCE = 4;  // replies: a browser opens six connections to a server, and the panel needs one
const LONG_DRAFT = 1500;  // characters from which a draft's tokens are counted
const STARTERS = ["Explain in three sentences how a model can keep a small latent instead of all keys and values.",
  "Write a Python function that merges two sorted lists, with a docstring and a test.",
  "Go on in the same tone: It is a truth universally acknowledged, that a single man in possession of a good fortune"];

let conversations = store.all();
let current = store.create();
const running = new Map();  // conversation id -> {abort, version}
const experts = new WeakMap();  // version -> expert load; too large to store
let pinned = true, draftTooLong = false, editing = false;

const isBusy = (c = current) => running.has(c.id);
const acts = { isBusy, regenerate, version: showVersion, startEdit };

// ---- showing ---------------------------------------------------------------------------------------------------------
function open(c) {
  saveDraft();
  editing = false;
  current = c;
  $("input").value = c.draft ?? "";
  store.prefs.set({ open: c.id });
  pinned = true;
  drawMessages();
  showSettings(c);
  draftChanged();
  drawAround();
}

function drawMessages() {
  $("messages").replaceChildren(...current.messages.map((m) => messageElement(m, current, acts)));
  $("empty").hidden = current.messages.length > 0;
  follow();
}

/** Everything but the messages. */
function drawAround() {
  showList(conversations, current);
  text($("title"), current.title);
  document.title = current.messages.length ? `${current.title} · lamoe` : "lamoe";
  $("stop").hidden = !isBusy();
  $("send").hidden = isBusy();
  const last = current.messages.at(-1), v = last?.role === "assistant" ? store.shown(last) : null;
  showReply(v && { ...v, experts: experts.get(v) });
  const window = server.stats?.max_model_len, total = v?.usage?.total_tokens;
  text($("context"), total && window ? `${count(total)} of ${count(window)} tokens of context` : "");
  $("context").classList.toggle("bad", total > 0.9 * window);
}

function drawServer() {
  const s = server.stats, state = server.state;
  $("dot").className = `dot ${state === "key" ? "loading" : state}`;
  text($("model"), { connecting: "Connecting", loading: "Loading", gone: "No connection", key: "Key needed" }[state] ?? (s ? `${s.model} · ${s.dtype}` : "Ready"));
  $("chip").title = s ? `${s.model}, ${s.dtype}, reads ${count(s.max_model_len)} tokens` : "";
  const [words, label, action] = {
    loading: [`Not ready: ${server.why.replace(/; try again later$/, "")}. You can write meanwhile.`],
    gone: ["The server cannot be reached. Your conversations are safe in this browser.", "Try now", askNow],
    key: ["This server asks for an API key.", "Enter the key", () => askKey()],
  }[state] ?? [""];
  text($("banner-text"), words);
  $("banner").hidden = !words;
  $("banner-action").hidden = !label;
  text($("banner-action"), label ?? "");
  $("banner-action").onclick = action ?? null;
  if (state === "key" && !wasAsked()) askKey();
  if (s) {
    const mha = s.cache.compare?.mha;
    text($("about"), `${s.model} reads up to ${count(s.max_model_len)} tokens and keeps ${count(s.cache.bytes_per_token)} bytes of each`
      + `${mha ? `; multi-head attention would keep ${count(mha)}` : ""}.`);
  }
}

function follow() {
  if (pinned) $("scroll").scrollTop = $("scroll").scrollHeight;
  $("latest").hidden = pinned || !current.messages.length;
}

$("scroll").addEventListener("scroll", () => {
  const s = $("scroll");
  pinned = s.scrollHeight - s.scrollTop - s.clientHeight < 30;
  $("latest").hidden = pinned || !current.messages.length;
});
$("latest").addEventListener("click", () => ((pinned = true), follow()));
new ResizeObserver(follow).observe($("scroll"));

// ---- writing ---------------------------------------------------------------------------------------------------------
function touch(c) {
  c.updated = Date.now();
  conversations = [c, ...conversations.filter((x) => x !== c && x.id !== c.id)];
  store.save(c);
}

function send() {
  const content = $("input").value;
  if (!content.trim() || isBusy() || draftTooLong || tooMany()) return;
  $("input").value = current.draft = "";
  store.prefs.set({ draft: "" });
  draftChanged();
  if (!current.messages.length && !current.named) current.title = store.titleOf(content);
  current.messages.push({ role: "user", content, at: Date.now() });
  answer();
}

function tooMany() {
  if (running.size >= MOST_AT_ONCE) toast(`${MOST_AT_ONCE} replies are being written already. Wait for one of them.`);
  return running.size >= MOST_AT_ONCE;
}

function answer() {
  current.messages.push({ role: "assistant", at: Date.now(), shown: 0, versions: [newVersion()] });
  pinned = true;
  write(current, current.messages.length - 1);
  drawMessages();
  drawAround();
}

/** Let the model write the shown version of message `at`. */
async function write(c, at) {
  const message = c.messages[at], version = store.shown(message), abort = new AbortController();
  running.set(c.id, { abort, version });
  touch(c);
  announce("Writing");
  let frame = 0, saved = Date.now(), request = null;
  const show = () => {
    frame = 0;
    if (current !== c) return;
    $("messages").children[at]?.view?.update();
    follow();
  };
  const changed = () => {
    frame ||= document.hidden ? setTimeout(show, 500) : requestAnimationFrame(show);
    if (Date.now() - saved > 1000) (store.save(c), (saved = Date.now()));
  };
  const load = async () => {
    const answer = request && (await fetchExperts(request));
    if (answer) experts.set(version, answer);
    if (answer && current === c) drawAround();
  };
  const timer = setInterval(load, 1000);
  askNow();
  await reply(c, version, at, abort.signal, { changed, needKey: askKey, started: (id) => ((request = id), askNow()) });
  clearInterval(timer);
  running.delete(c.id);
  if (conversations.includes(c)) touch(c);
  if (current === c) {
    for (const el of $("messages").children) el.view?.update();
    follow();
  }
  drawAround();
  const n = version.usage?.completion_tokens;
  announce(version.finish === "error" ? `Error. ${version.error}` : `Reply ${version.finish === "stop" ? "finished" : "ended"}${n ? `, ${count(n)} tokens` : ""}`);
  await load();
  askNow();
}

const stop = () => running.get(current.id)?.abort.abort();

function regenerate() {
  const last = current.messages.at(-1);
  if (isBusy() || last?.role !== "assistant" || tooMany()) return;
  const failed = !store.shown(last).content;
  if (failed) last.versions[last.shown] = newVersion();  // nothing to go back to
  else last.shown = last.versions.push(newVersion()) - 1;
  pinned = true;
  write(current, current.messages.length - 1);
  drawMessages();
  drawAround();
}

function showVersion(message, step) {
  message.shown = Math.min(Math.max(0, message.shown + step), message.versions.length - 1);
  store.save(current);
  drawMessages();
  drawAround();
}

function startEdit() {
  const at = current.messages.findLastIndex((m) => m.role === "user");
  if (at < 0 || isBusy() || editing || tooMany()) return;
  editing = true;
  const message = current.messages[at];
  editInPlace($("messages").children[at], message.content, (value) => {
    editing = false;
    if (value === null) {
      drawMessages();
    } else {
      if (at === 0 && !current.named) current.title = store.titleOf(value);
      current.messages.splice(at, Infinity, { role: "user", content: value, at: Date.now() });
      answer();
    }
    $("input").focus();
  });
}

// ---- the message box -------------------------------------------------------------------------------------------------
let draftTimer = 0, draftCount = 0;

function draftChanged() {
  const box = $("input"), value = box.value;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  clearTimeout(draftTimer);
  draftTooLong = false;
  const mine = ++draftCount;
  say(value.length > LONG_DRAFT ? draftNote(value.length, null) : { text: "" });
  if (value.length > LONG_DRAFT && server.state === "ready") draftTimer = setTimeout(async () => {
    let n;
    try {
      const answer = await postJson("/tokenize", { messages: [...store.messagesFor(current), { role: "user", content: value }] });
      n = answer.count ?? answer.tokens?.length ?? null;
    } catch (e) {
      if (e.status === 413 && mine === draftCount) say({ text: "Longer than the server accepts. Shorten it to send.", bad: true, tooLong: true });
      return;
    }
    if (mine === draftCount) say(draftNote(value.length, n));
  }, 350);
}

function say(note) {
  draftTooLong = !!note.tooLong;
  text($("draft-note"), note.text);
  $("draft-note").classList.toggle("bad", !!note.bad);
  $("send").disabled = !$("input").value.trim() || draftTooLong;
}

let saveTimer = 0;
function saveDraft() {
  clearTimeout(saveTimer);
  const value = $("input").value;
  if ((current.draft ?? "") === value) return;
  current.draft = value;
  if (current.messages.length) store.save(current);
  else store.prefs.set({ draft: value });
}

$("input").addEventListener("input", () => {
  draftChanged();
  clearTimeout(saveTimer);
  saveTimer = setTimeout(saveDraft, 400);
});
$("input").addEventListener("keydown", (e) => {
  if (e.isComposing || e.altKey) return;
  if (e.key === "Enter" && !e.shiftKey) (e.preventDefault(), send());
  if (e.key === "ArrowUp" && !$("input").value) (e.preventDefault(), startEdit());
  if (e.key === "PageUp" || e.key === "PageDown") {
    e.preventDefault();
    $("scroll").scrollBy({ top: (e.key === "PageUp" ? -0.85 : 0.85) * $("scroll").clientHeight });
  }
});
$("composer").addEventListener("submit", (e) => (e.preventDefault(), send()));
$("composer").addEventListener("click", (e) => e.target === e.currentTarget && $("input").focus());
$("stop").addEventListener("click", () => (stop(), $("input").focus()));

// ---- conversations ---------------------------------------------------------------------------------------------------
function startNew() {
  closeOver();
  open(current.messages.length ? store.create() : current);
  $("input").focus();
}

function remove(c) {
  running.get(c.id)?.abort.abort();
  const place = conversations.indexOf(c);
  conversations = conversations.filter((x) => x !== c);
  store.drop(c.id);
  if (c === current) open(conversations[Math.min(place, conversations.length - 1)] ?? store.create());
  else drawAround();
  toast(`Deleted “${c.title.slice(0, 40)}”.`, ["Undo", () => {
    conversations = [...conversations, c].sort((a, b) => b.updated - a.updated);
    store.save(c);
    open(c);
  }]);
}

function neighbour(step) {
  const at = conversations.indexOf(current), next = conversations[at < 0 ? 0 : at + step];
  if (next) open(next);
}

buildSidebar({
  isBusy,
  open: (c) => (closeOver(), c !== current && open(c)),
  rename(c, title) {
    Object.assign(c, { title, named: true });
    store.save(c);
    drawAround();
  },
  remove,
});
$("new").addEventListener("click", startNew);
$("export-all").addEventListener("click", () => {
  if (!conversations.length) return toast("There is nothing to export yet.");
  download("lamoe-conversations.json", "application/json", JSON.stringify(conversations, null, 1));
});
store.onFull((message) => toast(message, null, 20000));
store.onForeignChange((id) => {
  if (running.has(id)) return;
  const fresh = store.load(id);
  conversations = [...conversations.filter((c) => c.id !== id), ...(fresh ? [fresh] : [])].sort((a, b) => b.updated - a.updated);
  if (current.id === id && fresh) {
    fresh.draft = $("input").value;
    open(fresh);
  } else drawAround();
});

// ---- keys ------------------------------------------------------------------------------------------------------------
const isField = (el) => el.matches?.("textarea, input:not([type=range], [type=radio]), [contenteditable]");
const ALT = {
  KeyN: startNew, KeyR: regenerate, KeyB: () => toggle("side"), KeyP: () => toggle("panel"), KeyS: () => showTab("settings", true),
  ArrowUp: () => neighbour(-1), ArrowDown: () => neighbour(1),
};
$("key-button").addEventListener("click", () => (closeOver(), askKey()));
addEventListener("keydown", (e) => {
  if (e.isComposing || document.querySelector("dialog[open]")) return;
  if (e.altKey && !e.ctrlKey && !e.metaKey && !e.shiftKey && ALT[e.code]) {
    e.preventDefault();
    ALT[e.code]();
  } else if (e.key === "Escape" && !document.querySelector(":popover-open")) {
    if (!closeOver()) stop();
  } else if (!e.altKey && !e.ctrlKey && !e.metaKey && !isField(e.target)) {
    if (e.key === "?") (e.preventDefault(), $("help").showModal());
    if (e.key === "/") (e.preventDefault(), $("input").focus());
  }
});
addEventListener("pagehide", () => {
  saveDraft();
  for (const c of conversations) if (running.has(c.id)) store.save(c);
});

// ---- start -----------------------------------------------------------------------------------------------------------
for (const words of STARTERS) {
  $("starters").append(h("li", {}, h("button", { type: "button", onclick: () => {
    $("input").value = words;
    draftChanged();
    $("input").focus();
  } }, words)));
}
buildLayout();
buildSettings(() => current.messages.length && store.save(current));
const { open: id, draft = "" } = store.prefs.get();
current.draft = draft;
$("input").value = draft;
open(conversations.find((c) => c.id === id) ?? current);
drawServer();
if (matchMedia("(hover: hover)").matches) $("input").focus();
watch(() => running.size > 0, () => (drawServer(), drawAround()));
