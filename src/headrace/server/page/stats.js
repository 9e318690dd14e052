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
    const [stats, error] = await getStats(AbortSignal.any([paused, AbortSignal.timeout(PATIENCE_MS)])).then(
      (stats) => [stats, null],
      (error) => [null, error],
    );
    if (paused.aborted) return;
    this.#timer = setTimeout(() => this.#ask(paused), Math.max(100, PERIOD_MS - (performance.now() - begun)));
    if (error) this.#listener.onFailure(error);
    else this.#listener.onStats(stats);
  }
}

/** What a failure says to the reader: the server's own sentence where it gave one. */
export function failureSentence(error) {
  if (error instanceof ServerError) return error.message;
  if (error.name === "TimeoutError") return "The server has not answered for some seconds.";
  return "The server does not answer.";
}

/** Turns counters since the engine's start into rates of the last interval, and keeps two minutes of them. */
export class Rates {
  #last = null;
  #rates = null;
  /** @type {{at_s: number, generation: number | null}[]} newest last; null where there is a gap */
  history = [];

  /** @returns {{prompt: number, generation: number, time: object} | null} null with no earlier figures of the same engine */
  add(stats) {
    if (!stats.time_s) {
      this.break();
      return null;
    }
    // The server asks its engine once a second at most: it may have said the same before.
    if (this.#last && clock_s(stats) === clock_s(this.#last)) return this.#rates;
    this.#rates = this.#last && difference(this.#last, stats);
    this.#last = stats;
    this.#keep(this.#rates?.generation ?? null);
    return this.#rates;
  }

  /** The next figures may be of another engine: nothing is to be drawn across. */
  break() {
    if (this.#last) this.#keep(null);
    this.#last = this.#rates = null;
  }

  #keep(generation) {
    const now_s = performance.now() / 1000;
    this.history.push({ at_s: now_s, generation });
    this.history = this.history.filter(({ at_s }) => at_s >= now_s - HISTORY_S - 2);
  }
}

/** What the engine's time was spent on is all of its time: a clock of its own, read when the counters were. */
const clock_s = ({ time_s }) => time_s.compute + time_s.communication + time_s.waiting;

/** Null if the engine has started again in between. */
function difference(before, after) {
  const elapsed_s = clock_s(after) - clock_s(before);
  const prompt = (after.tokens.prompt - before.tokens.prompt) / elapsed_s;
  const generation = (after.tokens.generation - before.tokens.generation) / elapsed_s;
  if (elapsed_s < 0 || prompt < 0 || generation < 0) return null;
  const shares = Object.keys(after.time_s).map((key) => [key, (after.time_s[key] - before.time_s[key]) / elapsed_s]);
  return { prompt, generation, time: Object.fromEntries(shares) };
}
