/**
 * The network of a model file in onnxruntime-web. What captioner/onnx.py does, for one picture at a time.
 */

import { placeWeights } from "./model.js";

/** @typedef {{type: string, data: any, dims: readonly number[]}} Tensor of onnxruntime-web */
/** @typedef {Record<string, Tensor>} Tensors by name */
/** @typedef {{inputNames: readonly string[], outputNames: readonly string[], run(inputs: Tensors): Promise<Tensors>, release(): Promise<void>}} Session */
/**
 * @typedef {object} Runtime onnxruntime-web
 * @property {new (type: string, data: any, dims: readonly number[]) => Tensor} Tensor
 * @property {{create(graph: Uint8Array, options: object): Promise<Session>}} InferenceSession
 */
/** @typedef {{data: Float32Array, width: number}} Rows values of each hypothesis, one after another */
/** @typedef {Record<string, Rows | undefined> & {attention: Rows}} Look where the network looked; see captioner/engine.py */
/** @typedef {Tensors} State by name: "image.*" of the picture (1, ...), "row.*" of the hypotheses (1, K, ...) */

const [IMAGE, ROW, NEXT] = ["image.", "row.", "next."];
const LOOKS = ["attention", "visual"];
const ERRORS = 3; // log level: without warnings, such as that WebGPU lacks an operator
const TOLERANCE = 1e-3; // of results with WebGPU, relative to the largest value

/** A captioning network. Hypotheses are rows, K of them. */
export class Engine {
  #runtime;
  #start;
  #step;
  /** @type {Session | undefined} encodes with WebGPU, instead of `#start` */
  #fast;

  /**
   * @param {Runtime} runtime
   * @param {Session} start
   * @param {Session} step
   */
  constructor(runtime, start, step) {
    this.#runtime = runtime;
    this.#start = start;
    this.#step = step;
  }

  /**
   * Build the sessions of a model file.
   * @param {import("./model.js").ModelFile} model
   * @param {Runtime} runtime
   * @param {boolean} [gpu] whether to encode with WebGPU, if its results agree with those of WebAssembly
   */
  static async load(model, runtime, gpu = false) {
    /**
     * @param {string} name
     * @param {string} provider
     */
    const create = (name, provider) => {
      const { graph, weights } = placeWeights(model.readBytes(`graph.${name}`), (weight) => model.readWeight(weight));
      const externalData = [{ path: "weights", data: weights }];
      const options = { externalData, executionProviders: [provider], logSeverityLevel: ERRORS };
      return runtime.InferenceSession.create(graph, options);
    };
    // One after the other, as each holds its weights twice for a moment.
    const start = await create("start", "wasm");
    const step = await create("step", "wasm");
    const engine = new Engine(runtime, start, step);
    if (gpu) await create("start", "webgpu").then((fast) => engine.#accelerate(fast, model.header.images.size), () => {});
    return engine;
  }

  /**
   * Encode with another session from now on, if its results agree for a synthetic picture.
   * @param {Session} fast
   * @param {number} size of pictures
   */
  async #accelerate(fast, size) {
    const waves = Float32Array.from({ length: 3 * size * size }, (_, index) => 2 * Math.sin(index ** 1.5 / size));
    const expected = await this.start(waves);
    const found = await fast.run({ pixels: this.#toTensor(waves) }).catch(() => undefined);
    if (found && Object.keys(expected).every((name) => agree(expected[name].data, found[name].data))) this.#fast = fast;
    else await fast.release();
  }

  /**
   * Encode a picture.
   * @param {Float32Array} pixels (3, size, size)
   * @returns {Promise<State>} of one row
   */
  async start(pixels) {
    const inputs = { pixels: this.#toTensor(pixels) };
    if (this.#fast) {
      try {
        return await this.#fast.run(inputs);
      } catch {
        this.#fast = undefined; // the GPU was lost
      }
    }
    return this.#start.run(inputs);
  }

  /** @param {Float32Array} pixels (3, size, size) */
  #toTensor(pixels) {
    const size = Math.sqrt(pixels.length / 3);
    return new this.#runtime.Tensor("float32", pixels, [1, 3, size, size]);
  }

  /**
   * Read the previous word of each row and predict the next.
   * @param {number[]} words K of them
   * @param {State} state of as many rows
   * @returns {Promise<{logProbs: Rows, state: State, look: Look}>} log-probabilities may be changed
   */
  async step(words, state) {
    const ids = new this.#runtime.Tensor("int64", BigInt64Array.from(words, BigInt), [1, words.length]);
    const found = await this.#step.run({ words: ids, ...state });
    /** @param {string} name */
    const toRows = (name) => found[name] && { data: found[name].data, width: found[name].data.length / words.length };
    /** @type {State} */
    const next = {};
    for (const name in state) next[name] = name.startsWith(ROW) ? found[NEXT + name] : state[name];
    const look = Object.fromEntries(LOOKS.map((name) => [name, toRows(name)]));
    return { logProbs: /** @type {Rows} */ (toRows("log_probs")), state: next, look: /** @type {Look} */ (look) };
  }

  /**
   * Return the state of some rows, each of which may be named several times or not at all.
   * @param {State} state
   * @param {number[]} rows
   * @returns {State}
   */
  select(state, rows) {
    /** @type {State} */
    const selected = {};
    for (const [name, tensor] of Object.entries(state)) {
      selected[name] = name.startsWith(IMAGE) ? tensor : this.#selectRows(tensor, rows);
    }
    return selected;
  }

  /**
   * @param {Tensor} tensor (1, K, ...)
   * @param {number[]} rows
   */
  #selectRows({ type, data, dims }, rows) {
    const width = data.length / dims[1];
    const selected = new data.constructor(rows.length * width);
    rows.forEach((row, index) => selected.set(data.subarray(row * width, (row + 1) * width), index * width));
    return new this.#runtime.Tensor(type, selected, [1, rows.length, ...dims.slice(2)]);
  }
}

/**
 * @param {Float32Array} expected
 * @param {Float32Array} found
 */
function agree(expected, found) {
  const largest = expected.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  return expected.every((value, index) => Math.abs(value - found[index]) <= TOLERANCE * largest);
}
