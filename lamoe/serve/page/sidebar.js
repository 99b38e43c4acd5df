// The list of conversations. app.js passes what the buttons do as `actions`:
// {open(conversation), rename(conversation, title), remove(conversation), isBusy(conversation)}.

import { $, download, h, icon, text } from "./dom.js";
import { asMarkdown, fileName, shown } from "./store.js";

const DAY_MS = 864e5;
let actions = null;
let all = []; // conversations
let current = null; // the open conversation
let menuTarget = null; // the conversation whose menu is open
let menuButton = null;
let drawnState = ""; // what the list shows, as JSON

/** Connect the list, its search field and its menu. */
export function buildSidebar(callbacks) {
  actions = callbacks;
  $("filter").addEventListener("input", draw);
  $("list").addEventListener("keydown", handleListKey);
  $("menu").addEventListener("click", (e) => {
    const action = e.target.closest("button")?.dataset.do;
    if (action) runMenu(action);
  });
  $("menu").addEventListener("keydown", (e) => {
    if (e.key !== "ArrowDown" && e.key !== "ArrowUp") return;
    e.preventDefault();
    const items = [...$("menu").querySelectorAll("button")];
    const step = e.key === "ArrowDown" ? 1 : items.length - 1;
    items[(items.indexOf(document.activeElement) + step) % items.length].focus();
  });
}

function runMenu(action) {
  $("menu").hidePopover();
  const { title } = menuTarget;
  if (action === "rename") return startRename(menuTarget.id);
  if (action === "delete") return actions.remove(menuTarget);
  if (action === "markdown") {
    download(fileName(title, "md"), "text/markdown", asMarkdown(menuTarget));
  } else {
    const json = JSON.stringify(menuTarget, null, 1);
    download(fileName(title, "json"), "application/json", json);
  }
  menuButton?.focus();
}

/** Show conversations, which are sorted by last use, and mark the open one. */
export function showList(conversations, openConversation) {
  all = conversations;
  current = openConversation;
  const rows = all.map((c) => [c.id, c.title, dayOf(c.updated), actions.isBusy(c)]);
  const state = JSON.stringify([current.id, rows]);
  const isRenaming = document.querySelector("#list input");
  if (state === drawnState || isRenaming) return;
  drawnState = state;
  draw();
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = (midnight - time) / DAY_MS;
  if (days <= 0) return "Today";
  if (days <= 1) return "Yesterday";
  return days <= 7 ? "The last seven days" : "Older";
}

function matches(conversation, query) {
  const contents = conversation.messages.map((m) => m.content ?? shown(m).content);
  return [conversation.title, ...contents].some((part) => part.toLowerCase().includes(query));
}

function draw() {
  const query = $("filter").value.trim().toLowerCase();
  $("filter").hidden = all.length < 8 && !query;
  const found = all.filter((conversation) => !query || matches(conversation, query));
  const focusedId = document.activeElement?.closest?.("#list li")?.dataset.id;
  const focusedMenu = document.activeElement?.classList.contains("more");
  let heading = null;
  const rows = [];
  for (const conversation of found) {
    const day = dayOf(conversation.updated);
    if (day !== heading) rows.push(h("li", { class: "day" }, day));
    heading = day;
    rows.push(buildRow(conversation));
  }
  $("list").replaceChildren(...rows);
  text($("list-empty"), query ? "Nothing found." : "Nothing here yet.");
  $("list-empty").hidden = found.length > 0;
  if (focusedId)
    rowOf(focusedId)
      ?.querySelector(focusedMenu ? ".more" : ".open")
      ?.focus();
}

function buildRow(conversation) {
  const { id, title } = conversation;
  const isCurrent = id === current?.id;
  const more = h(
    "button",
    {
      type: "button",
      class: "ghost small more",
      "aria-label": `Options for ${title}`,
      title: "Options",
      "aria-haspopup": "true",
      onclick: () => showMenu(conversation, more),
    },
    icon("more"),
  );
  const open = h(
    "button",
    {
      type: "button",
      class: "open",
      "aria-current": isCurrent ? "true" : null,
      title,
      onclick: () => actions.open(conversation),
    },
    title,
  );
  const classes = ["item", isCurrent && "current", actions.isBusy(conversation) && "busy"];
  return h("li", { class: classes.filter(Boolean).join(" "), "data-id": id }, open, more);
}

const rowOf = (id) => [...$("list").children].find((row) => row.dataset.id === id);

function showMenu(conversation, button) {
  menuTarget = conversation;
  menuButton = button;
  const area = button.getBoundingClientRect();
  const menu = $("menu");
  menu.showPopover();
  menu.style.left = `${Math.min(area.left, innerWidth - menu.offsetWidth - 8)}px`;
  menu.style.top = `${Math.min(area.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.querySelector("button").focus();
}

/** Replace the row of a conversation by a text field for its title. */
function startRename(id) {
  const row = rowOf(id);
  const conversation = all.find((c) => c.id === id);
  if (!row) return;
  const input = h("input", { class: "field", "aria-label": "Title", maxlength: "120" });
  input.value = conversation.title;
  let ended = false; // removing the field causes a blur event, which ends the renaming again
  const end = (keep) => {
    if (ended) return;
    ended = true;
    input.remove();
    const title = input.value.trim();
    if (keep && title && title !== conversation.title) actions.rename(conversation, title);
    else draw();
    rowOf(id)?.querySelector(".open").focus();
  };
  input.addEventListener("keydown", (e) => {
    e.stopPropagation();
    if (e.key === "Enter" && !e.isComposing) end(true);
    if (e.key === "Escape") end(false);
  });
  input.addEventListener("blur", () => end(true));
  row.replaceChildren(input);
  input.focus();
  input.select();
}

function handleListKey(e) {
  const row = e.target.closest("li.item");
  if (!row || e.altKey || e.ctrlKey || e.metaKey) return;
  const conversation = all.find((c) => c.id === row.dataset.id);
  const run = {
    F2: () => startRename(conversation.id),
    Delete: () => actions.remove(conversation),
    ArrowDown: () => focusNeighbour(row, 1),
    ArrowUp: () => focusNeighbour(row, -1),
  }[e.key];
  if (!run) return;
  e.preventDefault();
  run();
}

function focusNeighbour(row, step) {
  const buttons = [...$("list").querySelectorAll(".open")];
  buttons[buttons.indexOf(row.querySelector(".open")) + step]?.focus();
}
