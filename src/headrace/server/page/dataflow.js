/** Which implementation multiplies how many rows, for each shape of a linear layer. */

import { byId, setRows, setText } from "./dom.js";
import { count } from "./format.js";

const ARMS = ["gemv", "flat_gemm", "gemm"];

export function drawDataflow({ dataflow, num_running: rows }) {
  const shapes = dataflow?.shapes ?? [];
  byId("dataflow").parentElement.hidden = shapes.length === 0;
  setRows(byId("dataflow").tBodies[0], shapes.map((shape) => row(shape, rows)));
  setText(byId("dataflow-note"), [origin(dataflow), now(shapes, rows)].filter(Boolean).join(" "));
}

function row({ name, n, k, format, arms }, rows) {
  const cells = ARMS.map((arm) => cell(arms.filter((range) => range.arm === arm), rows));
  return [{ text: short(name), title: name }, `${n} × ${k}`, format, ...cells];
}

/** q_proj + k_proj + v_proj are one matrix: q + k + v. */
const short = (name) => name.replaceAll("_proj", "");

function cell(ranges, rows) {
  const isNow = rows > 0 && ranges.some(({ from_rows, to_rows }) => rows >= from_rows && rows <= (to_rows ?? Infinity));
  return { text: ranges.map(rangeText).join(", "), className: isNow ? "now" : "" };
}

function rangeText({ from_rows, to_rows }) {
  if (to_rows === null || to_rows === undefined) return `${count(from_rows)}+`;
  return from_rows === to_rows ? count(from_rows) : `${count(from_rows)}–${count(to_rows)}`;
}

/** Where the choice is from. */
function origin(dataflow) {
  if (!dataflow) return "Not known yet.";
  const defaults = (dataflow.shapes ?? []).filter(({ source }) => source === "default").map(({ name }) => short(name));
  const sentences = {
    measured: "Measured on this machine.",
    default: "Default points, not measured on this machine.",
    "partly measured": `Measured on this machine, but for the default points of ${defaults.join(", ")}.`,
    forced: "One implementation for all, as was asked for.",
    none: "There is but one implementation here, and nothing to choose.",
  };
  return sentences[dataflow.source] ?? String(dataflow.source);
}

function now(shapes, rows) {
  if (!shapes.length || !rows) return "";
  return `Marked: the rows of a decode step of ${rows === 1 ? "the one request that runs" : `the ${rows} requests that run`} now.`;
}
