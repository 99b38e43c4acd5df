// Small things for the DOM and for numbers. Text enters the page as text nodes only; there is no innerHTML in this folder outside
// markdown.js, and index.html asks the browser to enforce that (Trusted Types).

/** h("button", {class: "x", onclick: f, "aria-label": "Copy"}, "text", node): an element. null, undefined and false are left out. */
export function h(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else el.setAttribute(name, value === true ? "" : value);
  }
  el.append(...children.flat().filter((c) => c != null && c !== false));
  return el;
}

/** One of the icons that index.html defines. */
export function icon(name) {
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg"), use = document.createElementNS(ns, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon and is called `label`. */
export function iconButton(name, label, onclick, props = {}) {
  return h("button", { type: "button", class: "ghost", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

export const $ = (id) => document.getElementById(id);

/** Set text only when it differs: screen readers and layout are left in peace. */
export function text(el, value) {
  if (el.textContent !== value) el.textContent = value;
}

export const count = (n) => Math.round(n).toLocaleString("en");

/** 1234567 -> "1.23 MB" (decimal, as everywhere in lamoe). */
export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 999.5 && i < units.length - 1) [n, i] = [n / 1000, i + 1];
  return `${i && n < 100 ? n.toPrecision(3) : Math.round(n)} ${units[i]}`;
}

/** Tokens per second, a share, seconds: short and steady in width. */
export const rate = (n) => (n >= 100 || n === 0 ? count(n) : n.toFixed(1));
export const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–");
export const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : s < 60 ? `${s.toFixed(1)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`);

/** "1 token", "2 tokens" */
export const many = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

const spoken = { polite: null };

/** Tell screen readers without moving the focus. */
export function announce(message) {
  spoken.polite ??= $("announce");
  spoken.polite.textContent = "";
  setTimeout(() => (spoken.polite.textContent = message), 30);
}

/** A line at the bottom that goes away by itself; `action` is [label, function]. */
export function toast(message, action = null, life = 7000) {
  const box = $("toasts");
  const el = h("div", { class: "toast" }, h("span", {}, message));
  const close = () => el.remove();
  if (action) el.append(h("button", { type: "button", class: "link", onclick: () => (action[1](), close()) }, action[0]));
  el.append(iconButton("close", "Dismiss", close));
  box.append(el);
  while (box.children.length > 3) box.firstChild.remove();
  setTimeout(close, life);
}

/** Offer text as a file. */
export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Copy text; the button shows that it worked. */
export async function copy(value, button) {
  try {
    await navigator.clipboard.writeText(value);
  } catch {  // no permission, or a page served over plain http from another machine
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = value;
    document.body.append(area);
    area.select();
    const worked = document.execCommand("copy");
    area.remove();
    button.focus();
    if (!worked) return toast("The browser did not allow copying.");
  }
  button.classList.add("done");
  announce("Copied");
  setTimeout(() => button.classList.remove("done"), 1400);
}
