/** The system message and the sampling settings, kept in this browser; what is empty is not sent. */

import { byId } from "./dom.js";
import { recall, remember } from "./memory.js";

const STORED = "headrace.settings";
const SAMPLING = ["temperature", "top_p", "max_completion_tokens", "seed"];
const FIELDS = ["system", ...SAMPLING];

export function restoreSettings() {
  const stored = JSON.parse(recall("localStorage", STORED) ?? "{}");
  for (const name of FIELDS) byId(name).value = stored[name] ?? "";
  byId("settings").addEventListener("input", storeSettings);
  byId("settings-toggle").addEventListener("click", toggle);
}

function storeSettings() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, byId(name).value]));
  remember("localStorage", STORED, JSON.stringify(values));
}

function toggle() {
  const isOpen = byId("settings").hidden;
  byId("settings").hidden = !isOpen;
  byId("settings-toggle").ariaExpanded = String(isOpen);
  if (isOpen) byId("system").focus();
}

export const systemMessage = () => byId("system").value.trim();

/** The first setting that is no number of its range, so that it can be mended before anything is sent. */
export function invalidSetting() {
  return SAMPLING.map(byId).find((field) => !field.checkValidity());
}

/** The sampling settings that were given, as numbers. */
export function samplingSettings() {
  const given = SAMPLING.filter((name) => byId(name).value !== "");
  return Object.fromEntries(given.map((name) => [name, byId(name).valueAsNumber]));
}
