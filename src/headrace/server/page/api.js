/** The server's API: requests with the key, and errors as the server's own sentences. */

import { recall, remember } from "./memory.js";
import { eventData } from "./sse.js";

const KEY = "headrace.key";
const CUT = "The connection broke before the answer was complete. What had arrived is kept.";

/** The server answered, and said no. The message is its own. */
export class ServerError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The server did not answer, or stopped in the middle of it. */
export class ConnectionLost extends Error {}

/** Kept for this tab alone, and only until it is closed. */
export const apiKey = {
  get: () => recall("sessionStorage", KEY) ?? "",
  set: (key) => remember("sessionStorage", KEY, key),
};

/**
 * @param {string} path relative to the page, so that a proxy may put it below a prefix
 * @param {{body?: object, signal?: AbortSignal}} options
 */
async function request(path, { body, signal } = {}) {
  const headers = new Headers();
  if (apiKey.get()) headers.set("authorization", `Bearer ${apiKey.get()}`);
  if (body) headers.set("content-type", "application/json");
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    throw failure(error, signal, "The server does not answer.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  let sentence = text;
  try {
    sentence = JSON.parse(text).error.message;
  } catch {
    // not one of the API's error objects: a proxy's page, say
  }
  const short = String(sentence ?? "").trim().slice(0, 2000);
  return new ServerError(short || `The server answered ${response.status} ${response.statusText}`.trim() + ".", response.status, response.headers.get("retry-after"));
}

/** What an exception of fetch means: its own reason where somebody asked for it, else a lost connection. */
const failure = (error, signal, sentence) => (signal?.aborted ? (signal.reason ?? error) : new ConnectionLost(sentence));

export const getStats = async (signal) => (await request("stats", { signal })).json();

/** The first model that the server offers. */
export async function getModel(signal) {
  const { data } = await (await request("v1/models", { signal })).json();
  return data[0].id;
}

/**
 * Yields the chunks of a streamed chat completion; the last of them has the usage.
 * @param {object} body the request, without what makes it a stream
 * @param {AbortSignal} signal
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError) throw error;
    throw failure(error, signal, CUT);
  }
  throw new ConnectionLost(CUT);
}
