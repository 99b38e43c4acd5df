// The messages of one conversation as elements. app.js passes what the buttons do as `actions`:
// {startEdit(), regenerate(), showVersion(message, step), isBusy()}.

import { copy, count, h, icon, iconButton, many, rate } from "./dom.js";
import { Prose } from "./markdown.js";
import { shown } from "./store.js";

const MAX_LINES = 14; // longer messages are folded
const MAX_CHARACTERS = 1600;

/** Make the element of a message. The element of a reply has a `view` with a method `update()`. */
export function messageElement(message, conversation, actions) {
  if (message.role === "user") return userMessage(message, conversation, actions);
  return new Reply(message, conversation, actions).element;
}

function userMessage(message, conversation, actions) {
  const { content } = message;
  const body = h("div", { class: "said", dir: "auto" }, content);
  const element = h("article", { class: "msg user", "aria-label": "You" }, body);
  const lines = content.split("\n").length;
  if (lines > MAX_LINES || content.length > MAX_CHARACTERS) {
    element.append(foldButton(body, lines, content.length));
  }
  const small = { class: "ghost small" };
  const copyButton = iconButton("copy", "Copy message", () => copy(content, copyButton), small);
  const isLast = conversation.messages.findLast((m) => m.role === "user") === message;
  const editButton =
    isLast &&
    iconButton("edit", "Edit message", () => actions.startEdit(), { class: "ghost small edit" });
  element.append(h("div", { class: "tools" }, editButton, copyButton));
  return element;
}

/** Fold a long message, and make the button that shows all of it. */
function foldButton(body, lines, characters) {
  body.classList.add("folded");
  const numLines = lines > 1 ? `${many(lines, "line")}, ` : "";
  const showAll = `Show all: ${numLines}${count(characters)} characters`;
  const onclick = () => {
    const isFolded = body.classList.toggle("folded");
    button.textContent = isFolded ? showAll : "Show less";
    button.setAttribute("aria-expanded", String(!isFolded));
  };
  const attributes = { type: "button", class: "link", "aria-expanded": "false", onclick };
  const button = h("button", attributes, showAll);
  return button;
}

/**
 * Turn the element of a user's message into a text box. `finished(text)` receives the new text, or
 * null if the user cancels.
 */
export function editInPlace(element, content, finished) {
  const area = h("textarea", { class: "field", "aria-label": "Edit message" });
  area.value = content;
  const finish = (value) => {
    element.classList.remove("editing");
    finished(value);
  };
  const send = () => area.value.trim() && finish(area.value);
  area.addEventListener("keydown", (e) => {
    if (e.isComposing) return;
    if (e.key === "Enter" && !e.shiftKey) {
      e.preventDefault();
      send();
    }
    if (e.key === "Escape") {
      e.preventDefault();
      e.stopPropagation();
      finish(null);
    }
  });
  const button = (kind, label, onclick) =>
    h("button", { type: "button", class: kind, onclick }, label);
  element.classList.add("editing");
  element.replaceChildren(
    h("div", { class: "said" }, area),
    h(
      "div",
      { class: "row" },
      button("plain-button", "Cancel", () => finish(null)),
      button("main-button", "Send again", send),
    ),
  );
  area.style.height = `${Math.min(area.scrollHeight + 4, innerHeight / 2)}px`;
  area.focus();
  area.setSelectionRange(content.length, content.length);
}

const CALM_NOTES = {
  stopped: "You stopped this reply.",
  interrupted: "The page was closed while this was written.",
};

/** Explain why a reply ended, as [CSS class, text]; an empty text if it ended normally. */
function noteFor(version) {
  const { finish, usage } = version;
  if (finish in CALM_NOTES) return ["calm", CALM_NOTES[finish]];
  if (finish === "lost") return ["", "The connection was lost before the reply was complete."];
  if (finish === "error") return ["", version.error];
  if (finish !== "length") return ["", ""];
  const total = usage?.total_tokens;
  if (version.window && total >= version.window - 1) {
    const use = `The context is full: ${count(total)} of ${count(version.window)} tokens.`;
    const advice = "Start a new conversation, or edit the last message into a shorter one.";
    return ["", `${use} ${advice}`];
  }
  const limit = usage ? `${count(usage.completion_tokens)} ` : "";
  return ["calm", `Cut at the limit of ${limit}tokens for a reply. The settings have the limit.`];
}

/** A reply: shows one of its versions, and buttons. */
class Reply {
  constructor(message, conversation, actions) {
    Object.assign(this, { message, conversation, actions, version: null, formatting: null });
    this.body = h("div", { class: "body" });
    this.note = h("div", { class: "note", hidden: true });
    this.tools = h("div", { class: "tools" });
    const attributes = { class: "msg model", "aria-label": "Reply" };
    this.element = h("article", attributes, this.body, this.note, this.tools);
    this.element.view = this;
    this.update();
  }

  /** Show the present state of the message. */
  update() {
    const version = shown(this.message);
    this.element.classList.toggle("writing", version.finish === null);
    if (this.version !== version) {
      this.version = version;
      this.prose = this.text = null;
      this.body.replaceChildren();
    }
    this.#updateBody(version);
    this.#updateBusy();
    const [kind, note] = noteFor(version);
    this.note.className = `note ${kind}`;
    this.note.hidden = !note;
    this.note.textContent = note;
    this.#updateButtons(version);
  }

  #updateBody(version) {
    if (!version.content) {
      this.body.replaceChildren(emptyReply(version));
      this.prose = null;
    } else if (this.text !== version.content) {
      if (!this.prose) {
        const element = h("div", { class: "prose", dir: "auto" });
        this.body.replaceChildren(element);
        this.prose = new Prose(element);
      }
      const formatting = this.prose.update(version.content);
      this.formatting = formatting;
      formatting.then(() => {
        if (this.formatting === formatting) this.formatting = null;
        this.#updateBusy();
      });
    }
    this.text = version.content;
  }

  /** A reply is busy until all of it is there, and formatted. */
  #updateBusy() {
    const isBusy = shown(this.message).finish === null || this.formatting !== null;
    this.element.setAttribute("aria-busy", String(isBusy));
  }

  #updateButtons(version) {
    const { versions, shown: index } = this.message;
    const isLast = this.conversation.messages.at(-1) === this.message;
    const isBusy = this.actions.isBusy();
    const state = [version.finish, index, versions.length, isLast, isBusy].join();
    if (state === this.buttonState) return;
    this.buttonState = state;
    if (version.finish === null) return this.tools.replaceChildren();

    const small = { class: "ghost small" };
    const copyText = () => copy(version.content, copyButton);
    const copyButton = iconButton("copy", "Copy reply", copyText, small);
    const again = {
      type: "button",
      class: "ghost small again",
      "aria-label": "Regenerate",
      title: "Regenerate (Alt+R)",
      disabled: isBusy,
      onclick: () => this.actions.regenerate(),
    };
    const parts = [
      version.content && copyButton,
      isLast && h("button", again, icon("again")),
      isLast && versions.length > 1 && this.#versionButtons(index, versions.length, isBusy),
      h("span", { class: "meta" }, statistics(version)),
    ];
    this.tools.replaceChildren(...parts.filter(Boolean));
  }

  #versionButtons(index, length, isBusy) {
    const stepButton = (name, label, step, isEnd) => {
      const onclick = () => this.actions.showVersion(this.message, step);
      return iconButton(name, label, onclick, { class: "ghost small", disabled: isBusy || isEnd });
    };
    return h(
      "span",
      { class: "versions", role: "group", "aria-label": "Versions of this reply" },
      stepButton("left", "Previous version", -1, index === 0),
      h("span", {}, `${index + 1} / ${length}`),
      stepButton("right", "Next version", 1, index === length - 1),
    );
  }
}

function emptyReply(version) {
  if (version.finish === null) return h("p", { class: "waiting" }, version.status || "Reading");
  const hidden = !["stop", "length"].includes(version.finish);
  return h("p", { class: "quiet", hidden }, "The model ended its reply without a word.");
}

/** Write the number of tokens of a reply and its speed. */
function statistics(version) {
  const tokens = version.usage?.completion_tokens;
  const { first, total } = version.timing ?? {};
  // the first token also waits for the prompt, so it does not count for the speed
  const speed = tokens > 1 && total > first ? (tokens - 1) / (total - first) : null;
  const parts = [tokens && many(tokens, "token"), speed && `${rate(speed)} tokens/s`];
  return parts.filter(Boolean).join(" · ");
}
