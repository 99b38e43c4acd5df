// The list of conversations. It draws what it is given; `acts` says what happens: open(c), rename(c, title), remove(c), isBusy(c).

import { $, download, h, icon, text } from "./dom.js";
import { asMarkdown, fileName, shown } from "./store.js";

let acts = null, all = [], current = null, menuFor = null, opener = null, drawn = "";

export function buildSidebar(does) {
  acts = does;
  $("filter").addEventListener("input", draw);
  $("list").addEventListener("keydown", keys);
  $("menu").addEventListener("click", (e) => {
    const what = e.target.closest("button")?.dataset.do;
    if (!what) return;
    $("menu").hidePopover();
    if (what === "rename") return rename(menuFor.id);
    if (what === "delete") return acts.remove(menuFor);
    if (what === "markdown") download(fileName(menuFor.title, "md"), "text/markdown", asMarkdown(menuFor));
    else download(fileName(menuFor.title, "json"), "application/json", JSON.stringify(menuFor, null, 1));
    opener?.focus();
  });
  $("menu").addEventListener("keydown", (e) => {
    if (e.key !== "ArrowDown" && e.key !== "ArrowUp") return;
    e.preventDefault();
    const items = [...$("menu").querySelectorAll("button")], at = items.indexOf(document.activeElement);
    items[(at + (e.key === "ArrowDown" ? 1 : items.length - 1)) % items.length].focus();
  });
}

/** Show `conversations` (the last used first) with `c` marked. */
export function showList(conversations, c) {
  [all, current] = [conversations, c];
  const now = JSON.stringify([c.id, all.map((x) => [x.id, x.title, day(x.updated), acts.isBusy(x)])]);
  if (now === drawn || document.querySelector("#list input")) return;  // nothing new, or somebody is renaming
  drawn = now;
  draw();
}

function day(time) {
  const midnight = new Date().setHours(0, 0, 0, 0), days = (midnight - time) / 864e5;
  return days <= 0 ? "Today" : days <= 1 ? "Yesterday" : days <= 7 ? "The last seven days" : "Older";
}

function draw() {
  const wanted = $("filter").value.trim().toLowerCase();
  $("filter").hidden = all.length < 8 && !wanted;
  const found = all.filter((c) => !wanted || [c.title, ...c.messages.map((m) => m.content ?? shown(m).content)].some((t) => t.toLowerCase().includes(wanted)));
  const focused = document.activeElement?.closest?.("#list li")?.dataset.id;
  const focusMore = document.activeElement?.classList.contains("more");
  let heading = null;
  const rows = [];
  for (const c of found) {
    if (day(c.updated) !== heading) rows.push(h("li", { class: "day" }, (heading = day(c.updated))));
    rows.push(item(c));
  }
  $("list").replaceChildren(...rows);
  text($("list-empty"), wanted ? "Nothing found." : "Nothing here yet.");
  $("list-empty").hidden = found.length > 0;
  if (focused) row(focused)?.querySelector(focusMore ? ".more" : ".open")?.focus();
}

function item(c) {
  const isCurrent = c.id === current?.id, busy = acts.isBusy(c);
  const more = h("button", { type: "button", class: "ghost small more", "aria-label": `Options for ${c.title}`, title: "Options", "aria-haspopup": "true", onclick: () => menu(c, more) }, icon("more"));
  const open = h("button", { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, title: c.title, onclick: () => acts.open(c) }, c.title);
  return h("li", { class: `item${isCurrent ? " current" : ""}${busy ? " busy" : ""}`, "data-id": c.id }, open, more);
}

const row = (id) => [...$("list").children].find((li) => li.dataset.id === id);

function menu(c, button) {
  [menuFor, opener] = [c, button];
  const area = button.getBoundingClientRect(), box = $("menu");
  box.showPopover();
  box.style.left = `${Math.min(area.left, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(area.bottom + 4, innerHeight - box.offsetHeight - 8)}px`;
  box.querySelector("button").focus();
}

function rename(id) {
  const li = row(id), c = all.find((x) => x.id === id);
  if (!li) return;
  const input = h("input", { class: "field", "aria-label": "Title", maxlength: "120" });
  input.value = c.title;
  let done = false;
  const end = (keep) => {
    if (done) return;
    done = true;
    input.remove();
    if (keep && input.value.trim() && input.value.trim() !== c.title) acts.rename(c, input.value.trim());
    else draw();
    row(id)?.querySelector(".open").focus();
  };
  input.addEventListener("keydown", (e) => {
    e.stopPropagation();
    if (e.key === "Enter" && !e.isComposing) end(true);
    if (e.key === "Escape") end(false);
  });
  input.addEventListener("blur", () => end(true));
  li.replaceChildren(input);
  input.focus();
  input.select();
}

function keys(e) {
  const li = e.target.closest("li.item");
  if (!li || e.altKey || e.ctrlKey || e.metaKey) return;
  const c = all.find((x) => x.id === li.dataset.id);
  if (e.key === "F2") (e.preventDefault(), rename(c.id));
  if (e.key === "Delete") (e.preventDefault(), acts.remove(c));
  if (e.key === "ArrowDown" || e.key === "ArrowUp") {
    e.preventDefault();
    const items = [...$("list").querySelectorAll(".open")], at = items.indexOf(li.querySelector(".open")) + (e.key === "ArrowDown" ? 1 : -1);
    items[at]?.focus();
  }
}
