/** Tokens per second over the last two minutes, as a line with its area. */

import { rate } from "./format.js";
import { HISTORY_S } from "./stats.js";

const WIDTH = 240;
const HEIGHT = 48;
const TOP = 3; // room for the line's own width
const SVG = "http://www.w3.org/2000/svg";

/** @returns {number} the highest rate that is drawn */
export function drawSparkline(svg, history) {
  const peak = Math.max(0, ...history.map(({ generation }) => generation ?? 0));
  const scale = peak || 1;
  const end_s = history.at(-1)?.at_s ?? 0;
  const x = (at_s) => WIDTH * (1 - (end_s - at_s) / HISTORY_S);
  const y = (value) => HEIGHT - (HEIGHT - TOP) * (value / scale);
  let line = "";
  let area = "";
  for (const run of runs(history)) {
    const points = run.map(({ at_s, generation }) => `${x(at_s).toFixed(2)} ${y(generation).toFixed(2)}`);
    line += `M${points.join("L")}`;
    area += `M${x(run[0].at_s).toFixed(2)} ${HEIGHT}L${points.join("L")}L${x(run.at(-1).at_s).toFixed(2)} ${HEIGHT}Z`;
  }
  path(svg, "area").setAttribute("d", area);
  path(svg, "line").setAttribute("d", line);
  svg.setAttribute("aria-label", `Tokens per second over two minutes: now ${rate(history.at(-1)?.generation)}, at most ${rate(peak)}`);
  return peak;
}

/** The pieces without a gap. */
function runs(history) {
  const pieces = [[]];
  for (const sample of history) {
    if (sample.generation === null) pieces.push([]);
    else pieces.at(-1).push(sample);
  }
  return pieces.filter((piece) => piece.length > 1);
}

function path(svg, name) {
  let element = svg.querySelector(`.${name}`);
  if (!element) {
    element = svg.appendChild(document.createElementNS(SVG, "path"));
    element.setAttribute("class", name);
  }
  return element;
}
