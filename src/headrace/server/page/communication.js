/** What each collective sent: the bytes that the formulas predict, beside those that were counted. */

import { byId, setRows, setText } from "./dom.js";
import { count } from "./format.js";

export function drawCommunication(stats) {
  const { layout } = stats;
  const communication = stats.communication ?? [];
  const table = byId("communication");
  table.parentElement.hidden = communication.length === 0;
  setText(byId("communication-note"), note(communication, layout));
  setRows(table.tBodies[0], communication.map(row));
}

function row({ group, operation, phase, calls, wire_bytes, predicted_calls, predicted_wire_bytes }) {
  const isEqual = calls === predicted_calls && wire_bytes === predicted_wire_bytes;
  return [
    `${group} ${operation.replaceAll("_", "-")}, ${phase}`,
    calls === predicted_calls ? count(calls) : { text: `${count(calls)} of ${count(predicted_calls)}`, className: "different" },
    count(predicted_wire_bytes),
    isEqual ? { text: "=", className: "mark equal", title: "equal" } : { text: "≠", className: "mark different", title: "different" },
    count(wire_bytes),
  ];
}

const isDifferent = (line) => line.calls !== line.predicted_calls || line.wire_bytes !== line.predicted_wire_bytes;

function note(communication, layout) {
  if (!layout) return "Not known yet.";
  if (communication.length === 0) {
    const isAlone = layout.tensor_parallel_size * layout.pipeline_parallel_size === 1;
    return isAlone ? "One rank: nothing is exchanged." : "Nothing has been exchanged yet.";
  }
  const different = communication.filter(isDifferent).length;
  if (different === 0) return "Bytes on the wire since the start. What was counted is what the formulas predict, to the byte.";
  return `Bytes on the wire since the start. ${different} of ${communication.length} lines differ from what the formulas predict.`;
}
