/** One question and its answer on the page, drawn at most once a frame. */

import { make } from "./dom.js";
import { count, rate, seconds } from "./format.js";
import { MarkdownStream } from "./markdown.js";

const FINISH = { length: "Ended at the largest number of tokens.", error: "Ended by an error." };

export class AnswerView {
  #turn;
  #markdown;
  #pending = "";
  #frame = null;
  #beforeDraw;
  #afterDraw;
  #note;
  #prose;

  /**
   * @param {import("./conversation.js").Turn} turn
   * @param {{announce: (text: string) => void, draw: (change: () => void) => void, retry: () => void}} page
   */
  constructor(turn, page) {
    this.#turn = turn;
    this.page = page;
    this.#prose = make("div", { className: "prose" });
    this.#note = make("p", { className: "note" });
    this.#markdown = new MarkdownStream(this.#prose, page.announce);
    this.element = make(
      "article",
      { className: "turn" },
      make("h3", { className: "speaker", textContent: "You" }),
      make("div", { className: "question", textContent: turn.question }),
      make("h3", { className: "speaker", textContent: "Answer" }),
      make("div", { className: "answer" }, this.#prose, this.#note),
    );
    this.element.dataset.state = "streaming";
  }

  /** Text is collected and drawn with the next frame; a hidden page has none, and draws it all at the end. */
  append(text) {
    this.#pending += text;
    this.#frame ??= requestAnimationFrame(() => this.#flush());
  }

  #flush() {
    this.#frame = null;
    const text = this.#pending;
    this.#pending = "";
    this.page.draw(() => this.#markdown.append(text));
  }

  finish() {
    cancelAnimationFrame(this.#frame);
    this.#flush();
    this.page.draw(() => {
      this.#markdown.end();
      this.element.dataset.state = this.#turn.state;
      this.#note.append(...this.#ending());
    });
  }

  #ending() {
    const { state, error, finishReason } = this.#turn;
    if (state === "failed") {
      const retry = make("button", { type: "button", className: "retry", textContent: "Try again" });
      retry.addEventListener("click", this.page.retry);
      return [make("span", { className: "error", role: "alert", textContent: error.message }), retry];
    }
    const said = state === "stopped" ? "Stopped." : FINISH[finishReason];
    return [[said, cost(this.#turn)].filter(Boolean).join(" ")];
  }
}

/** What the reader saw of it: the times are this page's own. A pace needs some time to be one. */
function cost({ usage, begun, first, ended }) {
  if (!first) return "";
  const whole_s = (ended - begun) / 1000;
  const after_first_s = (ended - first) / 1000;
  const tokens = usage?.completion_tokens;
  const parts = [`first text after ${seconds((first - begun) / 1000)}`];
  if (tokens) parts.unshift(`${count(tokens)} ${tokens === 1 ? "token" : "tokens"} in ${seconds(whole_s)}`);
  if (tokens > 1 && after_first_s > 1) parts.push(`${rate((tokens - 1) / after_first_s)} tokens/s`);
  const text = parts.join(", ");
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}
