/**
 * Any picture that the browser decodes to the frame the network sees. What captioner/images.py does: browsers' own
 * resizing differs from Pillow's, and so would the captions.
 */

import { Problem } from "./problem.js";

/** @typedef {{width: number, height: number, data: Uint8ClampedArray}} Picture RGBA, row by row; opaque */
/** @typedef {[number, number, number, number]} Box left, top, right and bottom, in pixels */
/**
 * @typedef {object} ImageSettings see captioner/images.py
 * @property {number} size
 * @property {"stretch" | "crop" | "pad"} frame
 * @property {number[]} mean
 * @property {number[]} std
 */
/**
 * @typedef {object} Frame
 * @property {Float32Array} pixels (3, size, size), normalised
 * @property {Box} rectangle the part of the picture that it shows, in fractions of its width and height
 * @property {number} width of the whole picture, upright, in pixels
 * @property {number} height
 */

const MAX_PIXELS = 64_000_000;
const TILE = 2048; // side of the part of a picture that is read at once, a multiple of every scale
const GAP = 3; // Pillow's reducing_gap
const SUPPORT = 2; // radius of the bicubic filter
const PRECISION = 22; // bits of Pillow's fixed-point weights

/**
 * Decode a picture and prepare it for the network.
 * @param {Blob} file
 * @param {ImageSettings} settings
 * @returns {Promise<Frame>}
 * @throws {Problem} if it is not a picture that this browser reads
 */
export async function readFrame(file, settings) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (isCutOff(bytes)) throw new Problem("The file is cut off: its end is missing. Copy it again.", false);
  const orientation = takeOrientation(bytes);
  const bitmap = await decode(orientation > 1 ? new Blob([bytes]) : file);
  const { width, height } = bitmap;
  try {
    checkSize(width, height);
    const atLeast = 2 * settings.size;
    const times = isJpeg(bytes) ? Math.floor(Math.min(width / atLeast, height / atLeast)) : 1;
    const scale = [8, 4, 2].find((scale) => times >= scale) ?? 1;
    const picture = turn(readPixels(bitmap, scale), orientation);
    const size = orientation > 4 ? { width: height, height: width } : { width, height };
    return { ...prepare(picture, settings), ...size };
  } finally {
    bitmap.close();
  }
}

/**
 * Resize an upright picture to the frame, and normalise it.
 * @param {Picture} picture
 * @param {ImageSettings} settings
 * @returns {{pixels: Float32Array, rectangle: Box}}
 */
export function prepare(picture, { size, frame, mean, std }) {
  const { width, height } = picture;
  const long = Math.max(width, height);
  /** @type {Box} the part of the picture that is used, in pixels */
  let box = [0, 0, width, height];
  /** @type {Box} */
  let rectangle = [0, 0, 1, 1];
  let [columns, rows, x, y] = [size, size, 0, 0]; // what it is resized to, and where in the frame that begins
  if (frame === "crop") {
    const side = Math.min(width, height);
    const [left, top] = [Math.floor((width - side) / 2), Math.floor((height - side) / 2)];
    box = [left, top, left + side, top + side];
    rectangle = [left / width, top / height, (left + side) / width, (top + side) / height];
  } else if (frame === "pad") {
    columns = Math.max(1, roundToEven((size * width) / long));
    rows = Math.max(1, roundToEven((size * height) / long));
    [x, y] = [Math.floor((size - columns) / 2), Math.floor((size - rows) / 2)];
    rectangle = [-x / columns, -y / rows, (size - x) / columns, (size - y) / rows];
  }
  const { data } = resize(picture, columns, rows, box);
  const pixels = new Float32Array(3 * size * size); // zero is the mean colour
  for (let channel = 0; channel < 3; channel++) {
    const average = Math.fround(255 * Math.fround(mean[channel]));
    const deviation = Math.fround(255 * Math.fround(std[channel]));
    for (let row = 0; row < rows; row++) {
      const start = (channel * size + y + row) * size + x;
      for (let column = 0; column < columns; column++) {
        pixels[start + column] = (data[4 * (row * columns + column) + channel] - average) / deviation;
      }
    }
  }
  return { pixels, rectangle };
}

/**
 * Resize a part of a picture as Pillow's `Image.resize` does, bicubic with `reducing_gap=3.0`. What the first of two
 * passes gives is rounded, so their order matters. It is that of Pillow 13; earlier ones begin with the rows always.
 * @param {Picture} picture
 * @param {number} columns
 * @param {number} rows
 * @param {Box} box
 */
export function resize(picture, columns, rows, [left, top, right, bottom]) {
  const [scaleX, scaleY] = [(right - left) / columns, (bottom - top) / rows];
  const [factorX, factorY] = [Math.floor(scaleX / GAP) || 1, Math.floor(scaleY / GAP) || 1];
  if (factorX > 1 || factorY > 1) {
    const [marginX, marginY] = [(SUPPORT - 0.5) * scaleX, (SUPPORT - 0.5) * scaleY];
    const [x, y] = [Math.max(0, Math.trunc(left - marginX)), Math.max(0, Math.trunc(top - marginY))];
    const ends = [Math.ceil(right + marginX), Math.ceil(bottom + marginY)];
    const around = [x, y, Math.min(picture.width, ends[0]), Math.min(picture.height, ends[1])];
    picture = reduce(picture, factorX, factorY, /** @type {Box} */ (around));
    [left, right] = [(left - x) / factorX, (right - x) / factorX];
    [top, bottom] = [(top - y) / factorY, (bottom - y) / factorY];
  }
  const { width, height } = picture;
  const across = (/** @type {Picture} */ picture) => resizeRows(picture, columns, left, right);
  const down = (/** @type {Picture} */ picture) => turn(resizeRows(turn(picture, 5), rows, top, bottom), 5);
  return height > rows && height - rows > 2 * (width - columns) ? across(down(picture)) : down(across(picture));
}

/**
 * Average blocks of pixels, as Pillow's `Image.reduce` does; those at the right and the bottom may be smaller.
 * @param {Picture} picture
 * @param {number} factorX
 * @param {number} factorY
 * @param {Box} box
 * @returns {Picture}
 */
export function reduce({ width: stride, data }, factorX, factorY, [left, top, right, bottom]) {
  const reduced = newPicture(Math.ceil((right - left) / factorX), Math.ceil((bottom - top) / factorY));
  const sums = new Uint32Array(4 * reduced.width);
  for (let row = 0; row < reduced.height; row++) {
    const first = top + row * factorY;
    const last = Math.min(bottom, first + factorY);
    sums.fill(0);
    for (let y = first; y < last; y++) {
      for (let column = 0, x = left; column < reduced.width; column++) {
        for (const end = Math.min(right, x + factorX); x < end; x++) {
          for (let channel = 0; channel < 3; channel++)
            sums[4 * column + channel] += data[4 * (y * stride + x) + channel];
        }
      }
    }
    for (let column = 0; column < reduced.width; column++) {
      const count = (last - first) * Math.min(factorX, right - left - column * factorX);
      const multiplier = Math.floor(2 ** 24 / count);
      for (let channel = 0; channel < 3; channel++) {
        const sum = sums[4 * column + channel] + (count >> 1);
        reduced.data[4 * (row * reduced.width + column) + channel] = (sum * multiplier) >>> 24;
      }
    }
  }
  return reduced;
}

/**
 * Resize each row of a picture with the bicubic filter, in Pillow's fixed-point arithmetic.
 * @param {Picture} picture
 * @param {number} columns
 * @param {number} start of the part that is used
 * @param {number} end
 * @returns {Picture}
 */
function resizeRows(picture, columns, start, end) {
  if (columns === picture.width && start === 0 && end === columns) return picture;
  const { width, height, data } = picture;
  const resized = newPicture(columns, height);
  [start, end] = [Math.fround(start), Math.fround(end)];
  const scale = (end - start) / columns;
  const spread = Math.max(1, scale); // of the filter
  for (let column = 0; column < columns; column++) {
    const center = start + (column + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - SUPPORT * spread + 0.5));
    const last = Math.min(width, Math.trunc(center + SUPPORT * spread + 0.5));
    const weights = Array.from({ length: last - first }, (_, x) => bicubic((x + first - center + 0.5) * (1 / spread)));
    const sum = weights.reduce((sum, weight) => sum + weight, 0) || 1;
    const fixed = Int32Array.from(weights, (weight) =>
      Math.trunc((weight / sum) * 2 ** PRECISION + (weight < 0 ? -0.5 : 0.5)),
    );
    for (let row = 0; row < height; row++) {
      let [red, green, blue] = [2 ** (PRECISION - 1), 2 ** (PRECISION - 1), 2 ** (PRECISION - 1)];
      let at = 4 * (row * width + first);
      for (let x = 0; x < fixed.length; x++, at += 4) {
        red += data[at] * fixed[x];
        green += data[at + 1] * fixed[x];
        blue += data[at + 2] * fixed[x];
      }
      const to = 4 * (row * columns + column);
      resized.data[to] = red >> PRECISION; // the array clips it to 0..255
      resized.data[to + 1] = green >> PRECISION;
      resized.data[to + 2] = blue >> PRECISION;
    }
  }
  return resized;
}

/** @param {number} x */
function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

/**
 * Turn a picture as a value of EXIF's tag Orientation says: 5 to 8 exchange rows and columns.
 * @param {Picture} picture
 * @param {number} orientation
 * @returns {Picture}
 */
export function turn(picture, orientation) {
  if (orientation === 1) return picture;
  const { width, height } = picture;
  const onItsSide = orientation > 4;
  const turned = onItsSide ? newPicture(height, width) : newPicture(width, height);
  const [from, to] = [picture, turned].map(
    ({ data }) => new Uint32Array(data.buffer, data.byteOffset, data.length / 4),
  );
  const isRightToLeft = [2, 3, 7, 8].includes(orientation);
  const isBottomUp = [3, 4, 6, 7].includes(orientation);
  for (let y = 0, pixel = 0; y < turned.height; y++) {
    for (let x = 0; x < turned.width; x++, pixel++) {
      let [column, row] = onItsSide ? [y, x] : [x, y];
      if (isRightToLeft) column = width - 1 - column;
      if (isBottomUp) row = height - 1 - row;
      to[pixel] = from[row * width + column];
    }
  }
  return turned;
}

/** @param {Blob} file */
async function decode(file) {
  if (!file.size) throw new Problem("The file is empty (0 bytes). Copy it again.", false);
  return createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
    throw new Problem(
      "This browser cannot read this picture: it is damaged, too large, not a picture, or of a kind that it lacks. " +
        "Convert it to JPEG or PNG.",
      false,
    );
  });
}

/**
 * Refuse a picture that takes too much memory, as far as its sides say.
 * @param {number} width
 * @param {number} height
 * @throws {Problem}
 */
export function checkSize(width, height) {
  if (width * height <= MAX_PIXELS) return;
  const limit = MAX_PIXELS / 1e6;
  throw new Problem(
    `${width} x ${height} pixels are too many (limit: ${limit} million). Make the picture smaller.`,
    false,
  );
}

/**
 * Return the pixels of a bitmap on white, averaged over blocks: what Pillow's JPEG decoder gives at 1/2, 1/4 or 1/8.
 * @param {ImageBitmap} bitmap
 * @param {number} scale side of the blocks
 * @returns {Picture}
 */
function readPixels(bitmap, scale) {
  const { width, height } = bitmap;
  const picture = newPicture(Math.ceil(width / scale), Math.ceil(height / scale));
  const canvas = new OffscreenCanvas(Math.min(TILE, width), Math.min(TILE, height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Problem("This browser cannot read the pixels of pictures. Try another browser.", false);
  context.fillStyle = "white";
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [columns, rows] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      context.fillRect(0, 0, columns, rows);
      context.drawImage(bitmap, left, top, columns, rows, 0, 0, columns, rows);
      let tile = /** @type {Picture} */ (context.getImageData(0, 0, columns, rows));
      if (scale > 1) tile = reduce(tile, scale, scale, [0, 0, columns, rows]);
      for (let row = 0; row < tile.height; row++) {
        const line = tile.data.subarray(4 * row * tile.width, 4 * (row + 1) * tile.width);
        picture.data.set(line, 4 * ((top / scale + row) * picture.width + left / scale));
      }
    }
  }
  return picture;
}

/** @param {Uint8Array} bytes */
function isJpeg(bytes) {
  return bytes[0] === 0xff && bytes[1] === 0xd8 && bytes[2] === 0xff;
}

/**
 * Return whether a JPEG file ends within its picture, which browsers show grey there.
 * @param {Uint8Array} bytes
 */
function isCutOff(bytes) {
  if (!isJpeg(bytes)) return false;
  let at = 2;
  while (bytes[at] === 0xff && bytes[at + 1] !== 0xda) at += 2 + 256 * bytes[at + 2] + bytes[at + 3];
  if (bytes[at + 1] !== 0xda) return false; // there are no pixels: what decodes it will tell
  while (at >= 0 && bytes[at + 1] !== 0xd9) at = bytes.indexOf(0xff, at + 1); // among pixels, ff d9 is the end
  return at < 0;
}

/**
 * Return the value of the tag Orientation in a file's EXIF data, 1 to 8; 1, upright, where there is none. The tag
 * becomes 1, as browsers would turn the picture before JPEG's blocks of pixels are averaged.
 * @param {Uint8Array} bytes of a file
 */
function takeOrientation(bytes) {
  try {
    const exif = findExif(new DataView(bytes.buffer, bytes.byteOffset, bytes.length));
    if (!exif) return 1;
    const isLittle = exif.getUint16(0) === 0x4949;
    const directory = exif.getUint32(4, isLittle);
    for (let entry = 0; entry < exif.getUint16(directory, isLittle); entry++) {
      const at = directory + 2 + 12 * entry;
      if (exif.getUint16(at, isLittle) !== 0x0112) continue;
      const value = exif.getUint16(at + 8, isLittle);
      exif.setUint16(at + 8, 1, isLittle);
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // damaged: the picture is worth more than its orientation
  }
  return 1;
}

/**
 * Return the EXIF data of a JPEG, PNG or WebP file: a TIFF file within it.
 * @param {DataView} file
 */
function findExif(file) {
  /** @param {number} at */
  const view = (at) => new DataView(file.buffer, file.byteOffset + at);
  if (file.getUint16(0) === 0xffd8) {
    for (let at = 2; file.getUint8(at) === 0xff && file.getUint8(at + 1) !== 0xda; at += 2 + file.getUint16(at + 2)) {
      if (file.getUint16(at) === 0xffe1 && file.getUint32(at + 4) === 0x45786966) return view(at + 10); // Exif
    }
  } else if (file.getUint32(0) === 0x89504e47) {
    for (let at = 8; at < file.byteLength; at += 12 + file.getUint32(at)) {
      if (file.getUint32(at + 4) === 0x65584966) return view(at + 8); // eXIf
    }
  } else if (file.getUint32(0) === 0x52494646 && file.getUint32(8) === 0x57454250) {
    for (let at = 12; at < file.byteLength;) {
      const size = file.getUint32(at + 4, true);
      if (file.getUint32(at) === 0x45584946) return view(at + (file.getUint16(at + 8) === 0x4578 ? 14 : 8)); // EXIF
      at += 8 + size + (size % 2);
    }
  }
  return undefined;
}

/**
 * @param {number} width
 * @param {number} height
 * @returns {Picture}
 */
function newPicture(width, height) {
  return { width, height, data: new Uint8ClampedArray(4 * width * height) };
}

/**
 * Round to the nearest whole number, halves to the even one, as Python does.
 * @param {number} value
 */
function roundToEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}
