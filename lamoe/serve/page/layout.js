// Where things are: the two side columns (beside the page when there is room, over it when not), the tabs, the theme, the dialogs.

import { $ } from "./dom.js";
import { redraw } from "./panel.js";
import { prefs } from "./store.js";

const narrow = { side: matchMedia("(max-width: 799px)"), panel: matchMedia("(max-width: 1139px)") };
const body = document.body;
let opener = null;

const isOver = (name) => narrow[name].matches;
const isOpen = (name) => (isOver(name) ? body.classList.contains(`over-${name}`) : !body.classList.contains(`no-${name}`));

function settle() {
  for (const name of ["side", "panel"]) {
    if (!isOver(name)) body.classList.remove(`over-${name}`);
    $(`${name}-open`).setAttribute("aria-expanded", String(isOpen(name)));
  }
  const over = ["side", "panel"].find((name) => body.classList.contains(`over-${name}`));
  $("main").inert = !!over;
  for (const name of ["side", "panel"]) $(name).inert = !!over && over !== name;
}

/** Open, close (or, with no second argument, toggle) a column. */
export function toggle(name, open = !isOpen(name)) {
  if (isOver(name)) {
    if (open) opener = document.activeElement;
    body.classList.remove("over-side", "over-panel");
    body.classList.toggle(`over-${name}`, open);
    settle();
    if (open) $(`${name}-close`).focus();
    else opener?.focus?.();
    return;
  }
  const hadFocus = $(name).contains(document.activeElement);
  body.classList.toggle(`no-${name}`, !open);
  prefs.set({ [name]: open });
  settle();
  if (!open && hadFocus) $(`${name}-open`).focus();
}

/** Close what lies over the page; true when something did. */
export function closeOver() {
  const over = ["side", "panel"].find((name) => body.classList.contains(`over-${name}`));
  if (over) toggle(over, false);
  return !!over;
}

/** Show a tab of the panel ("live" or "settings"), and the panel. */
export function showTab(name, focus = false) {
  for (const each of ["live", "settings"]) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", String(each === name));
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  if (!isOpen("panel")) toggle("panel", true);
  if (focus) (name === "settings" ? $("system") : $("tab-live")).focus();
  redraw();
}

function theme(value) {
  if (value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  redraw();
}

/** Wire it all up, as it was left. */
export function buildLayout() {
  const p = prefs.get();
  body.classList.toggle("no-side", p.side === false);
  body.classList.toggle("no-panel", p.panel === false);
  for (const name of ["side", "panel"]) {
    $(`${name}-open`).addEventListener("click", () => toggle(name));
    $(`${name}-close`).addEventListener("click", () => toggle(name, false));
    narrow[name].addEventListener("change", settle);
  }
  $("scrim").addEventListener("click", closeOver);
  for (const each of ["live", "settings"]) {
    $(`tab-${each}`).addEventListener("click", () => showTab(each));
    $(`tab-${each}`).addEventListener("keydown", (e) => {
      if (e.key !== "ArrowLeft" && e.key !== "ArrowRight") return;
      const other = each === "live" ? "settings" : "live";
      showTab(other);
      $(`tab-${other}`).focus();
    });
  }
  $("settings-open").addEventListener("click", () => showTab("settings", true));
  $("help-button").addEventListener("click", () => $("help").showModal());
  for (const radio of document.querySelectorAll("#theme input")) {
    radio.checked = radio.value === (p.theme ?? "system");
    radio.addEventListener("change", () => (prefs.set({ theme: radio.value }), theme(radio.value)));
  }
  settle();
}
