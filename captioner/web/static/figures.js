/**
 * Numbers and sentences in words for people.
 */

/** @typedef {import("./server.js").Sentence} Sentence */

/** What has less confidence is rather wrong than right. */
export const UNSURE = 0.5;

/**
 * Return a caption as a sentence, with a capital letter and a full stop, as alt text should be: people who hear it
 * pause there.
 * @param {string} caption
 */
export function toSentence(caption) {
  const [first = "", ...rest] = caption; // by characters, not by halves of them
  return first && `${first.toUpperCase()}${rest.join("")}.`;
}

const EMPTY = new Set(
  ("a an the and or of in on at to by for from with into onto while as is are being has have his her their its it " +
    "that who there this wearing").split(" "),
); // words that say nothing of their own about a picture

/**
 * Return the captions, best first, that contain a word that no better one contains.
 * @template {Sentence} Caption
 * @param {Caption[]} sentences
 */
export function toDistinct(sentences) {
  const said = new Set(EMPTY);
  return sentences.filter(({ words }, index) => {
    const isNew = !index || words.some((word) => !said.has(word));
    for (const word of words) said.add(word);
    return isNew;
  });
}

/**
 * Return the figures of a word, and in a second line the words that could have stood there.
 * @param {Sentence} sentence
 * @param {number} index
 */
export function describeWord(sentence, index) {
  const figures = [
    `${toPercent(toProbability(sentence.log_probs[index]))} likely`,
    `brightest spot: ${describeLook(sentence.attention[index])} attention`,
  ];
  const confidence = sentence.word_confidences?.[index];
  if (confidence !== undefined && confidence !== null) figures.unshift(`${toPercent(confidence)} confident`);
  if (sentence.visual) figures.push(`${toPercent(sentence.visual[index])} from the picture`);
  const others = Object.entries(sentence.alternatives?.[index] ?? {})
    .sort(([, one], [, other]) => (other ?? -Infinity) - (one ?? -Infinity))
    .map(([word, logProb]) => `${word} (${toPercent(toProbability(logProb))})`);
  return figures.join(" · ") + (others.length ? `\ninstead: ${others.join(", ")}` : "");
}

/**
 * Return how much attention the brightest spot of a map got.
 * @param {number[][]} weights
 */
function describeLook(weights) {
  const all = weights.flat();
  const average = all.reduce((sum, weight) => sum + weight, 0) / all.length;
  return `${(Math.max(...all) / average).toFixed(1)} × average`;
}

/**
 * Return how far a caption can be trusted, in words; nothing if the model does not tell.
 * @param {Sentence} sentence
 */
export function describeTrust({ confidence }) {
  if (confidence === undefined || confidence === null) return "";
  return `${confidence < UNSURE ? "unsure: " : ""}${toPercent(confidence)} confident of all that it names`;
}

/** @param {number | null} logProb natural; null for what cannot be */
function toProbability(logProb) {
  return Math.exp(logProb ?? -Infinity);
}

/** @param {number} share */
function toPercent(share) {
  const percent = Math.round(100 * share);
  return percent || share === 0 ? `${percent}%` : "under 1%";
}
