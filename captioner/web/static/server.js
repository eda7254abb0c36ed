/**
 * What the page asks of its server. Addresses are relative, so that the page may stand below any path.
 */

import { Problem } from "./problem.js";

const TRIES = 6; // while the server is busy
const LONGEST_WAIT = 20; // seconds between two of them

/** @typedef {import("./light.js").Weights} Weights */
/** @typedef {import("./light.js").Rectangle} Rectangle */

/**
 * A sentence about a picture. Numbers are natural log-probabilities, or null for what cannot be.
 * @typedef {object} Sentence
 * @property {string} caption
 * @property {number | null} log_prob of the whole sentence
 * @property {string[]} words
 * @property {(number | null)[]} log_probs of each word
 * @property {number} [confidence] probability that all that it names is there, if the model tells it
 * @property {(number | null)[]} [word_confidences] the same of each word; null for words that name nothing
 * @property {number[]} [visual] share of each word's context that came from the picture, 0 to 1
 * @property {Weights[]} attention of each word
 * @property {Rectangle} rectangle the part of the picture that the attention covers
 * @property {Record<string, number | null>[]} [alternatives] other words in the place of each
 */

/** @typedef {Sentence & {width: number, height: number, candidates?: Sentence[]}} Reply of an upright picture */

/** @type {Promise<{bytes: number, candidates: number}> | undefined} what the server permits, once it is asked */
let limits;

/** @type {import("./page.js").Captioner} */
export const server = { check, caption, getExample };

/**
 * Refuse a file that the server would not take, before it is sent.
 * @param {File} file
 * @throws {Problem}
 */
async function check(file) {
  const { bytes } = await getLimits();
  if (file.size > bytes) {
    throw new Problem(
      `This file is too large: ${megabytes(file.size)}, and the server takes up to ${megabytes(bytes)}. ` +
        "Make the picture smaller.",
      false,
    );
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Problem("This cannot be read: it is a folder, or a file that is gone or was changed.", false);
  }
}

/**
 * Return what the server says of a picture; while it is busy, wait and ask again.
 * @param {File} file
 * @param {import("./page.js").Options} options
 * @returns {Promise<Reply>}
 * @throws {Problem} or the signal's reason
 */
async function caption(file, { signal, tellWait }) {
  const { candidates } = await getLimits();
  const headers = { "Content-Type": "application/octet-stream" };
  for (let tries = 1; ; tries++) {
    const response = await reach(`api/caption?candidates=${candidates}`, {
      method: "POST",
      body: file,
      headers,
      signal,
    });
    if (response.status !== 503 || tries === TRIES) return toJson(response);
    const seconds = Math.min(LONGEST_WAIT, Math.max(1, Number(response.headers.get("Retry-After")) || 1));
    tellWait(seconds);
    await sleep(seconds, signal);
  }
}

/**
 * Return the picture that the server has to try the page with.
 * @throws {Problem}
 */
async function getExample() {
  const response = await reach("example.jpg");
  if (!response.ok) throw new Problem(`The server has no example (${response.status}).`, false);
  return new File([await response.blob()], "example.jpg", { type: "image/jpeg" });
}

async function getLimits() {
  limits ??= reach("api/limits").then(toJson);
  try {
    return await limits;
  } catch (error) {
    limits = undefined; // so that the next try asks again
    throw error;
  }
}

/**
 * @param {string} address
 * @param {RequestInit} [options]
 */
async function reach(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    options?.signal?.throwIfAborted();
    throw new Problem("The server cannot be reached. Is it still running?", true);
  }
}

/**
 * @param {Response} response
 * @returns {Promise<any>}
 */
async function toJson(response) {
  const content = await response.json().catch(() => undefined); // not JSON, or cut off
  if (response.ok && content) return content;
  const detail =
    typeof content?.detail === "string" ? content.detail : `The server's answer is of no use (${response.status}).`;
  throw new Problem(detail, response.ok || response.status === 408 || response.status >= 500);
}

/**
 * @param {number} seconds
 * @param {AbortSignal} signal
 */
function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

/** @param {number} bytes */
function megabytes(bytes) {
  return `${Number((bytes / 2 ** 20).toFixed(1))} MB`;
}
