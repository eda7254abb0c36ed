/**
 * Where the network looked, as light over a picture. What captioner/overlay.py draws, drawn by the browser.
 */

const DIMMED = 0.15; // share of the picture that shows where the network did not look
const VEIL = 0.12; // grey that shows instead, 0 to 1
const FULL = 2; // weight that has full light, over the average weight, if no weight is larger
const SOFTNESS = 1.5; // 1: light is proportional to what a weight is above the average
const SPREAD = 0.6; // standard deviation, in grid cells, of the Gaussian that smooths the maps
const SIDE = 64; // pixels; light is smooth, and stretched over the picture it looks the same
const MILLISECONDS = 150; // that light takes to pass from one word to the next

/** @typedef {number[][]} Weights rows of attention weights, not negative */
/** @typedef {[number, number, number, number]} Rectangle left, top, right and bottom, in fractions of a picture */

/** Light on a canvas that lies over a picture. It passes smoothly from what it showed to what it is to show. */
export class Light {
  #canvas;
  #layer = new Float32Array(); // opacity of each pixel, as it is shown
  #frame = 0;

  /** @param {HTMLCanvasElement} canvas stretched over the picture */
  constructor(canvas) {
    this.#canvas = canvas;
  }

  /**
   * Fit the light to a picture's shape, dark as yet.
   * @param {number} width
   * @param {number} height
   */
  fit(width, height) {
    const scale = SIDE / Math.sqrt(width * height);
    this.#canvas.width = Math.min(4 * SIDE, Math.max(1, Math.round(width * scale)));
    this.#canvas.height = Math.min(4 * SIDE, Math.max(1, Math.round(height * scale)));
    this.#layer = new Float32Array(this.#canvas.width * this.#canvas.height);
  }

  /**
   * Light the picture where the weights are, and dim it elsewhere.
   * @param {Weights} weights
   * @param {Rectangle} rectangle the part of the picture that they cover
   */
  show(weights, rectangle) {
    const light = spreadLight(weights, rectangle, this.#canvas.width, this.#canvas.height);
    this.#passTo(light.map((bright) => (1 - DIMMED) * (1 - bright)));
  }

  /** Leave the picture as it is. */
  hide() {
    this.#passTo(new Float32Array(this.#layer.length));
  }

  /** @param {Float32Array} target */
  #passTo(target) {
    cancelAnimationFrame(this.#frame);
    const before = this.#layer;
    const duration = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : MILLISECONDS;
    const start = performance.now();
    /** @param {number} now */
    const step = (now) => {
      const share = now - start < duration ? Math.max(0, now - start) / duration : 1;
      this.#layer = target.map((value, index) => share * value + (1 - share) * before[index]);
      this.#draw();
      if (share < 1) this.#frame = requestAnimationFrame(step);
    };
    step(start);
  }

  #draw() {
    const context = /** @type {CanvasRenderingContext2D} */ (this.#canvas.getContext("2d"));
    const image = context.createImageData(this.#canvas.width, this.#canvas.height);
    image.data.fill(255 * VEIL);
    this.#layer.forEach((opacity, pixel) => {
      image.data[4 * pixel + 3] = 255 * opacity;
    });
    context.putImageData(image, 0, 0);
  }
}

/**
 * Return how much light falls on each pixel of a picture, 0 to 1, row by row. The picture is dim where a weight is no
 * more than the average, and as it is at the largest weight.
 * @param {Weights} weights
 * @param {Rectangle} rectangle the part of the picture that they cover; it is dark outside
 * @param {number} width
 * @param {number} height
 */
function spreadLight(weights, [left, top, right, bottom], width, height) {
  const rows = weights.length;
  const columns = weights[0].length;
  const light = gather(smoothing(height, top, bottom, rows), weights, smoothing(width, left, right, columns));
  // Full light is the smooth map's peak over the whole grid: what the network saw in padding counts too.
  const whole = gather(smoothing(rows, 0, 1, rows), weights, smoothing(columns, 0, 1, columns));
  const average = weights.flat().reduce((sum, weight) => sum + weight, 0) / (rows * columns);
  const full = Math.max(...whole, FULL * average) - average;
  return light.map((weight) => 1 - (1 - Math.min(1, Math.max(0, (weight - average) / full))) ** SOFTNESS);
}

/**
 * Return how much each of a row of cells from `start` to `end` gives to each of the places that divide 0 to 1. A
 * place's shares sum to 1, or are all 0 outside of the cells.
 * @param {number} places
 * @param {number} start
 * @param {number} end
 * @param {number} cells
 */
function smoothing(places, start, end, cells) {
  return Array.from({ length: places }, (_, place) => {
    const inside = ((place + 0.5) / places - start) / (end - start);
    const shares = Array.from({ length: cells }, (_, cell) =>
      inside < 0 || inside > 1 ? 0 : Math.exp(-0.5 * ((inside * cells - cell - 0.5) / SPREAD) ** 2),
    );
    const sum = shares.reduce((total, share) => total + share, 0) || 1;
    return shares.map((share) => share / sum);
  });
}

/**
 * Return the weights as each place down and across gathers them: one matrix product on either side.
 * @param {number[][]} down
 * @param {Weights} weights
 * @param {number[][]} across
 */
function gather(down, weights, across) {
  const byColumn = down.map((shares) =>
    weights[0].map((_, column) => shares.reduce((sum, share, row) => sum + share * weights[row][column], 0)),
  );
  return Float32Array.from(
    byColumn.flatMap((line) =>
      across.map((shares) => shares.reduce((sum, share, column) => sum + share * line[column], 0)),
    ),
  );
}
