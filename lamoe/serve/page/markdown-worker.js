// Turns Markdown into HTML in a worker, because some texts take marked or highlight.js quadratic
// time. In the page itself they would block it; here markdown.js ends the worker after a limit.
// The HTML is not trusted: markdown.js sanitizes it.
//
// The vendor files come from the npm packages marked 18.2.1 (lib/marked.esm.js), dompurify 3.4.18
// (dist/purify.es.mjs) and @highlightjs/cdn-assets 11.12.0 (es/highlight.min.js), without the line
// that names a source map.

import { Marked } from "./vendor-marked.js";
import hljs from "./vendor-highlight.js";
import { LINK } from "./links.js";

const MAX_HIGHLIGHTED = 50000; // characters of a code block
const MAX_TAGS = 20000; // tags in the HTML of a block; more would take long to sanitize and lay out
const MAX_TEXTS = 64; // texts whose blocks are remembered

let isHighlighting = true;

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

function highlight(code, language) {
  const isKnown = language && hljs.getLanguage(language);
  if (!isHighlighting || !isKnown || code.length > MAX_HIGHLIGHTED) return escape(code);
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

/** Make the HTML of one block (a top-level token of marked), or null if it is too complex. */
function html(token, links) {
  try {
    const made = marked.parser(Object.assign([token], { links }));
    return made.split("<").length > MAX_TAGS ? null : made;
  } catch {
    return null; // nested too deeply for the parser
  }
}

const known = new Map(); // id of a text -> {raws, links} of its last version

/**
 * Return the blocks of a text that changed since the last call with this id: {count, changed},
 * where changed is a list of [index, source, HTML or null]. Returns null if the text cannot be
 * divided into blocks.
 */
function parse(id, source) {
  let tokens;
  try {
    tokens = marked.lexer(source);
  } catch {
    return null;
  }
  const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
  // A definition "[a]: https://..." further down turns an earlier "[a]" into a link.
  const links = JSON.stringify(tokens.links);
  const old = known.get(id);
  const changed = [];
  blocks.forEach((token, i) => {
    if (old?.links === links && old.raws[i] === token.raw) return;
    changed.push([i, token.raw, html(token, tokens.links)]);
  });
  known.delete(id);
  known.set(id, { raws: blocks.map((token) => token.raw), links });
  if (known.size > MAX_TEXTS) known.delete(known.keys().next().value);
  return { count: blocks.length, changed };
}

onmessage = ({ data }) => {
  isHighlighting = data.highlight;
  postMessage(parse(data.id, data.source));
};
postMessage("ready");
