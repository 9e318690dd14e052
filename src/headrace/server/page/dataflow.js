/** Which implementation multiplies how many rows, for each shape of a linear layer. */

import { byId, setRows, setText } from "./dom.js";
import { count } from "./format.js";

const ARMS = ["gemv", "flat_gemm", "gemm"];

export function drawDataflow({ dataflow, num_running: rows }) {
  const shapes = dataflow?.shapes ?? [];
  setRows(byId("dataflow").tBodies[0], shapes.map((shape) => row(shape, rows)));
  setText(byId("dataflow-note"), shapes.length ? note(dataflow.source, rows) : "Not known yet.");
}

function row({ name, n, k, format, arms }, rows) {
  return [name, `${n} × ${k}`, format, ...ARMS.map((arm) => cell(arms.filter((range) => range.arm === arm), rows))];
}

function cell(ranges, rows) {
  const isNow = rows > 0 && ranges.some(({ from_rows, to_rows }) => rows >= from_rows && rows <= (to_rows ?? Infinity));
  return { text: ranges.map(rangeText).join(", "), className: isNow ? "now" : "" };
}

function rangeText({ from_rows, to_rows }) {
  if (to_rows === null || to_rows === undefined) return `${count(from_rows)}+`;
  return from_rows === to_rows ? count(from_rows) : `${count(from_rows)}–${count(to_rows)}`;
}

function note(source, rows) {
  const origin = source === "measured" ? "Measured on this machine." : `Not measured on this machine (${source}): headrace tune measures it.`;
  const now = rows > 0 ? ` Marked: a decode step of the ${rows === 1 ? "one request" : `${rows} requests`} that run now.` : "";
  return `Rows of a step, and what multiplies them. ${origin}${now}`;
}
