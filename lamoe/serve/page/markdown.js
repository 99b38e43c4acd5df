// Shows the Markdown of a model as elements that cannot run code, load anything or block the page.
//
// There are two defences against HTML, each sufficient alone. marked writes HTML in the text as
// text, so that a reader sees what the model wrote. DOMPurify accepts only a short list of tags and
// attributes. The page's Content-Security-Policy is a third one.
//
// Against texts that take very long, marked and highlight.js run in a worker with a time limit
// (markdown-worker.js), and the page inserts the blocks in slices of time.
//
// Formulas are not rendered, and images become links.

import DOMPurify from "./vendor-purify.js";
import { copy, h, icon } from "./dom.js";
import { LINK } from "./links.js";

const TAGS =
  "p br strong em del code pre span a ul ol li blockquote h2 h3 h4 h5 h6 hr " +
  "table thead tbody tr th td";
const PURIFY_OPTIONS = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "class", "start", "align", "title"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
// the last alternative: highlight.js writes class names such as "hljs-title function_"
const CLASSES = /^(hljs|hljs-[\w-]+|language-[\w+#.-]+|[a-z]+_)$/;
export const limits = {
  workerMs: 4000, // for one version of a text
  sliceMs: 30, // of the page's time, before it may do something else
};

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") {
    const classes = data.attrValue.split(/\s+/);
    data.attrValue = classes.filter((name) => CLASSES.test(name)).join(" ");
  }
  if (data.attrName === "href" && !LINK.test(data.attrValue)) data.keepAttr = false;
});
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A" || !node.hasAttribute("href")) return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

// ---- the worker ---------------------------------------------------------------------------------
// The page refuses script addresses that are plain strings. This policy makes only one address.
const WORKER_URL = new URL("markdown-worker.js", import.meta.url).href;
const policy = self.trustedTypes?.createPolicy("worker", { createScriptURL: () => WORKER_URL });

let worker = null;
let isReady = false; // loading the worker does not count towards the limit
let job = null; // the job that the worker has, with its timer
const jobs = []; // jobs that wait

/** Let the worker parse a text. Resolves to its answer, or to null after the limit. */
function parse(request) {
  return new Promise((resolve) => {
    jobs.push({ request, resolve });
    nextJob();
  });
}

function nextJob() {
  if (!worker) startWorker();
  if (!isReady || job || !jobs.length) return;
  job = jobs.shift();
  job.timer = setTimeout(stopWorker, limits.workerMs);
  worker.postMessage(job.request);
}

function startWorker() {
  worker = new Worker(policy?.createScriptURL("") ?? WORKER_URL, { type: "module" });
  worker.onmessage = ({ data }) => {
    if (isReady) endJob(data);
    isReady = true;
    nextJob();
  };
  worker.onerror = () => {
    // It could not be loaded. Without it, texts are shown without formatting.
    if (!isReady && !job) job = jobs.shift();
    stopWorker();
  };
}

function stopWorker() {
  worker.terminate();
  worker = null;
  isReady = false;
  if (job) endJob(null);
}

function endJob(answer) {
  const { resolve, timer } = job;
  clearTimeout(timer);
  job = null;
  resolve(answer);
  if (jobs.length) nextJob();
}

// ---- elements -----------------------------------------------------------------------------------
/** Add a header with a copy button to code; make wide code and tables scrollable by keyboard. */
function addControls(fragment) {
  for (const pre of fragment.querySelectorAll("pre")) {
    const classes = [...(pre.firstElementChild?.classList ?? [])];
    const language = classes.find((name) => name.startsWith("language-"))?.slice(9) ?? "text";
    const attributes = {
      type: "button",
      class: "ghost small copy",
      "aria-label": `Copy code, ${language}`,
      title: "Copy code",
      onclick: () => copy(pre.textContent, button),
    };
    const button = h("button", attributes, icon("copy"));
    pre.setAttribute("tabindex", "0");
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", `Code, ${language}`);
    const header = h("div", { class: "code-head" }, h("span", {}, language), button);
    const figure = h("div", { class: "code" }, header);
    pre.replaceWith(figure);
    figure.append(pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const attributes = { class: "table", tabindex: "0", role: "region", "aria-label": "Table" };
    const region = h("div", attributes);
    table.replaceWith(region);
    region.append(table);
  }
}

/** Make the element of one block from its HTML, or from its source if there is no HTML. */
function blockElement(source, html) {
  const element = h("div", { class: "block" });
  if (html === null) {
    element.append(h("p", { class: "plain" }, source));
  } else {
    element.append(DOMPurify.sanitize(html, PURIFY_OPTIONS));
    addControls(element);
  }
  return element;
}

const nextTask = () => new Promise((resolve) => setTimeout(resolve));
let numTexts = 0;

/** Shows a growing Markdown text in an element. Only blocks that changed are made again. */
export class Prose {
  #element;
  #id = numTexts++;
  #next = null; // the latest text that is not shown yet
  #shown = null; // promise that the latest text is shown
  #format = "highlighted"; // or "formatted", or "plain" for texts that take too long

  constructor(element) {
    this.#element = element;
  }

  /** Show a text. Resolves when this text, or a later one, is shown. */
  update(source) {
    this.#next = source;
    this.#shown ??= this.#showLatest();
    return this.#shown;
  }

  async #showLatest() {
    while (this.#next !== null) {
      const source = this.#next;
      this.#next = null;
      await this.#show(source);
    }
    this.#shown = null;
  }

  async #show(source) {
    if (this.#format !== "plain") {
      const highlight = this.#format === "highlighted";
      const answer = await parse({ id: this.#id, source, highlight });
      if (answer) return this.#showBlocks(answer);
      this.#format = highlight ? "formatted" : "plain";
      this.#next ??= source;
      return;
    }
    this.#element.replaceChildren(h("p", { class: "plain" }, source));
  }

  async #showBlocks({ count, changed }) {
    const { children } = this.#element;
    let start = performance.now();
    for (const [i, source, html] of changed) {
      const element = blockElement(source, html);
      if (children[i]) children[i].replaceWith(element);
      else this.#element.append(element);
      if (performance.now() - start < limits.sliceMs) continue;
      await nextTask();
      start = performance.now();
    }
    while (children.length > count) this.#element.lastElementChild.remove();
  }
}
