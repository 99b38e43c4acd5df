// Markdown of a model into DOM that cannot do anything. Two walls, each enough alone: marked is told to write HTML in the text as text
// (so a reader sees what the model said), and DOMPurify lets through a short list of tags and attributes. The page's CSP is a third.
// Math is not rendered, images become links: the page loads nothing from elsewhere.
// The vendor files are those of the npm packages marked 18.2.1 (lib/marked.esm.js), dompurify 3.4.18 (dist/purify.es.mjs) and
// @highlightjs/cdn-assets 11.12.0 (es/highlight.min.js), without the line that names a source map.

import { Marked } from "./vendor-marked.js";
import DOMPurify from "./vendor-purify.js";
import hljs from "./vendor-highlight.js";
import { copy, h, icon } from "./dom.js";

const TAGS = ["p", "br", "strong", "em", "del", "code", "pre", "span", "a", "ul", "ol", "li", "blockquote", "h2", "h3", "h4", "h5", "h6", "hr",
  "table", "thead", "tbody", "tr", "th", "td"];
const ATTRIBUTES = ["href", "class", "start", "align", "title"];
const CLASSES = /^(hljs|hljs-[\w-]+|language-[\w+#.-]+|[a-z]+_)$/;  // the last: highlight.js writes "hljs-title function_"
const LINK = /^(https?:\/\/|mailto:)/i;
const MOST_HIGHLIGHTED = 50000;  // characters of one block of code

const escape = (s) => s.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

function highlighted(code, language) {
  if (!language || code.length > MOST_HIGHLIGHTED || !hljs.getLanguage(language)) return escape(code);
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

function anchor(href, inner) {
  return LINK.test(href) ? `<a href="${escape(href)}">${inner}</a>` : inner;
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text.trimEnd()).replaceAll("\n", "<br>")}</p>` : escape(text)),
    heading({ tokens, depth }) {  // the page has an h1 of its own
      const level = Math.min(depth + 1, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    code({ text, lang }) {
      const language = (lang ?? "").match(/^[\w+#.-]+/)?.[0].toLowerCase() ?? "";
      return `<pre><code class="hljs language-${language || "text"}">${highlighted(text, language)}</code></pre>`;
    },
    link({ href, tokens }) {
      return anchor(href, this.parser.parseInline(tokens));
    },
    image: ({ href, text }) => anchor(href, escape(text || href)),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") data.attrValue = data.attrValue.split(/\s+/).filter((c) => CLASSES.test(c)).join(" ");
  if (data.attrName === "href" && !LINK.test(data.attrValue)) data.keepAttr = false;
});
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A" || !node.hasAttribute("href")) return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

function clean(html) {
  return DOMPurify.sanitize(html, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true });
}

/** Code gets its language and a copy button; what may be wider than the column can be scrolled by keyboard too. */
function furnish(fragment) {
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.firstElementChild;
    const language = [...(code?.classList ?? [])].find((c) => c.startsWith("language-"))?.slice(9) ?? "text";
    const button = h("button", { type: "button", class: "ghost small copy", "aria-label": `Copy code, ${language}`, title: "Copy code",
      onclick: () => copy(pre.textContent, button) }, icon("copy"));
    pre.setAttribute("tabindex", "0");
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", `Code, ${language}`);
    const figure = h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, language), button));
    pre.replaceWith(figure);
    figure.append(pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
}

function block(token, links) {
  const list = Object.assign([token], { links });
  const el = h("div", { class: "block" });
  el.append(clean(marked.parser(list)));
  furnish(el);
  return el;
}

/** Keeps `el` equal to a growing Markdown text: only blocks that changed are made again. */
export class Prose {
  #el;
  #blocks = [];
  #links = "{}";

  constructor(el) {
    this.#el = el;
  }

  update(source) {
    let tokens;
    try {
      tokens = marked.lexer(source);
      const links = JSON.stringify(tokens.links);  // "[a]: https://..." far below may turn "[a]" above into a link
      const all = links !== this.#links;
      this.#links = links;
      const wanted = tokens.filter((t) => t.type !== "space" && t.type !== "def");
      wanted.forEach((token, i) => {
        const old = this.#blocks[i];
        if (old?.raw === token.raw && !all) return;
        const node = block(token, tokens.links);
        old ? old.node.replaceWith(node) : this.#el.append(node);
        this.#blocks[i] = { raw: token.raw, node };
      });
      for (const { node } of this.#blocks.splice(wanted.length)) node.remove();
    } catch {  // nesting too deep for the parser: the plain text is better than nothing
      this.#blocks = [];
      this.#el.replaceChildren(h("p", { class: "plain" }, source));
    }
  }
}
