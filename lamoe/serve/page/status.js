// Shows the state of the server: the model's name at the top, and a banner if something is wrong.

import { $, count, text } from "./dom.js";
import { askKey, wasAsked } from "./key.js";
import { pollNow, server } from "./panel.js";

const STATE_NAMES = {
  connecting: "Connecting",
  loading: "Loading",
  gone: "No connection",
  key: "Key needed",
};

/** Show `server` (see panel.js), and ask for a key the first time that one is needed. */
export function showStatus() {
  const { state, stats } = server;
  $("dot").className = `dot ${state === "key" ? "loading" : state}`;
  const ready = stats ? `${stats.model} · ${stats.dtype}` : "Ready";
  text($("model"), STATE_NAMES[state] ?? ready);
  $("chip").title = stats
    ? `${stats.model}, ${stats.dtype}, reads ${count(stats.max_model_len)} tokens`
    : "";
  showBanner(state);
  if (state === "key" && !wasAsked()) askKey();
  if (stats) text($("about"), describeModel(stats));
}

function showBanner(state) {
  const reason = server.why.replace(/; try again later$/, "");
  const banners = {
    loading: { message: `Not ready: ${reason}. You can write meanwhile.` },
    gone: {
      message: "The server cannot be reached. Your conversations are safe in this browser.",
      label: "Try now",
      action: pollNow,
    },
    key: {
      message: "This server asks for an API key.",
      label: "Enter the key",
      action: () => askKey(),
    },
  };
  const { message = "", label = "", action = null } = banners[state] ?? {};
  text($("banner-text"), message);
  $("banner").hidden = !message;
  $("banner-action").hidden = !label;
  text($("banner-action"), label);
  $("banner-action").onclick = action;
}

function describeModel({ model, max_model_len: contextLength, cache }) {
  const limit = count(contextLength);
  const bytes = count(cache.bytes_per_token);
  const own = `${model} reads up to ${limit} tokens and keeps ${bytes} bytes of each`;
  const { mha } = cache.compare ?? {};
  return mha ? `${own}; multi-head attention would keep ${count(mha)}.` : `${own}.`;
}
