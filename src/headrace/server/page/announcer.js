/** Reads an answer to a screen reader block by block, and not so often that one cuts the other off. */

const PAUSE_MS = 1500;

export class Announcer {
  #region;
  #queue = [];
  #timer = null;

  constructor(region) {
    this.#region = region;
  }

  say = (text) => {
    this.#queue.push(text);
    this.#timer ??= setTimeout(() => this.#speak(), 50);
  };

  /** A new conversation: what has not been said is of no more use. */
  clear() {
    this.#queue = [];
    this.#region.textContent = "";
  }

  #speak() {
    this.#timer = null;
    if (!this.#queue.length) return;
    this.#region.textContent = this.#queue.join(" ");
    this.#queue = [];
    this.#timer = setTimeout(() => this.#speak(), PAUSE_MS);
  }
}
