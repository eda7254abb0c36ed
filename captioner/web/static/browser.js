/**
 * Captions that this browser computes, in a worker of its own, so that the page stays responsive.
 */

import { checkSize } from "./frame.js";
import { Problem } from "./problem.js";

/** @typedef {import("./server.js").Reply} Reply */
/** @typedef {{done: number, all: number}} Loading bytes of the model and of what runs it */
/** @typedef {{id?: number, reply?: Reply, problem?: string, passing?: boolean, loading?: Loading}} Message of the worker */

const SETTINGS = { candidates: 5, alternatives: 3 };
const LONGEST_WAIT = 10_000; // milliseconds for the service worker, without which all works but offline

/** @type {Map<number, (message: Message) => void>} who waits for which answer */
const waiting = new Map();
/** @type {Promise<Worker> | undefined} */
let worker;
let asked = 0;
/** @type {Promise<unknown>} */
let checked = Promise.resolve();

/** @type {import("./page.js").Captioner} */
export const browser = {
  async check(file) {
    try {
      await file.slice(0, 1).arrayBuffer();
    } catch {
      throw new Problem("This cannot be read: it is a folder, or a file that is gone or was changed.", false);
    }
    const measured = checked.then(() => measure(file)); // one at a time, as each is in memory meanwhile
    checked = measured;
    const { width, height } = await measured;
    checkSize(width, height);
  },

  async caption(file, { signal }) {
    worker ??= startWorker();
    const port = await worker;
    signal.throwIfAborted();
    return new Promise((resolve, reject) => {
      const id = ++asked;
      waiting.set(id, ({ reply, problem, passing }) => {
        waiting.delete(id);
        if (reply) resolve(reply);
        else reject(new Problem(problem ?? "", Boolean(passing)));
      });
      signal.addEventListener("abort", () => {
        waiting.delete(id);
        reject(signal.reason);
      });
      port.postMessage({ id, file, settings: SETTINGS });
    });
  },

  async getExample() {
    const response = await fetch("example.jpg").catch(() => undefined);
    if (!response?.ok) throw new Problem("The example cannot be loaded. Is there a connection?", true);
    return new File([await response.blob()], "example.jpg", { type: "image/jpeg" });
  },
};

worker = startWorker(); // the model is needed anyway

/**
 * Return the size of a picture without decoding it; zeros if the browser cannot show it.
 * @param {File} file
 * @returns {Promise<{width: number, height: number}>}
 */
function measure(file) {
  const image = new Image();
  return new Promise((resolve) => {
    image.onload = image.onerror = () => {
      URL.revokeObjectURL(image.src);
      resolve({ width: image.naturalWidth, height: image.naturalHeight });
    };
    image.src = URL.createObjectURL(file);
  });
}

/** Start a worker, behind the service worker, which keeps what it loads. */
async function startWorker() {
  await startServiceWorker();
  const started = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  started.addEventListener("message", (/** @type {MessageEvent<Message>} */ { data }) => {
    if (data.loading) showLoading(data.loading);
    if (data.id !== undefined) waiting.get(data.id)?.(data);
  });
  started.addEventListener("error", (event) => {
    event.preventDefault();
    started.terminate();
    worker = undefined; // the next picture gets a new one
    showLoading();
    const problem = "The captioner stopped: there may be too little memory. Close other tabs, or reload the page.";
    for (const answer of [...waiting.values()]) answer({ problem, passing: true });
  });
  return started;
}

async function startServiceWorker() {
  const { serviceWorker } = navigator; // none where the page is not secure, as over http from another machine
  if (!serviceWorker) return;
  /** @type {Promise<void>} */
  const controlled = new Promise((resolve) => {
    if (serviceWorker.controller) resolve();
    serviceWorker.addEventListener("controllerchange", () => resolve());
    setTimeout(resolve, LONGEST_WAIT);
  });
  const registered = await serviceWorker.register("service-worker.js").catch(() => undefined);
  if (registered) await controlled;
}

/** @param {Loading} [loading] undefined: all is loaded */
function showLoading(loading) {
  const line = document.getElementById("loading");
  const bar = line?.querySelector("progress");
  const text = line?.querySelector("span");
  if (!line || !bar || !text) return;
  line.hidden = !loading || loading.done >= loading.all;
  if (!loading) return;
  const [done, all] = [loading.done, loading.all].map((bytes) => (bytes / 1e6).toFixed(0));
  bar.value = loading.done / loading.all;
  text.textContent = `Loading the captioner: ${done} of ${all} MB`;
}
