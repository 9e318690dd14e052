/** The chat: what is asked, stopped, tried again and begun anew. */

import { AnswerView } from "./answer_view.js";
import { Announcer } from "./announcer.js";
import { ServerError, getModel } from "./api.js";
import { Turn, messagesOf } from "./conversation.js";
import { byId } from "./dom.js";
import { Follower } from "./scroll.js";
import { invalidSetting, samplingSettings, systemMessage } from "./settings.js";

const ENDINGS = { done: "The answer is complete.", stopped: "Stopped.", failed: "" };

export class Chat {
  #turns = [];
  #running = null;
  #announcer = new Announcer(byId("announcer"));
  #follower = new Follower(byId("log"), byId("latest"));
  #onFailure;
  model = null;

  /** @param {(error: Error) => void} onFailure hears of a request that the server refused or never answered */
  constructor(onFailure) {
    this.#onFailure = onFailure;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    byId("message").addEventListener("keydown", (event) => {
      const sends = event.key === "Enter" && !event.isComposing && !event.shiftKey;
      if (!sends) return;
      event.preventDefault();
      this.#submit();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    byId("stop").addEventListener("click", () => this.stop());
    byId("new").addEventListener("click", () => this.#restart());
    byId("examples").addEventListener("click", ({ target }) => target.matches("button") && this.#askExample(target.textContent));
  }

  stop() {
    this.#running?.stop();
  }

  #submit() {
    const question = byId("message").value.trim();
    if (!question || this.#running) return;
    const invalid = invalidSetting();
    if (invalid) {
      byId("settings").hidden = false;
      byId("settings-toggle").ariaExpanded = "true";
      invalid.reportValidity();
      return;
    }
    byId("message").value = "";
    this.#ask(question);
  }

  #askExample(question) {
    byId("message").focus(); // the examples go away
    this.#ask(question);
  }

  async #ask(question) {
    const turn = new Turn(question);
    const earlier = [...this.#turns];
    const view = new AnswerView(turn, {
      announce: this.#announcer.say,
      draw: (change) => this.#follower.draw(change),
      retry: () => this.#retry(turn, view),
    });
    this.#turns.push(turn);
    this.#show(turn, view);
    await turn.run(await this.#body(earlier, question), (text) => view.append(text));
    if (this.#running !== turn) return; // a new conversation has begun
    this.#end(turn, view);
  }

  async #body(earlier, question) {
    this.model ??= await getModel().catch(() => null);
    return { model: this.model, messages: messagesOf(systemMessage(), earlier, question), ...samplingSettings() };
  }

  #show(turn, view) {
    this.#running = turn;
    byId("empty").hidden = true;
    byId("turns").append(view.element);
    this.#follower.toEnd();
    this.#setBusy(true);
    this.#announcer.say("Answering.");
  }

  #end(turn, view) {
    this.#running = null;
    view.finish();
    this.#setBusy(false);
    if (ENDINGS[turn.state]) this.#announcer.say(ENDINGS[turn.state]);
    if (turn.state === "failed" && (turn.lostConnection || turn.error instanceof ServerError)) this.#onFailure(turn.error);
  }

  #setBusy(isBusy) {
    const [shown, hidden] = isBusy ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
    const losesFocus = document.activeElement === hidden;
    shown.hidden = false;
    hidden.hidden = true;
    byId("log").ariaBusy = String(isBusy);
    if (losesFocus) byId("message").focus();
  }

  #retry(turn, view) {
    if (this.#running) return;
    this.#turns = this.#turns.filter((other) => other !== turn);
    view.element.remove();
    byId("message").focus();
    this.#ask(turn.question);
  }

  #restart() {
    const running = this.#running;
    this.#running = null;
    running?.stop();
    this.#turns = [];
    byId("turns").replaceChildren();
    byId("empty").hidden = false;
    this.#announcer.clear();
    this.#setBusy(false);
    byId("message").focus();
  }
}
