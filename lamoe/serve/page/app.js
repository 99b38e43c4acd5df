// The page: the open conversation, running replies, buttons and shortcuts. START READING HERE.
//
// dom       elements, texts, numbers         store     conversations in localStorage
// api       HTTP                             run       one reply, with retries
// messages  messages as elements             markdown  Markdown as safe elements
// composer  the message box                  sidebar   the list of conversations
// settings  sampling parameters              layout    columns, tabs, theme
// status    the state of the server          key       the dialog for the API key
// panel     live statistics                  heat      expert load of a reply
//
// All files are plain ES modules, without a build step. Nothing is loaded from other servers.

import { $, announce, count, download, h, text, toast } from "./dom.js";
import * as store from "./store.js";
import { buildComposer, saveDraft, sendableDraft, setDraft } from "./composer.js";
import { askKey } from "./key.js";
import { buildLayout, closeOverlay, showTab, toggle } from "./layout.js";
import { editInPlace, messageElement } from "./messages.js";
import { fetchExperts, pollNow, server, showReply, watch } from "./panel.js";
import { newVersion, reply } from "./run.js";
import { buildSettings, showSettings } from "./settings.js";
import { buildSidebar, showList } from "./sidebar.js";
import { showStatus } from "./status.js";

// A browser opens at most six connections to a server, and the panel needs one.
const MAX_REPLIES = 4;
const SAVE_INTERVAL_MS = 1000; // while a reply is written
const STARTERS = [
  "Explain in three sentences how a model can keep a small latent instead of all keys and values.",
  "Write a Python function that merges two sorted lists, with a docstring and a test.",
  "Go on in the same tone: It is a truth universally acknowledged, that a single man in " +
    "possession of a good fortune",
];

let conversations = store.all();
let current = store.create();
const running = new Map(); // conversation id -> AbortController of its reply
const experts = new WeakMap(); // version -> expert load, which is too large for localStorage
let isPinned = true; // whether the view follows the end of the conversation
let isEditing = false;

const isBusy = (conversation = current) => running.has(conversation.id);
const messageActions = { isBusy, regenerate, showVersion, startEdit };

// ---- drawing ------------------------------------------------------------------------------------
function open(conversation) {
  saveDraft();
  isEditing = false;
  current = conversation;
  store.prefs.set({ open: conversation.id });
  isPinned = true;
  drawMessages();
  showSettings(conversation);
  setDraft(conversation.draft ?? "");
  drawSurroundings();
}

function drawMessages() {
  const elements = current.messages.map((m) => messageElement(m, current, messageActions));
  $("messages").replaceChildren(...elements);
  $("empty").hidden = current.messages.length > 0;
  follow();
}

/** Draw everything that depends on the open conversation, except its messages. */
function drawSurroundings() {
  showList(conversations, current);
  text($("title"), current.title);
  document.title = current.messages.length ? `${current.title} · lamoe` : "lamoe";
  $("stop").hidden = !isBusy();
  $("send").hidden = isBusy();
  const last = current.messages.at(-1);
  const version = last?.role === "assistant" ? store.shown(last) : null;
  showReply(version && { ...version, experts: experts.get(version) });
  const limit = server.stats?.max_model_len;
  const used = version?.usage?.total_tokens;
  const use = used && limit ? `${count(used)} of ${count(limit)} tokens of context` : "";
  text($("context"), use);
  $("context").classList.toggle("bad", used > 0.9 * limit);
}

/** Scroll to the end if the view is pinned there, else offer a button for that. */
function follow() {
  if (isPinned) $("scroll").scrollTop = $("scroll").scrollHeight;
  $("latest").hidden = isPinned || !current.messages.length;
}

let lastTop = 0;
$("scroll").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("scroll");
  const isAtEnd = scrollHeight - scrollTop - clientHeight < 30;
  // The text may have grown since `follow`. Only scrolling up means that the reader has left.
  isPinned = isAtEnd || (isPinned && scrollTop >= lastTop);
  lastTop = scrollTop;
  $("latest").hidden = isPinned || !current.messages.length;
});
$("latest").addEventListener("click", () => {
  isPinned = true;
  follow();
});
const resized = new ResizeObserver(follow);
resized.observe($("scroll"));
resized.observe($("messages")); // formatted text arrives later than the message

// ---- generating ---------------------------------------------------------------------------------
/** Mark a conversation as used now, and store it. */
function touch(conversation) {
  conversation.updated = Date.now();
  const others = conversations.filter((c) => c.id !== conversation.id);
  conversations = [conversation, ...others];
  store.save(conversation);
}

function send() {
  const content = sendableDraft();
  if (content === null || isBusy() || isAtLimit()) return;
  current.draft = "";
  store.prefs.set({ draft: "" });
  setDraft("");
  if (!current.messages.length && !current.named) current.title = store.titleOf(content);
  current.messages.push({ role: "user", content, at: Date.now() });
  startReply();
}

/** Tell whether no further reply can be started, and show a message if so. */
function isAtLimit() {
  if (running.size < MAX_REPLIES) return false;
  toast(`${MAX_REPLIES} replies are being written already. Wait for one of them.`);
  return true;
}

function startReply() {
  const message = { role: "assistant", at: Date.now(), shown: 0, versions: [newVersion()] };
  current.messages.push(message);
  generateLast();
}

/** Generate the shown version of the last message. */
function generateLast() {
  isPinned = true;
  generate(current, current.messages.length - 1);
  drawMessages();
  drawSurroundings();
}

/** Generate the shown version of message number `index`. */
async function generate(conversation, index) {
  const version = store.shown(conversation.messages[index]);
  const abort = new AbortController();
  running.set(conversation.id, abort);
  touch(conversation);
  announce("Writing");
  let requestId = null;
  const loadExperts = async () => {
    const load = requestId && (await fetchExperts(requestId));
    if (!load) return;
    experts.set(version, load);
    if (current === conversation) drawSurroundings();
  };
  const timer = setInterval(loadExperts, 1000);
  pollNow();
  await reply(conversation, version, index, abort.signal, {
    changed: progressHandler(conversation, index),
    needKey: askKey,
    started(id) {
      requestId = id;
      pollNow();
    },
  });
  clearInterval(timer);
  running.delete(conversation.id);
  if (conversations.includes(conversation)) touch(conversation);
  if (current === conversation) {
    for (const element of $("messages").children) element.view?.update();
    follow();
  }
  drawSurroundings();
  announceEnd(version);
  await loadExperts();
  pollNow();
}

/** Make the function to call when a reply has grown: it draws once per frame and saves at times. */
function progressHandler(conversation, index) {
  let frame = 0;
  let saved = performance.now();
  const draw = () => {
    frame = 0;
    if (current !== conversation) return;
    $("messages").children[index]?.view?.update();
    follow();
  };
  return () => {
    // a hidden page gets no animation frames
    frame ||= document.hidden ? setTimeout(draw, 500) : requestAnimationFrame(draw);
    if (performance.now() - saved > SAVE_INTERVAL_MS) {
      store.save(conversation);
      saved = performance.now();
    }
  };
}

function announceEnd(version) {
  if (version.finish === "error") return announce(`Error. ${version.error}`);
  const tokens = version.usage?.completion_tokens;
  const size = tokens ? `, ${count(tokens)} tokens` : "";
  announce(`Reply ${version.finish === "stop" ? "finished" : "ended"}${size}`);
}

function stop() {
  running.get(current.id)?.abort();
}

function regenerate() {
  const last = current.messages.at(-1);
  if (isBusy() || last?.role !== "assistant" || isAtLimit()) return;
  // replace an empty version, because nobody wants to go back to it
  if (!store.shown(last).content) last.versions[last.shown] = newVersion();
  else last.shown = last.versions.push(newVersion()) - 1;
  generateLast();
}

function showVersion(message, step) {
  message.shown = Math.min(Math.max(0, message.shown + step), message.versions.length - 1);
  store.save(current);
  drawMessages();
  drawSurroundings();
}

/** Edit the last message of the user. Sending it again drops what follows. */
function startEdit() {
  const index = current.messages.findLastIndex((message) => message.role === "user");
  if (index < 0 || isBusy() || isEditing || isAtLimit()) return;
  isEditing = true;
  editInPlace($("messages").children[index], current.messages[index].content, (content) => {
    isEditing = false;
    if (content === null) {
      drawMessages();
    } else {
      if (index === 0 && !current.named) current.title = store.titleOf(content);
      current.messages.splice(index, Infinity, { role: "user", content, at: Date.now() });
      startReply();
    }
    $("input").focus();
  });
}

// ---- conversations ------------------------------------------------------------------------------
function startNew() {
  closeOverlay();
  open(current.messages.length ? store.create() : current);
  $("input").focus();
}

function remove(conversation) {
  running.get(conversation.id)?.abort();
  const index = conversations.indexOf(conversation);
  conversations = conversations.filter((c) => c !== conversation);
  store.drop(conversation.id);
  const next = conversations[Math.min(index, conversations.length - 1)];
  if (conversation === current) open(next ?? store.create());
  else drawSurroundings();
  const undo = () => {
    conversations = sortByUse([...conversations, conversation]);
    store.save(conversation);
    open(conversation);
  };
  toast(`Deleted “${conversation.title.slice(0, 40)}”.`, ["Undo", undo]);
}

const sortByUse = (list) => list.sort((a, b) => b.updated - a.updated);

function openNeighbour(step) {
  const index = conversations.indexOf(current);
  const next = conversations[index < 0 ? 0 : index + step];
  if (next) open(next);
}

function exportAll() {
  if (!conversations.length) return toast("There is nothing to export yet.");
  const json = JSON.stringify(conversations, null, 1);
  download("lamoe-conversations.json", "application/json", json);
}

/** Take over a change that another tab has stored. */
function adoptChange(id) {
  if (running.has(id)) return;
  const changed = store.load(id);
  const others = conversations.filter((c) => c.id !== id);
  conversations = sortByUse(changed ? [...others, changed] : others);
  if (current.id === id && changed) {
    changed.draft = $("input").value;
    open(changed);
  } else {
    drawSurroundings();
  }
}

// ---- shortcuts ----------------------------------------------------------------------------------
const ALT_SHORTCUTS = {
  KeyN: startNew,
  KeyR: regenerate,
  KeyB: () => toggle("side"),
  KeyP: () => toggle("panel"),
  KeyS: () => showTab("settings", true),
  ArrowUp: () => openNeighbour(-1),
  ArrowDown: () => openNeighbour(1),
};
const SHORTCUTS = {
  "?": () => $("help").showModal(),
  "/": () => $("input").focus(),
};
const FIELDS = "textarea, input:not([type=range], [type=radio]), [contenteditable]";

function handleKey(e) {
  if (e.isComposing || document.querySelector("dialog[open]")) return;
  const noModifier = !e.ctrlKey && !e.metaKey;
  if (e.altKey && noModifier && !e.shiftKey && ALT_SHORTCUTS[e.code]) {
    e.preventDefault();
    ALT_SHORTCUTS[e.code]();
  } else if (e.key === "Escape" && !document.querySelector(":popover-open")) {
    if (!closeOverlay()) stop();
  } else if (!e.altKey && noModifier && SHORTCUTS[e.key] && !e.target.matches?.(FIELDS)) {
    e.preventDefault();
    SHORTCUTS[e.key]();
  }
}

// ---- start --------------------------------------------------------------------------------------
function buildStarters() {
  for (const starter of STARTERS) {
    const onclick = () => {
      setDraft(starter);
      $("input").focus();
    };
    $("starters").append(h("li", {}, h("button", { type: "button", onclick }, starter)));
  }
}

buildSidebar({
  isBusy,
  open(conversation) {
    closeOverlay();
    if (conversation !== current) open(conversation);
  },
  rename(conversation, title) {
    Object.assign(conversation, { title, named: true });
    store.save(conversation);
    drawSurroundings();
  },
  remove,
});
buildComposer({ conversation: () => current, send, stop, editLast: startEdit });
buildStarters();
buildLayout();
buildSettings(() => current.messages.length && store.save(current));
$("new").addEventListener("click", startNew);
$("export-all").addEventListener("click", exportAll);
$("key-button").addEventListener("click", () => {
  closeOverlay();
  askKey();
});
addEventListener("keydown", handleKey);
addEventListener("pagehide", () => {
  saveDraft();
  for (const conversation of conversations) if (isBusy(conversation)) store.save(conversation);
});
store.onFull((message) => toast(message, null, 20000));
store.onForeignChange(adoptChange);

const { open: openId, draft = "" } = store.prefs.get();
current.draft = draft;
$("input").value = draft;
open(conversations.find((conversation) => conversation.id === openId) ?? current);
showStatus();
if (matchMedia("(hover: hover)").matches) $("input").focus();
watch(
  () => running.size > 0,
  () => {
    showStatus();
    drawSurroundings();
  },
);
