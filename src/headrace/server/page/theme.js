/** Dark or light: the system's choice until the reader makes another. */

import { byId } from "./dom.js";
import { recall, remember } from "./memory.js";

const STORED = "headrace.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const current = () => recall("localStorage", STORED) ?? (system.matches ? "dark" : "light");

export function startTheme() {
  system.addEventListener("change", apply);
  byId("theme").addEventListener("click", () => {
    remember("localStorage", STORED, current() === "dark" ? "light" : "dark");
    apply();
  });
  apply();
}

function apply() {
  const theme = current();
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  byId("theme").ariaLabel = theme === "dark" ? "Light colours" : "Dark colours";
}
