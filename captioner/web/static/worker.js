/**
 * The worker that computes captions: one picture at a time, in the order in which they come.
 */

import { Captioner } from "./captioner.js";
import { join } from "./model.js";
import { Problem } from "./problem.js";

/** @typedef {import("./browser.js").Message} Message */

const MOST_THREADS = 4;
const SITE = new URL("../", import.meta.url);
const RUNTIME = new URL("runtime/", SITE).href;
const CPU = { script: "ort.wasm.min.mjs", wasm: "ort-wasm-simd-threaded.wasm" };
const GPU = { script: "ort.jspi.min.mjs", wasm: "ort-wasm-simd-threaded.jspi.wasm" }; // with WebGPU

/** @type {Promise<Captioner> | undefined} */
let captioner = load();
captioner.catch(() => {}); // requests for captions report it

let last = Promise.resolve();

addEventListener("message", ({ data: { id, file, settings } }) => {
  last = last.then(async () => {
    try {
      captioner ??= load();
      tell({ id, reply: await (await captioner).caption(file, settings) });
    } catch (error) {
      if (error instanceof Problem) return tell({ id, problem: error.message, passing: error.passing });
      tell({ id, problem: `The captioner failed (${describe(error)}). Try again.`, passing: true });
    }
  });
});

/** Load the model and onnxruntime-web. */
async function load() {
  try {
    const gpu = await hasGpu();
    const { script, wasm } = gpu ? GPU : CPU;
    const names = ["model.safetensors", `runtime/${wasm}`];
    const responses = await Promise.all(names.map((name) => open(new URL(name, SITE))));
    const loading = { done: 0, all: responses.reduce((sum, { size }) => sum + size, 0) };
    const files = responses.map(({ response }) =>
      read(response, (bytes) => {
        loading.done += bytes;
        tell({ loading });
      }),
    );
    const runtime = await import(new URL(script, RUNTIME).href);
    const [model, wasmBinary] = await Promise.all(files);
    tell({ loading: { done: 1, all: 1 } });
    Object.assign(runtime.env.wasm, {
      wasmBinary,
      wasmPaths: RUNTIME,
      numThreads: crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1,
    });
    return await Captioner.load(model, runtime, gpu);
  } catch (error) {
    captioner = undefined; // the next picture tries again
    tell({ loading: { done: 1, all: 1 } });
    if (error instanceof Problem) throw error;
    throw new Problem(`The captioner cannot be loaded (${describe(error)}). Reload the page.`, true);
  }
}

/** Whether WebGPU has a GPU, and the browser has JavaScript Promise Integration, which the files of GPU need. */
async function hasGpu() {
  const { gpu } = /** @type {any} */ (navigator);
  const adapter = "Suspending" in WebAssembly && (await gpu?.requestAdapter().catch(() => null));
  return Boolean(adapter) && !adapter.info.isFallbackAdapter; // which computes on the CPU
}

/** @param {URL} address */
async function open(address) {
  const response = await fetch(address).catch(() => undefined);
  if (!response?.ok || !response.body)
    throw new Problem("The captioner cannot be loaded. Is there a connection?", true);
  return { response, size: Number(response.headers.get("Content-Length")) || 0 };
}

/**
 * Read a response to its end.
 * @param {Response} response
 * @param {(bytes: number) => void} progress
 * @returns {Promise<ArrayBuffer>}
 */
async function read(response, progress) {
  const chunks = [];
  for (const reader = /** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (response.body).getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return join(chunks).buffer;
    chunks.push(value);
    progress(value.length);
  }
}

/** @param {unknown} error */
function describe(error) {
  return error instanceof Error ? error.message : String(error);
}

/** @param {Message} message */
function tell(message) {
  /** @type {any} */ (self).postMessage(message);
}
