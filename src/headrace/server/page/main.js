/** Puts the page together: the chat, the figures, and what is known of the server. */

import { Chat } from "./chat.js";
import { Connection } from "./connection.js";
import { byId } from "./dom.js";
import { drawFigures } from "./figures.js";
import { restoreSettings } from "./settings.js";
import { Rates, StatsPoll } from "./stats.js";
import { startTheme } from "./theme.js";

startTheme();
restoreSettings();
startViews();

const rates = new Rates();
const connection = new Connection(() => poll.askNow());
const chat = new Chat((error) => {
  if (!Connection.concerns(error)) return;
  connection.failed(error);
  poll.askNow();
});
const poll = new StatsPoll({
  onStats(stats) {
    connection.answered(stats);
    chat.model = stats.model;
    drawFigures(stats, rates.add(stats), rates.history);
  },
  onFailure(error) {
    rates.break();
    connection.failed(error);
  },
});
poll.start();

/** On a narrow screen the chat and the figures take turns. */
function startViews() {
  const buttons = document.querySelectorAll(".views button");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      document.body.dataset.view = button.dataset.view;
      for (const other of buttons) other.ariaPressed = String(other === button);
    });
  }
}
