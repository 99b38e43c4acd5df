// The message box: its height, the note about long drafts, and the storing of drafts.
// app.js passes the functions that it calls as `actions`:
// {conversation(), send(), stop(), editLast()}.

import { $, count, text } from "./dom.js";
import { postJson } from "./api.js";
import { server } from "./panel.js";
import * as store from "./store.js";

const LONG_DRAFT = 1500; // characters from which the server counts the tokens of a draft
const COUNT_DELAY_MS = 350; // after the last change
const SAVE_DELAY_MS = 400;

let actions = null;
let isTooLong = false;
let countTimer = 0;
let saveTimer = 0;
let numChanges = 0; // a token count that arrives after a further change is dropped

/** Connect the message box. */
export function buildComposer(callbacks) {
  actions = callbacks;
  $("input").addEventListener("input", () => {
    draftChanged();
    clearTimeout(saveTimer);
    saveTimer = setTimeout(saveDraft, SAVE_DELAY_MS);
  });
  $("input").addEventListener("keydown", handleKey);
  $("composer").addEventListener("submit", (e) => {
    e.preventDefault();
    actions.send();
  });
  $("composer").addEventListener("click", (e) => {
    if (e.target === e.currentTarget) $("input").focus();
  });
  $("stop").addEventListener("click", () => {
    actions.stop();
    $("input").focus();
  });
}

function handleKey(e) {
  if (e.isComposing || e.altKey) return;
  if (e.key === "Enter" && !e.shiftKey) {
    e.preventDefault();
    actions.send();
  }
  if (e.key === "ArrowUp" && !$("input").value) {
    e.preventDefault();
    actions.editLast();
  }
  if (e.key === "PageUp" || e.key === "PageDown") {
    e.preventDefault();
    const pages = e.key === "PageUp" ? -0.85 : 0.85;
    $("scroll").scrollBy({ top: pages * $("scroll").clientHeight });
  }
}

/** Return the text of the message box, or null if it is empty or too long to send. */
export function sendableDraft() {
  const { value } = $("input");
  return value.trim() && !isTooLong ? value : null;
}

/** Replace the text of the message box. */
export function setDraft(value) {
  $("input").value = value;
  draftChanged();
}

/** Adapt the height of the box, and count the tokens of a long draft. */
function draftChanged() {
  const input = $("input");
  const { value } = input;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  clearTimeout(countTimer);
  numChanges += 1;
  const isLong = value.length > LONG_DRAFT;
  showNote(isLong ? { text: `${count(value.length)} characters` } : { text: "" });
  if (isLong && server.state === "ready") {
    countTimer = setTimeout(() => countTokens(value, numChanges), COUNT_DELAY_MS);
  }
}

async function countTokens(value, change) {
  const messages = [...store.messagesFor(actions.conversation()), { role: "user", content: value }];
  let note;
  try {
    const response = await postJson("/tokenize", { messages });
    note = tokenNote(value, response.count ?? response.tokens?.length ?? null);
  } catch (e) {
    if (e.status !== 413) return; // the count is optional
    note = { text: "Longer than the server accepts. Shorten it to send.", isTooLong: true };
  }
  if (change === numChanges) showNote(note);
}

/** Make the note for a draft that, with its conversation, has `n` tokens (null: not known). */
function tokenNote(value, n) {
  const contextLength = server.stats?.max_model_len;
  if (n === null) return { text: `${count(value.length)} characters` };
  const size = `${count(n)} tokens with the conversation`;
  if (contextLength && n >= contextLength) {
    const limit = `this model reads ${count(contextLength)}. Shorten it to send.`;
    return { text: `${size}; ${limit}`, isTooLong: true };
  }
  return { text: contextLength ? `${size}, of ${count(contextLength)}` : size };
}

function showNote(note) {
  isTooLong = !!note.isTooLong;
  text($("draft-note"), note.text);
  $("draft-note").classList.toggle("bad", isTooLong);
  $("send").disabled = sendableDraft() === null;
}

/** Store the draft with its conversation, or apart if the conversation has no messages yet. */
export function saveDraft() {
  clearTimeout(saveTimer);
  const { value } = $("input");
  const conversation = actions.conversation();
  if ((conversation.draft ?? "") === value) return;
  conversation.draft = value;
  if (conversation.messages.length) store.save(conversation);
  else store.prefs.set({ draft: value });
}
