/** The server's figures once a second, and what follows from two of them: rates and shares. */

import { getStats, ServerError } from "./api.js";

const PERIOD_MS = 1000;
const PATIENCE_MS = 5000; // a step of a long prefill may keep an answer back; a dead server is noticed at once all the same
export const HISTORY_S = 120;

/** Asks while the page can be seen, for as long as it is open: a server that went away is asked until it is back. */
export class StatsPoll {
  #listener;
  #timer = null;
  #asking = null;

  /** @param {{onStats: (stats: object) => void, onFailure: (error: Error) => void}} listener */
  constructor(listener) {
    this.#listener = listener;
  }

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#pause() : this.askNow()));
    if (!document.hidden) this.askNow();
  }

  /** Also called where something else has shown that the server may be gone. */
  askNow() {
    this.#pause();
    this.#asking = new AbortController();
    this.#ask(this.#asking.signal);
  }

  #pause() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
  }

  async #ask(paused) {
    const begun = performance.now();
    try {
      const stats = await getStats(AbortSignal.any([paused, AbortSignal.timeout(PATIENCE_MS)]));
      if (paused.aborted) return;
      this.#listener.onStats(stats);
    } catch (error) {
      if (paused.aborted) return;
      this.#listener.onFailure(error);
    }
    this.#timer = setTimeout(() => this.#ask(paused), Math.max(100, PERIOD_MS - (performance.now() - begun)));
  }
}

/** What a failure says to the reader: the server's own sentence where it gave one. */
export function failureSentence(error) {
  if (error instanceof ServerError) return error.message;
  if (error.name === "TimeoutError") return "The server has not answered for some seconds.";
  return "The server does not answer.";
}

/** Turns counters since the server's start into rates of the last interval, and keeps two minutes of them. */
export class Rates {
  #last = null;
  /** @type {{at_s: number, generation: number | null}[]} newest last; null where there is a gap */
  history = [];

  /** @returns {{prompt: number, generation: number, time: object} | null} null with no earlier figures of the same server */
  add(stats) {
    const rates = this.#last && difference(this.#last, stats);
    this.#last = stats;
    const now_s = performance.now() / 1000;
    this.history.push({ at_s: now_s, generation: rates ? rates.generation : null });
    this.history = this.history.filter(({ at_s }) => at_s >= now_s - HISTORY_S - 2);
    return rates;
  }

  /** The next figures may be of another process: nothing is to be drawn across. */
  break() {
    if (this.#last) this.history.push({ at_s: performance.now() / 1000, generation: null });
    this.#last = null;
  }
}

function difference(before, after) {
  const elapsed_s = after.uptime_s - before.uptime_s;
  const since = (name, key) => (after[name]?.[key] ?? NaN) - (before[name]?.[key] ?? NaN);
  const generation = since("tokens", "generation") / elapsed_s;
  if (!(elapsed_s > 0) || generation < 0) return null; // it has started again in between
  const parts = ["compute", "communication", "waiting"].map((key) => [key, Math.max(0, since("time_s", key))]);
  const total = parts.reduce((sum, [, value]) => sum + value, 0);
  const time = total > 0 ? Object.fromEntries(parts.map(([key, value]) => [key, value / total])) : null;
  return { prompt: since("tokens", "prompt") / elapsed_s, generation, time };
}
