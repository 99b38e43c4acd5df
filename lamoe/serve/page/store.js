// Conversations and preferences in the browser's localStorage.
// Each conversation is one entry, so that a change writes only that entry.
//
// conversation: {id, title, named, created, updated, system, sampling, draft, messages}
// message: {role: "user", content, at} | {role: "assistant", at, shown, versions: [version]}
// version: {content, finish, error, usage, timing, window}
// finish: null while the reply is written, then "stop", "length", "stopped" (by the user), "lost"
//   (connection), "error", or "interrupted" (the page was closed)

const PREFIX = "lamoe:c:";
const PREFS = "lamoe:prefs";
export const SAMPLING = {
  temperature: 0.7,
  top_p: 0.95,
  top_k: 0,
  min_p: 0,
  max_tokens: null,
  seed: null,
};

const memory = new Map(); // entries that localStorage refused; they last until the page closes
let reportFull = () => {};

/** Call `callback(message)` once, when the browser refuses to store more. */
export function onFull(callback) {
  reportFull = (message) => {
    reportFull = () => {};
    callback(message);
  };
}

function read(name) {
  try {
    return memory.get(name) ?? localStorage.getItem(name);
  } catch {
    return memory.get(name) ?? null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, value);
    memory.delete(name);
  } catch {
    memory.set(name, value);
    reportFull(
      "The browser's storage for this page is full or switched off: what you write now is lost " +
        "when the page closes. Export or delete conversations.",
    );
  }
}

function remove(name) {
  memory.delete(name);
  try {
    localStorage.removeItem(name);
  } catch {
    // without localStorage there is nothing to remove
  }
}

const isText = (value) => typeof value === "string";

function isMessage(message) {
  if (message?.role === "user") return isText(message.content);
  if (message?.role !== "assistant" || !Array.isArray(message.versions)) return false;
  return message.versions.length > 0 && message.versions.every((v) => isText(v?.content));
}

/** Parse a stored conversation. Returns null if it is damaged; fills in fields that are missing. */
export function parse(json) {
  let stored;
  try {
    stored = JSON.parse(json);
  } catch {
    return null;
  }
  if (!stored || !isText(stored.id) || !isText(stored.title)) return null;
  if (!Array.isArray(stored.messages) || !stored.messages.every(isMessage)) return null;
  const conversation = {
    ...create(),
    ...stored,
    sampling: { ...SAMPLING, ...stored.sampling },
  };
  for (const message of conversation.messages) {
    if (message.role !== "assistant") continue;
    message.shown = Math.min(Math.max(0, message.shown | 0), message.versions.length - 1);
    for (const version of message.versions) version.finish ??= "interrupted";
  }
  return conversation;
}

/** Make a conversation with the settings of the last one. It is not stored until `save`. */
export function create() {
  const { system = "", sampling = {} } = prefs.get().last ?? {};
  const now = Date.now();
  return {
    id: `${now.toString(36)}-${Math.random().toString(36).slice(2, 8)}`,
    title: "New conversation",
    named: false,
    created: now,
    updated: now,
    system,
    sampling: { ...SAMPLING, ...sampling },
    draft: "",
    messages: [],
  };
}

/** Load all conversations, the last used first. */
export function all() {
  let names = [];
  try {
    names = Object.keys(localStorage);
  } catch {
    // without localStorage, there are only the conversations in memory
  }
  return [...new Set([...names, ...memory.keys()])]
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => parse(read(name)))
    .filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}

export const save = (conversation) => write(PREFIX + conversation.id, JSON.stringify(conversation));
export const load = (id) => parse(read(PREFIX + id) ?? "null");
export const drop = (id) => remove(PREFIX + id);

/** Call `callback(id)` when another tab changes, adds or deletes a conversation. */
export function onForeignChange(callback) {
  addEventListener("storage", (e) => {
    if (e.key?.startsWith(PREFIX)) callback(e.key.slice(PREFIX.length));
  });
}

export const prefs = {
  get() {
    try {
      return JSON.parse(read(PREFS)) ?? {};
    } catch {
      return {};
    }
  },
  set(changes) {
    write(PREFS, JSON.stringify({ ...prefs.get(), ...changes }));
  },
};

/** Return the version of a reply that is shown. */
export const shown = (message) => message.versions[message.shown];

/** Make a title from the first message. */
export function titleOf(content) {
  const firstLine = content.trim().split("\n")[0];
  const line = firstLine.replace(/^[#>*\s]+/, "").replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || "New conversation";
}

/** Make the messages of a request from the first `end` messages. Empty replies are left out. */
export function messagesFor(conversation, end = conversation.messages.length) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const message of conversation.messages.slice(0, end)) {
    const { role } = message;
    const content = role === "user" ? message.content : shown(message).content;
    if (role === "user" || content) messages.push({ role, content });
  }
  return messages;
}

/**
 * Make the sampling fields of a request. The default limit is a quarter of the model's context,
 * because small models often do not end their replies.
 */
export function samplingFor(conversation, contextLength) {
  const limit = Math.min(2048, Math.floor((contextLength ?? 4096) / 4));
  const isSet = ([name, value]) => name in SAMPLING && value !== null && value !== "";
  const fields = Object.fromEntries(Object.entries(conversation.sampling).filter(isSet));
  return { max_tokens: Math.max(16, limit), ...fields };
}

/** Write a conversation as Markdown. */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  const system = conversation.system.trim();
  if (system) parts.push(`> ${system.replaceAll("\n", "\n> ")}`);
  for (const message of conversation.messages) {
    if (message.role === "user") parts.push(`## You\n\n${message.content}`);
    else parts.push(`## Model\n\n${shown(message).content}`);
  }
  return `${parts.join("\n\n")}\n`;
}

/** Make a file name from a title. */
export function fileName(title, extension) {
  const words = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  return `${words.slice(0, 50) || "conversation"}.${extension}`;
}
