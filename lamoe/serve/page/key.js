// The dialog that asks for the server's key. It closes with a key only when the server takes it.

import { $, text } from "./dom.js";
import { apiKey, getJson } from "./api.js";
import { askNow } from "./panel.js";

let asking = null, askedOnce = false;

/** Whether the key was asked for since the page was opened; whoever cancelled is not asked again unbidden. */
export const wasAsked = () => askedOnce;

/** Ask for the key; true when the server took one. Several who ask share one dialog. */
export function askKey() {
  askedOnce = true;
  return (asking ??= new Promise((done) => {
    const dialog = $("key-dialog"), why = $("key-why"), form = $("key-form");
    text(why, apiKey.get() ? "The server refused the key it was given. Perhaps it was started with another one." : "This server asks for the key it was started with.");
    $("key").value = "";
    form.onsubmit = async (e) => {
      e.preventDefault();
      const value = $("key").value.trim();
      if (!/^[\x21-\x7e]+$/.test(value)) return text(why, "A key is made of letters, digits and signs, without spaces.");
      apiKey.set(value);
      try {
        await getJson("/v1/models");
      } catch (problem) {
        if (problem.status === 401) {
          apiKey.set(null);
          text(why, "The server refused this key. Check it and try again.");
          $("key").select();
          return;
        }
      }
      dialog.close("yes");
    };
    $("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      done(dialog.returnValue === "yes");
      dialog.returnValue = "";
      askNow();
    };
    dialog.showModal();
    $("key").focus();
  }));
}
