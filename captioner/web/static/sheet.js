/**
 * A picture and its words as one image: the picture once for each word, lit where the network looked.
 */

import { Light } from "./light.js";

const SIDE = 320; // pixels of a panel's longer side
const COLUMNS = 4;
const GAP = 16;
const LINE = 40; // height of a word
const PAPER = "#ffffff";
const INK = "#211f1c";

/** @typedef {import("./server.js").Sentence} Sentence */

/**
 * Draw the image, as PNG.
 * @param {HTMLImageElement} picture that the browser shows
 * @param {Sentence} sentence of one word at least
 * @returns {Promise<Blob>}
 */
export function drawSheet(picture, { words, attention, rectangle }) {
  const scale = SIDE / Math.max(picture.naturalWidth, picture.naturalHeight);
  const width = Math.max(1, Math.round(picture.naturalWidth * scale));
  const height = Math.max(1, Math.round(picture.naturalHeight * scale));
  const column = Math.max(width, SIDE / 2) + GAP; // room for the words of a narrow picture
  const columns = Math.min(COLUMNS, words.length);
  const sheet = document.createElement("canvas");
  sheet.width = columns * column + GAP;
  sheet.height = Math.ceil(words.length / columns) * (height + LINE + GAP) + GAP;
  const context = /** @type {CanvasRenderingContext2D} */ (sheet.getContext("2d"));
  context.imageSmoothingQuality = "high";
  context.fillStyle = PAPER;
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.fillStyle = INK;
  context.font = "22px Charter, Cambria, Georgia, serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  const canvas = document.createElement("canvas");
  const light = new Light(canvas);
  light.fit(width, height);
  words.forEach((word, index) => {
    const middle = GAP / 2 + ((index % columns) + 0.5) * column;
    const top = GAP + Math.floor(index / columns) * (height + LINE + GAP);
    const area = /** @type {const} */ ([Math.round(middle - width / 2), top, width, height]);
    context.drawImage(picture, ...area);
    light.show(attention[index], rectangle, 0);
    context.drawImage(canvas, ...area);
    context.fillText(word, middle, top + height + LINE / 2, column - GAP);
  });
  return new Promise((resolve, reject) => {
    sheet.toBlob((image) => (image ? resolve(image) : reject(new Error("the image cannot be drawn"))), "image/png");
  });
}
