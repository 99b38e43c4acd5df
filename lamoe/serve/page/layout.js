// The two side columns, the tabs of the panel, the theme, and the help dialog.
// On wide screens the columns are beside the conversation, on narrow ones they cover it.

import { $ } from "./dom.js";
import { redraw } from "./panel.js";
import { prefs } from "./store.js";

const COLUMNS = ["side", "panel"];
const TABS = ["live", "settings"];
const narrow = {
  side: matchMedia("(max-width: 799px)"),
  panel: matchMedia("(max-width: 1139px)"),
};
const body = document.body;
let opener = null; // the element that gets the focus back

const isOverlay = (column) => narrow[column].matches;
const openOverlay = () => COLUMNS.find((column) => body.classList.contains(`over-${column}`));

function isOpen(column) {
  if (isOverlay(column)) return body.classList.contains(`over-${column}`);
  return !body.classList.contains(`no-${column}`);
}

/** Make attributes agree with which columns are open. */
function update() {
  for (const column of COLUMNS) {
    if (!isOverlay(column)) body.classList.remove(`over-${column}`);
    $(`${column}-open`).setAttribute("aria-expanded", String(isOpen(column)));
  }
  const overlay = openOverlay();
  $("main").inert = !!overlay;
  for (const column of COLUMNS) $(column).inert = !!overlay && overlay !== column;
}

/** Open or close a column; without a second argument, toggle it. */
export function toggle(column, open = !isOpen(column)) {
  if (isOverlay(column)) {
    if (open) opener = document.activeElement;
    body.classList.remove("over-side", "over-panel");
    body.classList.toggle(`over-${column}`, open);
    update();
    if (open) $(`${column}-close`).focus();
    else opener?.focus?.();
    return;
  }
  const hadFocus = $(column).contains(document.activeElement);
  body.classList.toggle(`no-${column}`, !open);
  prefs.set({ [column]: open });
  update();
  if (!open && hadFocus) $(`${column}-open`).focus();
}

/** Close the column that covers the page. Returns whether there was one. */
export function closeOverlay() {
  const overlay = openOverlay();
  if (overlay) toggle(overlay, false);
  return !!overlay;
}

/** Show a tab of the panel ("live" or "settings"), and open the panel. */
export function showTab(tab, focus = false) {
  for (const name of TABS) {
    $(name).hidden = name !== tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
    $(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  if (!isOpen("panel")) toggle("panel", true);
  if (focus) (tab === "settings" ? $("system") : $("tab-live")).focus();
  redraw();
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  redraw();
}

/** Restore the stored layout and connect the controls. */
export function buildLayout() {
  const stored = prefs.get();
  body.classList.toggle("no-side", stored.side === false);
  body.classList.toggle("no-panel", stored.panel === false);
  for (const column of COLUMNS) {
    $(`${column}-open`).addEventListener("click", () => toggle(column));
    $(`${column}-close`).addEventListener("click", () => toggle(column, false));
    narrow[column].addEventListener("change", update);
  }
  $("scrim").addEventListener("click", closeOverlay);
  for (const tab of TABS) {
    $(`tab-${tab}`).addEventListener("click", () => showTab(tab));
    $(`tab-${tab}`).addEventListener("keydown", (e) => {
      if (e.key !== "ArrowLeft" && e.key !== "ArrowRight") return;
      const other = tab === "live" ? "settings" : "live";
      showTab(other);
      $(`tab-${other}`).focus();
    });
  }
  $("settings-open").addEventListener("click", () => showTab("settings", true));
  $("help-button").addEventListener("click", () => $("help").showModal());
  for (const radio of document.querySelectorAll("#theme input")) {
    radio.checked = radio.value === (stored.theme ?? "system");
    radio.addEventListener("change", () => {
      prefs.set({ theme: radio.value });
      setTheme(radio.value);
    });
  }
  update();
}
