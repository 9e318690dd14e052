/** The figures beside the chat, from one answer of /stats and the rates since the one before. */

import { drawCommunication } from "./communication.js";
import { drawDataflow } from "./dataflow.js";
import { byId, setText } from "./dom.js";
import { NONE, count, duration, percent, rate, seconds } from "./format.js";
import { drawSparkline } from "./sparkline.js";

/**
 * @param {object} stats
 * @param {{prompt: number, generation: number, time: object} | null} rates
 * @param {{at_s: number, generation: number | null}[]} history
 */
export function drawFigures(stats, rates, history) {
  drawMasthead(stats);
  drawThroughput(rates, history);
  drawLatency(stats);
  drawLoad(stats);
  drawTime(rates?.time ?? null);
  drawCommunication(stats);
  drawDataflow(stats);
  drawSoftmax(stats.softmax);
}

/** While the server gives no figures, the last ones stay and say so. */
export function markStale(isStale) {
  const figures = byId("figures");
  if (figures.classList.toggle("stale", isStale) && byId("figures-note").hidden) {
    setText(byId("figures-note"), `As they were at ${new Date().toLocaleTimeString()}, when the server last gave them.`);
  }
  byId("figures-note").hidden = !isStale;
}

function drawMasthead({ model, version, uptime_s, layout }) {
  setText(byId("model"), model ?? "");
  byId("model").title = version ? `Headrace ${version}` : "";
  setText(byId("uptime"), uptime_s === undefined ? "" : `up ${duration(uptime_s)}`);
  setText(byId("layout"), layout ? layoutText(layout) : "");
}

function layoutText({ tensor_parallel_size: tp, pipeline_parallel_size: pp, transport, device, num_threads }) {
  const threads = num_threads ? `, ${num_threads} ${num_threads === 1 ? "thread" : "threads"}` : "";
  const through = transport && tp * pp > 1 ? ` over ${transport}` : "";
  return `TP ${tp} × PP ${pp}${through} on ${device}${threads}`;
}

function drawThroughput(rates, history) {
  setText(byId("generation-rate"), rate(rates?.generation));
  setText(byId("prompt-rate"), rate(rates?.prompt));
  const peak = drawSparkline(byId("sparkline"), history);
  setText(byId("sparkline-peak"), peak > 0 ? `peak ${rate(peak)}` : "");
}

function drawLatency(stats) {
  for (const row of byId("latency").tBodies[0].rows) {
    const times = stats[row.dataset.key] ?? {};
    ["last", "p50", "p95"].forEach((key, index) => setText(row.cells[index + 1], seconds(times[key])));
  }
}

function drawLoad({ num_running, num_waiting, max_num_seqs, num_preemptions, prefix_cache, kv_blocks }) {
  setText(byId("running"), max_num_seqs ? `${count(num_running)} of ${count(max_num_seqs)}` : count(num_running));
  setText(byId("waiting"), count(num_waiting));
  setText(byId("preemptions"), count(num_preemptions));
  setText(byId("prefix"), prefix_cache?.queried ? percent(prefix_cache.hit / prefix_cache.queried) : NONE);
  if (!kv_blocks) return;
  const { used, total, block_size } = kv_blocks;
  setText(byId("blocks"), `${count(used)} of ${count(total)}, ${count(block_size)} tokens each`);
  const bar = byId("blocks-bar");
  bar.ariaValueMax = String(total);
  bar.ariaValueNow = String(used);
  bar.ariaValueText = `${count(used)} of ${count(total)} blocks`;
  setWidth(bar.querySelector(".used"), total ? used / total : 0);
}

function drawTime(shares) {
  const keys = ["compute", "communication", "waiting"];
  for (const key of keys) {
    setText(byId("time-shares").querySelector(`[data-key=${key}]`), percent(shares?.[key]));
    setWidth(byId("time-bar").querySelector(`.${key}`), shares?.[key] ?? 0);
  }
  const label = shares ? keys.map((key) => `${key} ${percent(shares[key])}`).join(", ") : "Not known yet";
  if (byId("time-bar").ariaLabel !== label) byId("time-bar").ariaLabel = label;
}

function drawSoftmax(softmax) {
  const schemes = Object.entries(softmax?.schemes ?? {}).map(([scheme, layers]) => `${scheme} in ${layers} ${layers === 1 ? "layer" : "layers"}`);
  setText(byId("softmax-schemes"), schemes.join(", ") || NONE);
  setText(byId("softmax-recomputed"), count(softmax?.recomputed_rows));
}

function setWidth(element, share) {
  element.style.inlineSize = `${(share * 100).toFixed(2)}%`;
}
