/**
 * How far a caption can be trusted. What captioner/confidence.py does.
 */

import { Problem } from "./problem.js";

/** @typedef {{constant: number, log_prob: number, detector: number, rate: number, agreement: number}} WordWeights */
/**
 * @typedef {object} Calibration see captioner/confidence.py
 * @property {string[]} words
 * @property {number} things
 * @property {WordWeights} thing
 * @property {WordWeights} other
 * @property {{constant: number, product: number, weakest: number}} caption
 * @property {{mean: number, deviation: number}} distance
 */
/** @typedef {{projection: number[], penalty: number}} Seen of a picture */

const TOLERATED = 3;
const PENALTY = 2;
const LEAST_LOG_PROB = -8;
const [LEAST, MOST] = [0.005, 0.99];
const RAREST = 1e-4;

/** A calibration, ready to rate captions. */
export class Confidence {
  #calibration;
  #mean;
  #axes;
  #detectors;
  #rates;
  #indices;

  /**
   * @param {Calibration} calibration
   * @param {(name: string) => Float32Array} readTable
   */
  constructor(calibration, readTable) {
    this.#calibration = calibration;
    this.#mean = readTable("mean"); // (D,)
    this.#axes = readTable("axes"); // (D, A)
    this.#detectors = readTable("detectors"); // (A, W)
    this.#rates = readTable("rates"); // (2, W)
    this.#indices = new Map(calibration.words.map((word, index) => [word, index]));
  }

  /**
   * Return what the confidence needs of a picture.
   * @param {import("./engine.js").Tensor} annotations (1, L, D)
   * @returns {Seen}
   * @throws {Problem} if they are not those of the calibration
   */
  see({ data, dims: [, cells, size] }) {
    if (size !== this.#mean.length) {
      throw new Problem("The calibration of the model does not fit its network.", false);
    }
    const centred = Array.from(this.#mean, (mean, number) => {
      let sum = 0;
      for (let cell = 0; cell < cells; cell++) sum += data[cell * size + number];
      return sum / cells - mean;
    });
    const count = this.#axes.length / size;
    const projection = Array.from({ length: count }, (_, axis) =>
      centred.reduce((sum, value, number) => sum + value * this.#axes[number * count + axis], 0),
    );
    const rest = sumOfSquares(centred) - sumOfSquares(projection);
    const { mean, deviation } = this.#calibration.distance;
    const beyond = (Math.log(Math.max(1e-12, rest)) / 2 - mean) / deviation;
    return { projection, penalty: PENALTY * Math.max(0, beyond - TOLERATED) };
  }

  /**
   * Return the confidence of a caption and of its words; null for words that name nothing.
   * @param {{words: string[], log_probs: (number | null)[]}} sentence
   * @param {Seen} seen
   * @returns {{confidence: number, word_confidences: (number | null)[]}}
   */
  rate({ words, log_probs: logProbs }, { projection, penalty }) {
    const { things, thing, other, caption } = this.#calibration;
    const count = this.#calibration.words.length;
    let [product, weakest] = [1, 1]; // of the probabilities of the things
    let namesThing = false;
    /** @type {(number | null)[]} */
    const ofWords = [];
    for (const [number, word] of words.entries()) {
      const index = this.#indices.get(word);
      if (index === undefined) {
        ofWords.push(null);
        continue;
      }
      const detected = projection.reduce(
        (sum, value, axis) => sum + value * this.#detectors[axis * count + index],
        this.#rates[index],
      );
      const weights = index < things ? thing : other;
      const odds =
        weights.constant +
        weights.log_prob * Math.max(LEAST_LOG_PROB, logProbs[number] ?? -Infinity) +
        weights.detector * logOdds(clip(detected, LEAST, MOST)) +
        weights.rate * logOdds(clip(this.#rates[index], RAREST, 1 - RAREST)) +
        weights.agreement * logOdds(clip(this.#rates[count + index], RAREST, 1 - RAREST));
      if (index < things) {
        namesThing = true;
        product *= probability(odds);
        weakest = Math.min(weakest, probability(odds));
      }
      ofWords.push(round(probability(odds - penalty)));
    }
    // A caption that names no thing has nothing that could be confirmed.
    const whole =
      caption.constant +
      caption.product * logOdds(clip(product, RAREST, MOST)) +
      caption.weakest * logOdds(clip(weakest, RAREST, MOST)) -
      penalty;
    return { confidence: namesThing ? round(probability(whole)) : 0, word_confidences: ofWords };
  }
}

/** @param {number[]} values */
function sumOfSquares(values) {
  return values.reduce((sum, value) => sum + value * value, 0);
}

/**
 * @param {number} value
 * @param {number} low
 * @param {number} high
 */
function clip(value, low, high) {
  return Math.min(high, Math.max(low, value));
}

/** @param {number} probability */
function logOdds(probability) {
  return Math.log(probability) - Math.log1p(-probability);
}

/** @param {number} odds */
function probability(odds) {
  return 1 / (1 + Math.exp(-clip(odds, -100, 100)));
}

/** @param {number} value */
function round(value) {
  return Number(value.toFixed(5));
}
