/** What the page knows of the server: whether it answers, what state it says it is in, and whether it asks for a key. */

import { ConnectionLost, ServerError, apiKey } from "./api.js";
import { byId, setText } from "./dom.js";
import { markStale } from "./figures.js";
import { failureSentence } from "./stats.js";

const STATES = {
  starting: ["warn", "Starting"],
  ready: ["good", "Ready"],
  recovering: ["warn", "Recovering: what was lost is being started again"],
  draining: ["warn", "Draining: what runs is finished, and nothing new is taken"],
  failed: ["bad", "Failed: nothing is served until it is started again"],
};

export class Connection {
  #onKey;

  /** @param {() => void} onKey hears that the reader gave a key */
  constructor(onKey) {
    this.#onKey = onKey;
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set(byId("key").value.trim());
      byId("key").value = "";
      this.#onKey();
    });
  }

  answered({ state, trouble }) {
    this.#hideKey();
    const [tone, sentence] = STATES[state] ?? ["warn", String(state)];
    this.#say(tone, trouble && state !== "starting" ? `${sentence} (${trouble})` : sentence, false);
  }

  failed(error) {
    const sentence = failureSentence(error);
    if (error instanceof ServerError && error.status === 401) {
      this.#askForKey(sentence);
      this.#say("warn", "The server asks for an API key", true);
    } else if (error instanceof ServerError) {
      this.#say("warn", sentence, true);
    } else {
      this.#say("bad", `${sentence} Trying again every second`, true);
    }
  }

  /** A refused or broken chat request says something of the server only if it is about the key or the connection. */
  static concerns(error) {
    return error instanceof ConnectionLost || error.status === 401;
  }

  #say(tone, text, isStale) {
    byId("status-dot").dataset.tone = tone;
    setText(byId("status"), text);
    markStale(isStale);
  }

  #askForKey(sentence) {
    setText(byId("key-reason"), sentence);
    if (!byId("key-form").hidden) return;
    byId("key-form").hidden = false;
    byId("key").focus();
  }

  #hideKey() {
    if (byId("key-form").hidden) return;
    byId("key-form").hidden = true;
    byId("message").focus();
  }
}
