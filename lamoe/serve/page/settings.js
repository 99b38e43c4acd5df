// The settings tab: system prompt and sampling parameters of the open conversation.

import { $, h, text } from "./dom.js";
import { SAMPLING, prefs } from "./store.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    help: "0 always takes the likeliest token.",
    range: { min: 0, max: 2, step: 0.05 },
    slider: true,
  },
  {
    name: "top_p",
    label: "Top p",
    help: "Keep the likeliest tokens that make up this share.",
    range: { min: 0.05, max: 1, step: 0.01 },
    slider: true,
  },
  {
    name: "min_p",
    label: "Min p",
    help: "Drop tokens below this share of the likeliest.",
    range: { min: 0, max: 1, step: 0.01 },
    slider: true,
    sliderMax: 0.5,
  },
  {
    name: "top_k",
    label: "Top k",
    help: "Keep this many tokens; 0 keeps all.",
    range: { min: 0, max: 100000, step: 1 },
  },
  {
    name: "max_tokens",
    label: "Tokens per reply",
    help: "Empty: a quarter of the context, at most 2,048.",
    range: { min: 1, max: 1000000, step: 1 },
    placeholder: "auto",
  },
  {
    name: "seed",
    label: "Seed",
    help: "The same seed gives the same reply. Empty: random.",
    range: { min: 0, max: 4294967295, step: 1 },
    placeholder: "random",
  },
];

let conversation = null;
let onChange = () => {};
const inputs = {}; // field name -> {box, slider}

/** Build the form. `callback()` is called after each change of the shown conversation. */
export function buildSettings(callback) {
  onChange = callback;
  for (const field of FIELDS) $("sampling").append(buildField(field));
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

function buildField({ name, label, help, range, slider: hasSlider, sliderMax, placeholder }) {
  const helpId = `k-${name}-help`;
  const box = h("input", {
    class: "field",
    id: `k-${name}`,
    type: "number",
    autocomplete: "off",
    inputmode: range.step < 1 ? "decimal" : "numeric",
    min: range.min,
    max: range.max,
    step: hasSlider ? "any" : range.step,
    "aria-describedby": helpId,
    placeholder: placeholder ?? String(SAMPLING[name]),
  });
  const slider =
    hasSlider &&
    h("input", {
      type: "range",
      min: range.min,
      max: sliderMax ?? range.max,
      step: range.step,
      "aria-label": `${label}, slider`,
      tabindex: "-1",
    });
  inputs[name] = { box, slider };
  box.addEventListener("input", () => set(name, box.value === "" ? null : Number(box.value), box));
  if (slider) slider.addEventListener("input", () => set(name, Number(slider.value), slider));
  const line = h("div", { class: "knob-line" }, h("label", { for: box.id }, label), box);
  return h("div", { class: "knob" }, line, slider, h("p", { class: "quiet", id: helpId }, help));
}

/** Set a parameter from one of its two inputs, and update the other input. */
function set(name, value, source) {
  const { box, slider } = inputs[name];
  if (source === box && !box.checkValidity()) return; // CSS marks the value as invalid
  conversation.sampling[name] = value ?? SAMPLING[name];
  if (source !== box) box.value = value;
  if (slider && source !== slider) slider.value = conversation.sampling[name];
  keep();
}

/** Keep the settings for new conversations, and report the change. */
function keep() {
  prefs.set({ last: { system: conversation.system, sampling: conversation.sampling } });
  showSummary();
  onChange();
}

function showSummary() {
  const system = conversation.system.trim() ? ", system prompt" : "";
  text($("settings-text"), `Temperature ${conversation.sampling.temperature}${system}`);
}

/** Show the settings of a conversation; later changes apply to it. */
export function showSettings(shown) {
  conversation = shown;
  $("system").value = conversation.system;
  for (const [name, { box, slider }] of Object.entries(inputs)) {
    box.value = conversation.sampling[name] ?? "";
    if (slider) slider.value = conversation.sampling[name];
  }
  showSummary();
}
