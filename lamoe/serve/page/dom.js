// Small helpers for elements, texts and numbers.
//
// Text enters the page as text nodes only. There is no innerHTML in this folder, except in the
// vendor files, and index.html makes the browser enforce that (Trusted Types).

/**
 * Make an element: h("button", {class: "x", onclick: handler}, "text", child).
 * Properties and children that are null, undefined or false are left out.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** Make one of the icons that index.html defines. */
export function icon(name) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  const use = document.createElementNS(namespace, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Make a button that shows an icon; `label` is its accessible name. */
export function iconButton(name, label, onclick, props = {}) {
  const own = { type: "button", class: "ghost", "aria-label": label, title: label, onclick };
  return h("button", { ...own, ...props }, icon(name));
}

/** Find an element by its id. */
export const $ = (id) => document.getElementById(id);

/** Set the text of an element if it differs, to avoid needless layout and screen reader output. */
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

/** 1234567 -> "1,234,567" */
export const count = (n) => Math.round(n).toLocaleString("en");

/** 1234567 -> "1.23 MB" (decimal units, as everywhere in lamoe) */
export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 999.5 && i < units.length - 1) {
    n /= 1000;
    i += 1;
  }
  return `${i && n < 100 ? n.toPrecision(3) : Math.round(n)} ${units[i]}`;
}

/** Tokens per second, without a unit: 9.3, 120 */
export const rate = (n) => (n >= 100 || n === 0 ? count(n) : n.toFixed(1));

/** A share in percent: "42 %" */
export const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–");

/** A duration: "250 ms", "3.1 s", "2 min 5 s" */
export function seconds(s) {
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  return s < 60 ? `${s.toFixed(1)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

/** "1 token", "2 tokens" */
export const many = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** Let screen readers say a message, without moving the focus. */
export function announce(message) {
  const region = $("announce");
  region.textContent = ""; // so that the same message is announced again
  setTimeout(() => (region.textContent = message), 30);
}

/** Show a message at the bottom for `duration` ms; `action` is [label, function]. */
export function toast(message, action = null, duration = 7000) {
  const toasts = $("toasts");
  const element = h("div", { class: "toast" }, h("span", {}, message));
  const close = () => element.remove();
  if (action) {
    const [label, run] = action;
    const onclick = () => (run(), close());
    element.append(h("button", { type: "button", class: "link", onclick }, label));
  }
  element.append(iconButton("close", "Dismiss", close));
  toasts.append(element);
  while (toasts.children.length > 3) toasts.firstChild.remove();
  setTimeout(close, duration);
}

/** Offer a text as a file. */
export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** Copy a text to the clipboard; the button shows success for a moment. */
export async function copy(value, button) {
  try {
    await navigator.clipboard.writeText(value);
  } catch {
    // no permission, or plain HTTP from another machine: use the older method
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = value;
    document.body.append(area);
    area.select();
    const succeeded = document.execCommand("copy");
    area.remove();
    button.focus();
    if (!succeeded) return toast("The browser did not allow copying.");
  }
  button.classList.add("done");
  announce("Copied");
  setTimeout(() => button.classList.remove("done"), 1400);
}
