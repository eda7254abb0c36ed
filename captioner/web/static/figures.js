/**
 * Numbers in words for people.
 */

/** @typedef {import("./server.js").Sentence} Sentence */

/**
 * Return what is known of a word: its figures, and in a second line the words that could have stood there.
 * @param {Sentence} sentence
 * @param {number} place
 */
export function describeWord(sentence, place) {
  const figures = [
    `probability ${toProbability(sentence.log_probs[place])}`,
    `peak weight ${toPercent(Math.max(...sentence.attention[place].flat()), 1)}`,
  ];
  if (sentence.visual) figures.push(`visual ${toPercent(sentence.visual[place], 0)}`);
  const others = Object.entries(sentence.alternatives?.[place] ?? {})
    .sort(([, one], [, other]) => (other ?? -Infinity) - (one ?? -Infinity))
    .map(([word, logProb]) => `${word} ${toProbability(logProb)}`);
  return figures.join(" · ") + (others.length ? `\nor ${others.join(", ")}` : "");
}

/**
 * Return how likely a sentence is a word, on average, which is what sentences are ranked by.
 * @param {Sentence} sentence
 */
export function describeSentence({ log_prob, words }) {
  return `${toProbability((log_prob ?? -Infinity) / (words.length + 1))} a word`; // its end counts as one
}

/** @param {number | null} logProb natural; null for what cannot be */
function toProbability(logProb) {
  return toPercent(Math.exp(logProb ?? -Infinity), 1);
}

/**
 * @param {number} share
 * @param {number} digits behind the point
 */
function toPercent(share, digits) {
  return `${(100 * share).toFixed(digits)}%`;
}
