/**
 * Model files: a header, and tensors by name, in one `.safetensors` file. What captioner/model_file.py reads of them.
 */

import { Problem } from "./problem.js";

/**
 * @typedef {object} Header of a model file; see captioner/model_file.py
 * @property {number} format
 * @property {{encoder: {grid: [number, number] | null}}} model
 * @property {import("./frame.js").ImageSettings} images
 * @property {string[]} words
 * @property {[string, string][]} [merges]
 * @property {string[] | null} [repeated]
 * @property {Partial<import("./beam.js").SearchSettings> | null} search
 * @property {{folds: Fold[]} | null} graphs
 * @property {import("./confidence.js").Calibration | null} [calibration]
 */
/** @typedef {{convolution: string, norm: string, epsilon: number}} Fold a batch norm, folded into a convolution */
/** @typedef {{dtype: string, shape: number[], data_offsets: [number, number]}} Stored where a file has a tensor */

const FORMAT = 2;

/** The file, whose tensors are read one by one. */
export class ModelFile {
  #file;
  #start;
  /** @type {Record<string, Stored>} */
  #tensors;
  /** @type {Map<string, Fold>} by the convolution */
  #folds;

  /** @param {ArrayBuffer} file */
  constructor(file) {
    try {
      const length = Number(new DataView(file).getBigUint64(0, true));
      const { __metadata__, ...tensors } = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length)));
      this.#file = file;
      this.#start = 8 + length;
      this.#tensors = tensors;
      /** @type {Header} */
      this.header = JSON.parse(__metadata__.captioner);
    } catch (error) {
      throw new Problem("The model file is damaged: its header cannot be read. Load the page again.", true);
    }
    if (this.header.format !== FORMAT || !this.header.graphs) {
      throw new Problem("The model file holds no ONNX graphs of a format that this page reads.", false);
    }
    this.#folds = new Map(this.header.graphs.folds.map((fold) => [fold.convolution, fold]));
  }

  /** @param {string} name */
  readBytes(name) {
    if (!this.#tensors[name]) throw new Problem(`The model file is damaged: ${name} is missing.`, true);
    const [start, end] = this.#tensors[name].data_offsets;
    return new Uint8Array(this.#file, this.#start + start, end - start);
  }

  /**
   * Return a weight as the graphs take it: batch norms are folded into the convolutions before them.
   * @param {string} name
   */
  readWeight(name) {
    const dot = name.lastIndexOf(".");
    const fold = this.#folds.get(name.slice(0, dot));
    const kind = name.slice(dot + 1);
    if (!fold || (kind !== "weight" && kind !== "bias")) return this.#read(name);
    const [gamma, beta, mean, variance] = ["weight", "bias", "running_mean", "running_var"].map((part) =>
      this.#read(`${fold.norm}.${part}`),
    );
    // Each operation rounds to 32 bits, as NumPy's do.
    const { fround } = Math;
    const scale = gamma.map(
      (value, channel) => value / fround(Math.sqrt(fround(variance[channel] + fround(fold.epsilon)))),
    );
    if (kind === "bias") {
      const bias = this.#tensors[name] ? this.#read(name) : new Float32Array(scale.length);
      return bias.map((value, channel) => beta[channel] + fround(fround(value - mean[channel]) * scale[channel]));
    }
    const weight = this.#read(name);
    const size = weight.length / scale.length;
    for (let channel = 0, index = 0; channel < scale.length; channel++) {
      for (const end = index + size; index < end; index++) weight[index] *= scale[channel];
    }
    return weight;
  }

  /** @param {string} name */
  #read(name) {
    const bytes = this.readBytes(name).slice(); // aligned
    const { dtype } = this.#tensors[name];
    if (dtype === "F16") {
      const halves = new Uint16Array(bytes.buffer);
      const floats = new Float32Array(halves.length);
      for (let index = 0; index < floats.length; index++) floats[index] = HALVES[halves[index]]; // faster than map
      return floats;
    }
    if (dtype === "F32") return new Float32Array(bytes.buffer);
    if (dtype === "F64") return new Float32Array(new Float64Array(bytes.buffer));
    throw new Problem(`The model file is damaged: ${name} has the type ${dtype}.`, true);
  }
}

/** Every number of IEEE 754's binary16, by its bits. */
const HALVES = Float32Array.from({ length: 1 << 16 }, (_, bits) => {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, (bits & 1023) / 1024];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
});

/**
 * Return a graph that says where each of its weights stands in a file "weights", and that file.
 *
 * In a model file, weights have names alone. A graph is a protocol buffer (onnx.proto): this adds the entries
 * `offset` and `length` to `external_data` (field 13) of the initializers (5) of the graph (7).
 * @param {Uint8Array} graph
 * @param {(name: string) => Float32Array} readWeight
 * @returns {{graph: Uint8Array<ArrayBuffer>, weights: Uint8Array<ArrayBuffer>}}
 */
export function placeWeights(graph, readWeight) {
  /** @type {Float32Array[]} */
  const weights = [];
  let offset = 0;
  const placeTensor = (/** @type {Uint8Array} */ tensor) => {
    const fields = [...readFields(tensor)];
    if (!fields.some(({ number }) => number === 13)) return [tensor];
    const name = fields.find(({ number }) => number === 8)?.content;
    const weight = readWeight(new TextDecoder().decode(name));
    const entries = Object.entries({ offset, length: weight.byteLength }).map(([key, value]) => {
      const [keyBytes, valueBytes] = [key, String(value)].map((text) => new TextEncoder().encode(text));
      return writeField(13, [...writeField(1, [keyBytes]), ...writeField(2, [valueBytes])]);
    });
    weights.push(weight);
    offset += weight.byteLength;
    return [tensor, ...entries.flat()];
  };
  const placed = mapFields(graph, 7, (graph) => mapFields(graph, 5, placeTensor));
  return { graph: join(placed), weights: join(weights) };
}

/**
 * Return the parts of a message whose fields of some number are others.
 * @param {Uint8Array} message
 * @param {number} number
 * @param {(content: Uint8Array) => Uint8Array[]} change
 */
function mapFields(message, number, change) {
  return [...readFields(message)].flatMap((field) =>
    field.number === number && field.content ? writeField(number, change(field.content)) : [field.whole],
  );
}

/**
 * Read the fields of a message, as Protocol Buffers encode them.
 * @param {Uint8Array} message
 * @returns {Generator<{number: number, whole: Uint8Array, content?: Uint8Array}>} content: of those with a length
 */
function* readFields(message) {
  let at = 0;
  const readNumber = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      value += (message[at] & 127) * scale;
      if (message[at++] < 128) return value;
      if (at > message.length) throw new Problem("The model file is damaged: a graph cannot be read.", true);
    }
  };
  while (at < message.length) {
    const start = at;
    const key = readNumber();
    const wire = key % 8;
    const size = wire === 2 ? readNumber() : wire === 5 ? 4 : wire === 1 ? 8 : 0;
    if (wire === 0) readNumber();
    at += size;
    const content = wire === 2 ? message.subarray(at - size, at) : undefined;
    yield { number: Math.floor(key / 8), whole: message.subarray(start, at), content };
  }
}

/**
 * @param {number} number
 * @param {Uint8Array[]} parts of its content
 */
function writeField(number, parts) {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  return [Uint8Array.from([...toVarint(8 * number + 2), ...toVarint(size)]), ...parts];
}

/** @param {number} value */
function toVarint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return [...bytes, value];
}

/**
 * Return the bytes of several parts, one after another.
 * @param {(Uint8Array | Float32Array)[]} parts
 * @returns {Uint8Array<ArrayBuffer>}
 */
export function join(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(new Uint8Array(part.buffer, part.byteOffset, part.byteLength), at);
    at += part.byteLength;
  }
  return whole;
}
