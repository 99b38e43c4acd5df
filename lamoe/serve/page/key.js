// The dialog for the server's API key. It closes with a key only if the server accepts the key.

import { $, text } from "./dom.js";
import { apiKey, getJson } from "./api.js";
import { pollNow } from "./panel.js";

let openDialog = null; // the promise of the open dialog
let askedOnce = false;

/** Tell whether the dialog was shown before. After a cancel, the page does not show it unasked. */
export const wasAsked = () => askedOnce;

/** Ask for the key. Resolves to true if the server accepts one. Callers share one dialog. */
export function askKey() {
  askedOnce = true;
  openDialog ??= new Promise(showDialog);
  return openDialog;
}

function showDialog(resolve) {
  const dialog = $("key-dialog");
  const reason = apiKey.get()
    ? "The server refused the key it was given. Perhaps it was started with another one."
    : "This server asks for the key it was started with.";
  text($("key-why"), reason);
  $("key").value = "";
  $("key-form").onsubmit = async (e) => {
    e.preventDefault();
    if (await acceptKey($("key").value.trim())) dialog.close("yes");
  };
  $("key-cancel").onclick = () => dialog.close("");
  dialog.onclose = () => {
    openDialog = null;
    resolve(dialog.returnValue === "yes");
    dialog.returnValue = "";
    pollNow();
  };
  dialog.showModal();
  $("key").focus();
}

/** Try a key. Only a 401 refuses it: other errors do not concern the key. */
async function acceptKey(value) {
  if (!/^[\x21-\x7e]+$/.test(value)) {
    text($("key-why"), "A key is made of letters, digits and signs, without spaces.");
    return false;
  }
  apiKey.set(value);
  try {
    await getJson("/v1/models");
  } catch (e) {
    if (e.status === 401) {
      apiKey.set(null);
      text($("key-why"), "The server refused this key. Check it and try again.");
      $("key").select();
      return false;
    }
  }
  return true;
}
