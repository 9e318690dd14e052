/** A conversation: questions and what was answered to them, and the requests that this makes. */

import { ConnectionLost, streamChat } from "./api.js";

/** Why an answer was ended by the reader, as the reason of an abort. */
export class Stopped extends Error {}

/**
 * One question and its answer. state: "streaming", "done", "stopped" or "failed"; times in milliseconds of performance.now().
 */
export class Turn {
  answer = "";
  state = "streaming";
  error = null;
  finishReason = null;
  usage = null;
  begun = performance.now();
  first = null;
  ended = null;
  #abort = new AbortController();

  constructor(question) {
    this.question = question;
  }

  stop() {
    this.#abort.abort(new Stopped("stopped"));
  }

  /**
   * Asks, and follows the answer to its end; never throws, but says in `state` and `error` how it went.
   * @param {object} body the request
   * @param {(text: string) => void} onText
   */
  async run(body, onText) {
    try {
      for await (const chunk of streamChat(body, this.#abort.signal)) this.#take(chunk, onText);
      this.state = "done";
    } catch (error) {
      this.state = error instanceof Stopped ? "stopped" : "failed";
      this.error = error;
    }
    this.ended = performance.now();
  }

  #take(chunk, onText) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice?.finish_reason) this.finishReason = choice.finish_reason;
    const text = choice?.delta?.content;
    if (!text) return;
    this.first ??= performance.now();
    this.answer += text;
    onText(text);
  }

  get lostConnection() {
    return this.error instanceof ConnectionLost;
  }
}

/** The messages of a request: a turn without an answer is left out, since templates ask for one after the other. */
export function messagesOf(system, turns, question) {
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...turns
      .filter(({ answer }) => answer)
      .flatMap((turn) => [
        { role: "user", content: turn.question },
        { role: "assistant", content: turn.answer },
      ]),
    { role: "user", content: question },
  ];
}
