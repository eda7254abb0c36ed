/**
 * Pictures in, captions out, within the browser. What captioner/captioning.py and captioner/vocabulary.py do.
 */

import { banWords, DEFAULTS, noRepeatedPhrase, noRepeatedWord, search } from "./beam.js";
import { Confidence } from "./confidence.js";
import { Engine } from "./engine.js";
import { readFrame } from "./frame.js";
import { ModelFile } from "./model.js";
import { Problem } from "./problem.js";

/** @typedef {import("./server.js").Sentence} Sentence */
/** @typedef {import("./server.js").Reply} Reply */
/** @typedef {import("./beam.js").SearchSettings} SearchSettings */
/** @typedef {import("./beam.js").Hypothesis} Hypothesis */
/** @typedef {import("./model.js").Header} Header */

const [PAD, START, END, UNKNOWN] = [0, 1, 2, 3];
const END_OF_WORD = "</w>"; // of the last piece of a word, in vocabularies of pieces

/** A network with all it needs to caption pictures. */
export class Captioner {
  #engine;
  #header;
  #settings;
  #confidence;

  /**
   * @param {Engine} engine
   * @param {Header} header of its model file
   * @param {Confidence} [confidence] none: the model is not calibrated
   * @throws {Problem} if the model was chosen with search settings that the browser does not have
   */
  constructor(engine, header, confidence) {
    this.#engine = engine;
    this.#header = header;
    this.#confidence = confidence;
    /** @type {SearchSettings} */
    this.#settings = { ...DEFAULTS, ...header.search };
    const { sample, ban, require } = this.#settings;
    if (sample || (header.merges?.length && (ban.length || require.length))) {
      throw new Problem(
        "The model's search settings sample, and ban and require with pieces of words, do not work in browsers.",
        false,
      );
    }
  }

  /**
   * @param {ArrayBuffer} file a model file
   * @param {import("./engine.js").Runtime} runtime onnxruntime-web
   * @param {boolean} [gpu] whether to encode with WebGPU
   */
  static async load(file, runtime, gpu) {
    const model = new ModelFile(file);
    const { calibration } = model.header;
    const confidence = calibration
      ? new Confidence(calibration, (name) => model.readWeight(`confidence.${name}`))
      : undefined;
    return new Captioner(await Engine.load(model, runtime, gpu), model.header, confidence);
  }

  /**
   * Caption a picture.
   * @param {Blob} picture
   * @param {Partial<SearchSettings>} [settings] in place of the model's
   * @returns {Promise<Reply>}
   * @throws {Problem} if it cannot be read
   */
  async caption(picture, settings = {}) {
    const { pixels, ...frame } = await readFrame(picture, this.#header.images);
    return { ...frame, ...(await this.captionPixels(pixels, frame.rectangle, settings)) };
  }

  /**
   * Caption what the network sees of a picture.
   * @param {Float32Array} pixels (3, size, size), normalised
   * @param {import("./light.js").Rectangle} rectangle
   * @param {Partial<SearchSettings>} settings
   * @returns {Promise<Sentence & {candidates: Sentence[]}>}
   */
  async captionPixels(pixels, rectangle, settings) {
    const chosen = { ...this.#settings, ...settings };
    chosen.candidates = Math.min(chosen.candidates, chosen.beam_size);
    const [banned, required] = [chosen.ban, chosen.require].map((words) => words.map((word) => word.toLowerCase()));
    const unknown = required.find((word) => !this.#header.words.includes(word));
    if (unknown) throw new Problem(`The model does not know the required word "${unknown}".`, false);
    const state = await this.#engine.start(pixels);
    const seen = this.#confidence?.see(state["image.annotations"]);
    const found = await search(this.#engine, state, chosen, {
      start: START,
      end: END,
      constraints: this.#constraints(chosen, banned),
      required: this.#ids(required),
      // Enough to leave the alternatives without special words, banned words, and the word that is written.
      alternatives: chosen.alternatives && chosen.alternatives + banned.length + UNKNOWN + 2,
    });
    if (!found.length) throw new Problem("No sentence keeps to all of the model's search settings.", false);
    const [best, ...candidates] = found.map((hypothesis) => {
      const sentence = this.#toSentence(hypothesis, rectangle, chosen.alternatives, banned);
      return this.#confidence && seen ? { ...sentence, ...this.#confidence.rate(sentence, seen) } : sentence;
    });
    return { ...best, candidates };
  }

  /**
   * @param {SearchSettings} settings
   * @param {string[]} banned
   */
  #constraints(settings, banned) {
    const { words, repeated } = this.#header;
    const never = [PAD, START, ...(settings.bar_unknown ? [UNKNOWN] : []), ...this.#ids(banned)];
    const constraints = [banWords(never)];
    if (settings.bar_repeats && repeated) {
      const twice = new Set(repeated);
      constraints.push(noRepeatedWord(words.flatMap((word, id) => (id > UNKNOWN && !twice.has(word) ? [id] : []))));
    }
    if (settings.repeat_size) {
      // A piece within a word may follow itself ("button").
      const within = words.flatMap((_, id) => (this.#endsWord(id) ? [] : [id]));
      constraints.push(noRepeatedPhrase(settings.repeat_size, within));
    }
    return constraints;
  }

  /**
   * Return the ids of words.
   * @param {string[]} words
   */
  #ids(words) {
    return this.#header.words.flatMap((word, id) => (id > UNKNOWN && words.includes(word) ? [id] : []));
  }

  /**
   * @param {Hypothesis} found
   * @param {import("./light.js").Rectangle} rectangle
   * @param {number} count of alternatives
   * @param {string[]} banned
   * @returns {Sentence}
   */
  #toSentence(found, rectangle, count, banned) {
    const spans = this.#spans(found.words);
    const words = spans.map(([start, stop]) =>
      found.words
        .slice(start, stop)
        .map((id) => this.#piece(id))
        .join(""),
    );
    const sentence = {
      caption: words.join(" ").replaceAll(" 's", "'s"),
      log_prob: toNumber(found.logProb),
      score: toNumber(found.score),
      words,
      log_probs: spans.map(([start, stop]) => toNumber(sum(found.logProbs.slice(start, stop)))),
      attention: spans.map(([start, stop]) => this.#toGrid(found.attention.slice(start, stop))),
      rectangle,
    };
    const { visual } = found;
    if (visual) {
      const shares = spans.map(([start, stop]) => sum(visual.slice(start, stop)) / (stop - start));
      Object.assign(sentence, { visual: shares.map(toNumber) });
    }
    if (count) {
      const alternatives = spans.map(([start, stop]) => {
        if (stop - start > 1) return {};
        const others = found.alternatives[start].filter(
          ({ id }) =>
            id > UNKNOWN && id !== found.words[start] && this.#endsWord(id) && !banned.includes(this.#piece(id)),
        );
        return Object.fromEntries(
          others.slice(0, count).map(({ id, logProb }) => [this.#piece(id), toNumber(logProb)]),
        );
      });
      Object.assign(sentence, { alternatives });
    }
    return sentence;
  }

  /**
   * Return the mean of the maps of a word's pieces, on the grid.
   * @param {Float32Array[]} maps
   */
  #toGrid(maps) {
    const weights = Array.from(maps[0], (_, cell) => sum(maps.map((map) => map[cell])) / maps.length);
    if (!weights.every((weight) => weight >= 0 && weight <= 1.001)) {
      throw new Problem("The model's attention is not between 0 and 1: it is damaged.", false);
    }
    const side = Math.sqrt(weights.length);
    const [rows, columns] = this.#header.model.encoder.grid ?? [side, side];
    return Array.from({ length: rows }, (_, row) =>
      weights.slice(row * columns, (row + 1) * columns).map((weight) => /** @type {number} */ (toNumber(weight))),
    );
  }

  /**
   * Return where the pieces of each word begin and end.
   * @param {number[]} ids
   * @returns {[number, number][]}
   */
  #spans(ids) {
    const ends = ids.flatMap((id, index) => (this.#endsWord(id) || index === ids.length - 1 ? [index + 1] : []));
    return ends.map((end, index) => [ends[index - 1] ?? 0, end]);
  }

  /** @param {number} id */
  #endsWord(id) {
    const { merges, words } = this.#header;
    return !merges?.length || id <= UNKNOWN || words[id].endsWith(END_OF_WORD);
  }

  /** @param {number} id */
  #piece(id) {
    const piece = this.#header.words[id];
    return piece.endsWith(END_OF_WORD) ? piece.slice(0, -END_OF_WORD.length) : piece;
  }
}

/** @param {number[]} values */
function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

/**
 * Return a number with five digits after the decimal point, or null for what JSON has no number for.
 * @param {number} value
 */
function toNumber(value) {
  return Number.isFinite(value) ? Number(value.toFixed(5)) : null;
}
