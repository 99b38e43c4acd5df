// Shows the Markdown of a model as elements that cannot run code or load anything.
//
// There are two defences, each sufficient alone. marked writes HTML in the text as text, so that a
// reader sees what the model wrote. DOMPurify accepts only a short list of tags and attributes. The
// page's Content-Security-Policy is a third one.
//
// Formulas are not rendered, and images become links.
//
// The vendor files come from the npm packages marked 18.2.1 (lib/marked.esm.js), dompurify 3.4.18
// (dist/purify.es.mjs) and @highlightjs/cdn-assets 11.12.0 (es/highlight.min.js), without the line
// that names a source map.

import { Marked } from "./vendor-marked.js";
import DOMPurify from "./vendor-purify.js";
import hljs from "./vendor-highlight.js";
import { copy, h, icon } from "./dom.js";

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
const LINK = /^(https?:\/\/|mailto:)/i;
const MAX_HIGHLIGHTED = 50000; // characters of a code block; longer ones would block the page

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

function highlight(code, language) {
  if (!language || code.length > MAX_HIGHLIGHTED || !hljs.getLanguage(language)) {
    return escape(code);
  }
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

function anchor(href, inner) {
  return LINK.test(href) ? `<a href="${escape(href)}">${inner}</a>` : inner;
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text, block }) {
      if (!block) return escape(text);
      return `<p>${escape(text.trimEnd()).replaceAll("\n", "<br>")}</p>`;
    },
    heading({ tokens, depth }) {
      const level = Math.min(depth + 1, 6); // the h1 is the title of the page
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    code({ text, lang }) {
      const language = (lang ?? "").match(/^[\w+#.-]+/)?.[0].toLowerCase() ?? "";
      const code = highlight(text, language);
      return `<pre><code class="hljs language-${language || "text"}">${code}</code></pre>`;
    },
    link({ href, tokens }) {
      return anchor(href, this.parser.parseInline(tokens));
    },
    image: ({ href, text }) => anchor(href, escape(text || href)),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

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

/** Make the element of one block (a top-level token of marked). */
function blockElement(token, links) {
  const tokens = Object.assign([token], { links });
  const element = h("div", { class: "block" });
  element.append(DOMPurify.sanitize(marked.parser(tokens), PURIFY_OPTIONS));
  addControls(element);
  return element;
}

/** Shows a growing Markdown text in an element. Only blocks that changed are made again. */
export class Prose {
  #element;
  #blocks = []; // {raw, element}
  #links = "{}";

  constructor(element) {
    this.#element = element;
  }

  update(source) {
    try {
      this.#showBlocks(marked.lexer(source));
    } catch {
      // nesting too deep for the parser: show the text as it is
      this.#blocks = [];
      this.#element.replaceChildren(h("p", { class: "plain" }, source));
    }
  }

  #showBlocks(tokens) {
    // A definition "[a]: https://..." further down turns an earlier "[a]" into a link.
    const links = JSON.stringify(tokens.links);
    const linksChanged = links !== this.#links;
    this.#links = links;
    const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
    blocks.forEach((token, i) => {
      const old = this.#blocks[i];
      if (old?.raw === token.raw && !linksChanged) return;
      const element = blockElement(token, tokens.links);
      if (old) old.element.replaceWith(element);
      else this.#element.append(element);
      this.#blocks[i] = { raw: token.raw, element };
    });
    for (const { element } of this.#blocks.splice(blocks.length)) element.remove();
  }
}
