// Conversations and preferences in the browser's localStorage: one entry per conversation, so that a change writes only that one.
//
// conversation: {id, title, named, created, updated, system, sampling, draft, messages}
// message: {role: "user", content, at} | {role: "assistant", at, shown, versions: [version]}
// version: {content, finish, error, usage, timing, experts}; finish: null while it runs, stop | length | stopped | lost | error
//   | interrupted (the page was closed)

const PREFIX = "lamoe:c:";
const PREFS = "lamoe:prefs";
export const SAMPLING = { temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, max_tokens: null, seed: null };

const memory = new Map();  // what localStorage would not take, for as long as the page is open
let complain = () => {};

/** `f(message)` is called once when the browser will not keep more. */
export function onFull(f) {
  complain = (m) => ((complain = () => {}), f(m));
}

function read(name) {
  try { return memory.get(name) ?? localStorage.getItem(name); } catch { return memory.get(name) ?? null; }
}

function write(name, value) {
  try {
    localStorage.setItem(name, value);
    memory.delete(name);
  } catch {
    memory.set(name, value);
    complain("The browser's storage for this page is full or switched off: what you write now is lost when the page closes. Export or delete conversations.");
  }
}

function remove(name) {
  memory.delete(name);
  try { localStorage.removeItem(name); } catch { /* was never there */ }
}

const isText = (x) => typeof x === "string";
const isMessage = (m) => m?.role === "user" ? isText(m.content)
  : m?.role === "assistant" && Array.isArray(m.versions) && m.versions.length > 0 && m.versions.every((v) => isText(v?.content));

/** A conversation from its JSON, or null: what is stored may come from another version of this page, or be damaged. */
export function parse(json) {
  let c;
  try { c = JSON.parse(json); } catch { return null; }
  if (!c || !isText(c.id) || !isText(c.title) || !Array.isArray(c.messages) || !c.messages.every(isMessage)) return null;
  const good = { ...create(), ...c, sampling: { ...SAMPLING, ...c.sampling } };
  for (const m of good.messages) {
    if (m.role !== "assistant") continue;
    m.shown = Math.min(Math.max(0, m.shown | 0), m.versions.length - 1);
    for (const v of m.versions) v.finish ??= "interrupted";
  }
  return good;
}

/** A new conversation, with the settings of the last one. Not stored until `save`. */
export function create() {
  const { system = "", sampling = {} } = prefs.get().last ?? {};
  const now = Date.now();
  const id = `${now.toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "New conversation", named: false, created: now, updated: now, system, sampling: { ...SAMPLING, ...sampling }, draft: "", messages: [] };
}

/** All stored conversations, the last used first. */
export function all() {
  let names = [];
  try { names = Object.keys(localStorage); } catch { /* none */ }
  return [...new Set([...names, ...memory.keys()])].filter((n) => n.startsWith(PREFIX)).map((n) => parse(read(n))).filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}

export const save = (c) => write(PREFIX + c.id, JSON.stringify(c));
export const load = (id) => parse(read(PREFIX + id) ?? "null");
export const drop = (id) => remove(PREFIX + id);

/** `f(id)` when another tab has changed, added or deleted a conversation. */
export function onForeignChange(f) {
  addEventListener("storage", (e) => e.key?.startsWith(PREFIX) && f(e.key.slice(PREFIX.length)));
}

export const prefs = {
  get() {
    try { return JSON.parse(read(PREFS)) ?? {}; } catch { return {}; }
  },
  set(changes) {
    write(PREFS, JSON.stringify({ ...prefs.get(), ...changes }));
  },
};

/** The version of a reply that is shown. */
export const shown = (m) => m.versions[m.shown];

/** A title from what was first asked. */
export function titleOf(content) {
  const line = content.trim().split("\n")[0].replace(/^[#>*\s]+/, "").replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || "New conversation";
}

/** The request's messages: everything up to (not including) `end`, replies without text left out. */
export function messagesFor(c, end = c.messages.length) {
  const turns = c.messages.slice(0, end).map((m) => (m.role === "user" ? { role: "user", content: m.content } : { role: "assistant", content: shown(m).content }));
  return [...(c.system.trim() ? [{ role: "system", content: c.system }] : []), ...turns.filter((m) => m.role === "user" || m.content)];
}

/** The request's sampling fields. Without a limit of its own a reply may take a quarter of the model's `window`: a small model never comes to an end. */
export function samplingFor(c, window) {
  const given = Object.entries(c.sampling).filter(([k, v]) => k in SAMPLING && v !== null && v !== "");
  return { max_tokens: Math.max(16, Math.min(2048, Math.floor((window ?? 4096) / 4))), ...Object.fromEntries(given) };
}

/** A conversation as Markdown, for reading. */
export function asMarkdown(c) {
  const parts = [`# ${c.title}`, ...(c.system.trim() ? [`> ${c.system.trim().replaceAll("\n", "\n> ")}`] : [])];
  for (const m of c.messages) parts.push(m.role === "user" ? `## You\n\n${m.content}` : `## Model\n\n${shown(m).content}`);
  return `${parts.join("\n\n")}\n`;
}

/** A file name from a title. */
export const fileName = (title, end) => `${title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "conversation"}.${end}`;
