// The settings tab: system prompt and sampling of the conversation at hand.

import { $, h, text } from "./dom.js";
import { SAMPLING, prefs } from "./store.js";

// name, label, explanation, [smallest, largest, step], has a slider
const KNOBS = [
  ["temperature", "Temperature", "0 always takes the likeliest token.", [0, 2, 0.05], true],
  ["top_p", "Top p", "Keep the likeliest tokens that make up this share.", [0.05, 1, 0.01], true],
  ["min_p", "Min p", "Drop tokens below this share of the likeliest.", [0, 1, 0.01], true],
  ["top_k", "Top k", "Keep this many tokens; 0 keeps all.", [0, 100000, 1], false],
  ["max_tokens", "Tokens per reply", "Empty: a quarter of the context, at most 2,048.", [1, 1000000, 1], false],
  ["seed", "Seed", "The same seed gives the same reply. Empty: random.", [0, 4294967295, 1], false],
];

let conversation = null, changed = () => {};
const boxes = {};

/** Build the form. `onChange()` runs after every change to the conversation given to `showSettings`. */
export function buildSettings(onChange) {
  changed = onChange;
  for (const [name, label, help, [min, max, step], slider] of KNOBS) {
    const box = h("input", { class: "field", id: `k-${name}`, type: "number", autocomplete: "off", inputmode: step < 1 ? "decimal" : "numeric", min, max, step: slider ? "any" : step,
      "aria-describedby": `k-${name}-help`, placeholder: name === "seed" ? "random" : name === "max_tokens" ? "auto" : String(SAMPLING[name]) });
    const range = slider && h("input", { type: "range", min, max: name === "min_p" ? 0.5 : max, step, "aria-label": `${label}, slider`, tabindex: "-1" });
    boxes[name] = { box, range };
    box.addEventListener("input", () => set(name, box.value === "" ? null : Number(box.value), box));
    range && range.addEventListener("input", () => set(name, Number(range.value), range));
    $("sampling").append(h("div", { class: "knob" }, h("div", { class: "knob-line" }, h("label", { for: box.id }, label), box), range,
      h("p", { class: "quiet", id: `k-${name}-help` }, help)));
  }
  $("system").addEventListener("input", () => {
    conversation.system = $("system").value;
    keep();
  });
  $("sampling-reset").addEventListener("click", () => {
    conversation.sampling = { ...SAMPLING };
    keep();
    showSettings(conversation);
  });
}

function set(name, value, from) {
  const { box, range } = boxes[name];
  if (from === box && !box.checkValidity()) return;  // shown as wrong, not used
  const empty = value === null;
  conversation.sampling[name] = empty && SAMPLING[name] !== null ? SAMPLING[name] : value;
  if (from !== box) box.value = value;
  if (range && from !== range) range.value = conversation.sampling[name];
  keep();
}

function keep() {
  prefs.set({ last: { system: conversation.system, sampling: conversation.sampling } });
  label();
  changed();
}

function label() {
  const s = conversation.sampling;
  text($("settings-text"), `Temperature ${s.temperature}${conversation.system.trim() ? ", system prompt" : ""}`);
}

/** Show the settings of `c` and change them from now on. */
export function showSettings(c) {
  conversation = c;
  $("system").value = c.system;
  for (const [name, { box, range }] of Object.entries(boxes)) {
    box.value = c.sampling[name] ?? "";
    if (range) range.value = c.sampling[name];
  }
  label();
}
