/**
 * Beam search of one picture: plain, diverse (groups) and constrained (required words), with the results of
 * captioner/search.
 */

import { Problem } from "./problem.js";

/** @typedef {import("./engine.js").Engine} Engine */
/** @typedef {import("./engine.js").Look} Look */
/** @typedef {import("./engine.js").Rows} Rows */
/** @typedef {import("./engine.js").State} State */
/** @typedef {typeof DEFAULTS} SearchSettings see captioner/search/settings.py */
/** @typedef {{id: number, logProb: number}} Choice of a word */
/** @typedef {{row: number, word: number, logProb: number, total: number}} Continuation of a row by a word */
/**
 * Sets the log-probabilities of forbidden words of a row to minus infinity, given the words that are written.
 * @typedef {(logProbs: Float32Array, written: number[]) => void} Constraint
 */
/** @typedef {{look: Look, ends: number[], alternatives: Choice[][]}} Moment of each row, before a word */
/** @typedef {{words: number[], logProbs: number[], rows: number[]}} Path the words of a row, and the row before each */
/**
 * A finished sentence of T words.
 * @typedef {object} Hypothesis
 * @property {number[]} words ids, without start and end
 * @property {number[]} logProbs of each word
 * @property {number} logProb of the sentence, its end included
 * @property {number} score what sentences are ranked by
 * @property {Float32Array[]} attention where the network looked for each word
 * @property {number[] | undefined} visual share of each context that comes from the picture
 * @property {Choice[][]} alternatives the likeliest words at each position, before any constraint
 * @property {number[]} ends log-probability of the end instead of each word
 */

/** The defaults of captioner/search/settings.py. */
export const DEFAULTS = {
  beam_size: 5,
  candidates: 1,
  max_words: 20,
  min_words: 1,
  length_penalty: 0.8,
  diverse_groups: 1,
  diversity: 0.5,
  coverage_penalty: 0,
  repeat_size: 4,
  bar_repeats: true,
  bar_unknown: true,
  alternatives: 0,
  ban: /** @type {string[]} */ ([]),
  require: /** @type {string[]} */ ([]),
  sample: false,
};

/**
 * Return `settings.candidates` sentences, best first; fewer, or none, only where the constraints leave no more.
 * @param {Engine} engine
 * @param {State} state of one row
 * @param {SearchSettings} settings
 * @param {object} words
 * @param {number} words.start id of the word before the first
 * @param {number} words.end id of the word that ends a sentence
 * @param {Constraint[]} words.constraints
 * @param {number[]} words.required ids of words that every sentence must contain
 * @param {number} words.alternatives likeliest words to record at each position
 * @returns {Promise<Hypothesis[]>}
 */
export async function search(engine, state, settings, { start, end, constraints, required, alternatives }) {
  const groups = settings.diverse_groups;
  const size = settings.beam_size / groups; // rows of each beam
  const choose = required.length ? chooseRequired : chooseDiverse;
  /** @type {Hypothesis[][]} of each group */
  const finished = Array.from({ length: groups }, () => []);
  /** @type {Moment[]} */
  const moments = [];
  // Of each row, those of a beam side by side: a beam for each group, or for each set of required words.
  let totals = Array.from({ length: required.length ? 2 ** required.length : groups }, (_, beam) =>
    required.length && beam ? -Infinity : 0,
  );
  /** @type {Path[]} */
  let paths = totals.map(() => ({ words: [], logProbs: [], rows: [] }));
  let words = paths.map(() => start);
  let live = engine.select(
    state,
    paths.map(() => 0),
  );
  for (let length = 0; length <= settings.max_words; length++) {
    const { logProbs, state, look } = await engine.step(words, live);
    const rows = paths.map((_, row) => rowOf(logProbs, row));
    const likeliest = rows.map((row) => (alternatives ? topK(row, alternatives) : []));
    rows.forEach((row, number) => {
      if (length === settings.max_words) return forceEnd(row, end);
      if (length < settings.min_words) row[end] = -Infinity;
      for (const constrain of constraints) constrain(row, paths[number].words);
    });
    const found = choose(totals, rows, settings, end, required);
    moments.push({ look, ends: rows.map((row) => row[end]), alternatives: likeliest });

    found.forEach((continuations, beam) => {
      for (const { row, word, total } of continuations.slice(0, size)) {
        if (word !== end || total === -Infinity) continue;
        finished[beam % groups].push(finish(moments, paths[row], total, settings));
      }
    });
    const kept = found.flatMap((continuations, beam) => {
      const isFull = finished[beam % groups].length >= size;
      const order = [
        ...continuations.filter(({ word }) => word !== end),
        ...continuations.filter(({ word }) => word === end),
      ];
      return order
        .slice(0, size)
        .map((choice) => (isFull || choice.word === end ? { ...choice, total: -Infinity } : choice));
    });
    totals = kept.map(({ total }) => total);
    if (totals.every((total) => total === -Infinity)) break;
    words = kept.map(({ word }) => word);
    paths = kept.map(({ row, word, logProb }) => ({
      words: [...paths[row].words, word],
      logProbs: [...paths[row].logProbs, logProb],
      rows: [...paths[row].rows, row],
    }));
    live = engine.select(
      state,
      kept.map(({ row }) => row),
    );
  }
  return bestOfGroups(finished, settings);
}

/**
 * Return the best continuations of each group, twice as many as it has rows.
 *
 * The groups choose in turn, and a word loses `diversity` each time that an earlier group chose it: Vijayakumar et
 * al. 2016 (arXiv 1610.02424), section 3. One group is plain beam search.
 * @param {number[]} totals of each row
 * @param {Float32Array[]} rows log-probabilities of the next word
 * @param {SearchSettings} settings
 * @param {number} end
 * @returns {Continuation[][]}
 */
function chooseDiverse(totals, rows, { beam_size: all, diverse_groups: groups, diversity }, end) {
  const size = all / groups;
  const count = (groups > 1 ? groups + 1 : 2) * size;
  /** @type {Map<number, number>} how many rows of earlier groups chose a word */
  const chosen = new Map();
  return split(totals, groups).map((beam) => {
    /** @param {Continuation} continuation */
    const rank = ({ word, total }) => Math.fround(total - Math.fround(diversity * (chosen.get(word) ?? 0)));
    const every = beam.flatMap((row) => topK(rows[row], count).map((choice) => proceed(totals, row, choice)));
    const best = every.sort(descending(rank)).slice(0, 2 * size);
    for (const { word } of best.filter(({ word, total }) => word !== end && total > -Infinity).slice(0, size)) {
      chosen.set(word, (chosen.get(word) ?? 0) + 1);
    }
    return best;
  });
}

/**
 * Return the best continuations of each beam, twice as many as it has rows: of its own rows, and of rows that a
 * required word moves to it.
 *
 * The bits of a beam's number are the required words in its sentences, and only those with all of them can end:
 * Anderson et al. 2017 (arXiv 1612.00576), section 3.2.
 * @param {number[]} totals of each row
 * @param {Float32Array[]} rows log-probabilities of the next word; required words and the end are forbidden
 * @param {SearchSettings} settings
 * @param {number} end
 * @param {number[]} required
 * @returns {Continuation[][]}
 */
function chooseRequired(totals, rows, { beam_size: size }, end, required) {
  const beams = split(totals, 2 ** required.length);
  const arriving = beams.map((_, beam) =>
    required.flatMap((id, index) => {
      const from = beam & (1 << index) ? beams[beam ^ (1 << index)] : [];
      return from.map((row) => proceed(totals, row, { id, logProb: rows[row][id] }));
    }),
  );
  return beams.map((beam, number) => {
    const elsewhere = required.filter((_, index) => !(number & (1 << index)));
    const staying = beam.flatMap((row) => {
      for (const word of elsewhere.length ? [...elsewhere, end] : []) rows[row][word] = -Infinity;
      return topK(rows[row], 2 * size).map((choice) => proceed(totals, row, choice));
    });
    return [...staying, ...arriving[number]].sort(descending(({ total }) => total)).slice(0, 2 * size);
  });
}

/**
 * Return the numbers of the rows of each beam.
 * @param {number[]} totals of each row
 * @param {number} beams
 */
function split(totals, beams) {
  const size = totals.length / beams;
  return Array.from({ length: beams }, (_, beam) => Array.from({ length: size }, (_, index) => beam * size + index));
}

/**
 * @param {number[]} totals of each row
 * @param {number} row
 * @param {Choice} choice
 * @returns {Continuation}
 */
function proceed(totals, row, { id, logProb }) {
  return { row, word: id, logProb, total: Math.fround(totals[row] + logProb) };
}

/**
 * Return the likeliest words, best first; of equal words the lower id first. Where fewer are possible, the id 0 with
 * minus infinity stands for the others.
 * @param {Float32Array} logProbs
 * @param {number} count
 * @returns {Choice[]}
 */
export function topK(logProbs, count) {
  count = Math.min(count, logProbs.length);
  /** @type {Choice[]} */
  const best = Array.from({ length: count }, () => ({ id: 0, logProb: -Infinity }));
  for (let id = 0; id < logProbs.length; id++) {
    const logProb = logProbs[id];
    if (logProb <= best[count - 1].logProb) continue;
    if (Number.isNaN(logProb))
      throw new Problem("The model's predictions are not numbers (NaN): it is damaged.", false);
    let index = count - 1;
    for (; index > 0 && best[index - 1].logProb < logProb; index--) best[index] = best[index - 1];
    best[index] = { id, logProb };
  }
  return best;
}

/**
 * Forbid every word but the end, and make the end possible however unlikely it is.
 * @param {Float32Array} logProbs
 * @param {number} end
 */
function forceEnd(logProbs, end) {
  const value = Math.max(logProbs[end], -1e4);
  logProbs.fill(-Infinity);
  logProbs[end] = value;
}

/**
 * Never write these words.
 * @param {number[]} words
 * @returns {Constraint}
 */
export function banWords(words) {
  return (logProbs) => words.forEach((word) => (logProbs[word] = -Infinity));
}

/**
 * Write each of these words at most once.
 * @param {number[]} words
 * @returns {Constraint}
 */
export function noRepeatedWord(words) {
  const once = new Set(words);
  return (logProbs, written) => written.forEach((word) => once.has(word) && (logProbs[word] = -Infinity));
}

/**
 * Do not write a phrase of up to `size` words directly after itself, unless its last word is `repeatable`.
 * @param {number} size
 * @param {number[]} repeatable
 * @returns {Constraint}
 */
export function noRepeatedPhrase(size, repeatable) {
  const free = new Set(repeatable);
  return (logProbs, written) => {
    for (let length = 1; length <= Math.min(size, (written.length + 1) / 2); length++) {
      // Only the last word of the second phrase is not written yet: it must not be that of the first.
      const last = written[written.length - length];
      const second = written.slice(written.length - length + 1);
      const first = written.slice(written.length - 2 * length + 1, written.length - length);
      if (!free.has(last) && first.every((word, index) => word === second[index])) logProbs[last] = -Infinity;
    }
  };
}

/**
 * @param {Moment[]} moments
 * @param {Path} path
 * @param {number} logProb of the sentence
 * @param {SearchSettings} settings
 * @returns {Hypothesis}
 */
function finish(moments, { words, logProbs, rows }, logProb, settings) {
  const attention = rows.map((row, index) => rowOf(moments[index].look.attention, row));
  const hasVisual = Boolean(moments[0].look.visual);
  return {
    words,
    logProbs,
    logProb,
    score: toScore(logProb, attention, settings),
    attention,
    visual: hasVisual
      ? rows.map((row, index) => /** @type {Rows} */ (moments[index].look.visual).data[row])
      : undefined,
    alternatives: rows.map((row, index) => moments[index].alternatives[row]),
    ends: rows.map((row, index) => moments[index].ends[row]),
  };
}

/**
 * @param {number} logProb
 * @param {Float32Array[]} attention
 * @param {SearchSettings} settings
 */
function toScore(logProb, attention, { length_penalty: exponent, coverage_penalty: coverage }) {
  let score = logProb / (attention.length + 1) ** exponent;
  if (coverage && attention.length) {
    const covered = Array.from(attention[0], (_, cell) => attention.reduce((sum, weights) => sum + weights[cell], 0));
    score += coverage * covered.reduce((sum, weight) => sum + Math.log(Math.min(1, Math.max(1e-9, weight))), 0);
  }
  return score;
}

/**
 * Return the sentences of a picture, best first: the best of each group, then the second of each, and so on, without
 * those that an earlier group found.
 * @param {Hypothesis[][]} groups
 * @param {SearchSettings} settings
 */
function bestOfGroups(groups, settings) {
  /** @type {Set<string>} */
  const seen = new Set();
  const ranked = groups.map((group) => {
    const ended = endEarlier(group, settings, seen);
    const fresh = ended.filter(({ words }) => !seen.has(String(words)));
    for (const { words } of ended) seen.add(String(words));
    return fresh.sort(descending(byScore));
  });
  const ranks = Math.max(...ranked.map((group) => group.length));
  const inTurn = Array.from({ length: ranks }, (_, rank) =>
    ranked.flatMap((group) => group.slice(rank, rank + 1)).sort(descending(byScore)),
  ).flat();
  return inTurn.slice(0, settings.candidates).sort(descending(byScore));
}

/**
 * End the sentences that reached `max_words` where their score is best, unless another one is the same then.
 * @param {Hypothesis[]} hypotheses
 * @param {SearchSettings} settings
 * @param {Set<string>} seenBefore
 * @returns {Hypothesis[]}
 */
function endEarlier(hypotheses, settings, seenBefore) {
  const seen = new Set(seenBefore);
  return [...hypotheses].sort(descending(byScore)).map((found) => {
    if (found.words.length === settings.max_words) {
      let sum = 0;
      const cuts = found.ends.map((ending, end) => {
        const logProb = sum + ending;
        sum += found.logProbs[end];
        return { end, logProb, score: toScore(logProb, found.attention.slice(0, end), settings) };
      });
      const better = cuts
        .filter(({ score, end }) => score > found.score && !seen.has(String(found.words.slice(0, end))))
        .sort(descending(byScore))[0];
      if (better) found = cut(found, better);
    }
    seen.add(String(found.words));
    return found;
  });
}

/**
 * @param {Hypothesis} found
 * @param {{end: number, logProb: number, score: number}} where
 * @returns {Hypothesis}
 */
function cut(found, { end, logProb, score }) {
  return {
    logProb,
    score,
    words: found.words.slice(0, end),
    logProbs: found.logProbs.slice(0, end),
    attention: found.attention.slice(0, end),
    visual: found.visual?.slice(0, end),
    alternatives: found.alternatives.slice(0, end),
    ends: found.ends.slice(0, end),
  };
}

/**
 * @param {Rows} rows
 * @param {number} row
 * @returns {Float32Array}
 */
function rowOf({ data, width }, row) {
  return data.subarray(row * width, (row + 1) * width);
}

/** @param {{score: number}} ranked */
function byScore({ score }) {
  return score;
}

/**
 * Return a comparison for `sort`, which leaves equal values in their order.
 * @template Value
 * @param {(value: Value) => number} rank
 * @returns {(first: Value, second: Value) => number}
 */
function descending(rank) {
  return (first, second) => Number(rank(second) > rank(first)) - Number(rank(second) < rank(first));
}
