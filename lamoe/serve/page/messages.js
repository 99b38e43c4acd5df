// The messages of one conversation as DOM. Knows how they look; what the buttons do comes from app.js as `acts`:
// {startEdit(), regenerate(), version(message, step), isBusy()}.

import { copy, count, h, icon, iconButton, many, rate } from "./dom.js";
import { Prose } from "./markdown.js";
import { shown } from "./store.js";

const LONG_LINES = 14, LONG_CHARACTERS = 1600;

/** An article for a message. For a reply, `update()` on the result's `view` shows its present state. */
export function messageElement(message, conversation, acts) {
  return message.role === "user" ? said(message, conversation, acts) : new Reply(message, conversation, acts).el;
}

function said(message, conversation, acts) {
  const body = h("div", { class: "said", dir: "auto" }, message.content);
  const el = h("article", { class: "msg user", "aria-label": "You" }, body);
  const lines = message.content.split("\n").length;
  if (lines > LONG_LINES || message.content.length > LONG_CHARACTERS) {
    body.classList.add("folded");
    const size = `${lines > 1 ? `${many(lines, "line")}, ` : ""}${count(message.content.length)} characters`;
    const more = h("button", { type: "button", class: "link", "aria-expanded": "false", onclick: () => {
      const folded = body.classList.toggle("folded");
      more.textContent = folded ? `Show all: ${size}` : "Show less";
      more.setAttribute("aria-expanded", String(!folded));
    } }, `Show all: ${size}`);
    el.append(more);
  }
  const copyButton = iconButton("copy", "Copy message", () => copy(message.content, copyButton), { class: "ghost small" });
  const isLast = conversation.messages.findLast((m) => m.role === "user") === message;
  el.append(h("div", { class: "tools" }, isLast && iconButton("edit", "Edit message", () => acts.startEdit(), { class: "ghost small edit" }), copyButton));
  return el;
}

/** Turn the article of a user's message into a text box. `done(text)` gets the new text, or null when nothing shall change. */
export function editInPlace(el, content, done) {
  const area = h("textarea", { class: "field", "aria-label": "Edit message" });
  area.value = content;
  const finish = (value) => (el.classList.remove("editing"), done(value));
  const send = () => area.value.trim() && finish(area.value);
  area.addEventListener("keydown", (e) => {
    if (e.isComposing) return;
    if (e.key === "Enter" && !e.shiftKey) (e.preventDefault(), send());
    if (e.key === "Escape") (e.preventDefault(), e.stopPropagation(), finish(null));
  });
  el.classList.add("editing");
  el.replaceChildren(h("div", { class: "said" }, area),
    h("div", { class: "row" }, h("button", { type: "button", class: "plain-button", onclick: () => finish(null) }, "Cancel"),
      h("button", { type: "button", class: "main-button", onclick: send }, "Send again")));
  area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
  area.focus();
  area.setSelectionRange(content.length, content.length);
}

const NOTES = {
  stopped: ["calm", "You stopped this reply."],
  interrupted: ["calm", "The page was closed while this was written."],
  lost: ["", "The connection was lost before the reply was complete."],
};

/** One reply and its versions. */
class Reply {
  constructor(message, conversation, acts) {
    Object.assign(this, { message, conversation, acts, made: null, seen: -1 });
    this.body = h("div", { class: "body" });
    this.note = h("div", { class: "note", hidden: true });
    this.tools = h("div", { class: "tools" });
    this.el = h("article", { class: "msg model", "aria-label": "Reply" }, this.body, this.note, this.tools);
    this.el.view = this;
    this.update();
  }

  update() {
    const v = shown(this.message);
    this.el.classList.toggle("writing", v.finish === null);
    this.el.setAttribute("aria-busy", String(v.finish === null));
    if (this.made !== v) {
      this.made = v;
      this.prose = this.text = null;
      this.body.replaceChildren();
    }
    if (!v.content) {
      this.body.replaceChildren(v.finish === null ? h("p", { class: "waiting" }, v.status || "Reading")
        : h("p", { class: "quiet", hidden: !["stop", "length"].includes(v.finish) }, "The model ended its reply without a word."));
      this.prose = null;
    } else if (this.text !== v.content) {
      if (!this.prose) {
        const el = h("div", { class: "prose", dir: "auto" });
        this.body.replaceChildren(el);
        this.prose = new Prose(el);
      }
      this.prose.update(v.content);
    }
    this.text = v.content;
    this.#notes(v);
    this.#buttons(v);
  }

  #notes(v) {
    let [kind, words] = NOTES[v.finish] ?? ["", v.finish === "error" ? v.error : ""];
    if (v.finish === "length") {
      const total = v.usage?.total_tokens, full = v.window && total >= v.window - 1;
      [kind, words] = full ? ["", `The context is full: ${count(total)} of ${count(v.window)} tokens. Start a new conversation, or edit the last message into a shorter one.`]
        : ["calm", `Cut at the limit of ${v.usage ? `${count(v.usage.completion_tokens)} ` : ""}tokens for a reply. The settings have the limit.`];
    }
    this.note.className = `note ${kind}`;
    this.note.hidden = !words;
    this.note.textContent = words;
  }

  #buttons(v) {
    const isLast = this.conversation.messages.at(-1) === this.message, busy = this.acts.isBusy();
    const state = [v.finish, this.message.shown, this.message.versions.length, isLast, busy].join();
    if (state === this.state) return;
    this.state = state;
    if (v.finish === null) return this.tools.replaceChildren();
    const all = this.message.versions, small = { class: "ghost small" };
    const copyButton = iconButton("copy", "Copy reply", () => copy(v.content, copyButton), small);
    const step = (d) => this.acts.version(this.message, d);
    const versions = all.length > 1 && isLast && h("span", { class: "versions", role: "group", "aria-label": "Versions of this reply" },
      iconButton("left", "Previous version", () => step(-1), { ...small, disabled: busy || this.message.shown === 0 }),
      h("span", {}, `${this.message.shown + 1} / ${all.length}`),
      iconButton("right", "Next version", () => step(1), { ...small, disabled: busy || this.message.shown === all.length - 1 }));
    const again = isLast && h("button", { type: "button", class: "ghost small again", "aria-label": "Regenerate", title: "Regenerate (Alt+R)", disabled: busy,
      onclick: () => this.acts.regenerate() }, icon("again"));
    this.tools.replaceChildren(...[v.content && copyButton, again, versions, h("span", { class: "meta" }, facts(v))].filter(Boolean));
  }
}

function facts(v) {
  const n = v.usage?.completion_tokens, t = v.timing;
  const speed = n > 1 && t?.total > t.first ? (n - 1) / (t.total - t.first) : null;
  return [n && many(n, "token"), speed && `${rate(speed)} tokens/s`].filter(Boolean).join(" · ");
}
