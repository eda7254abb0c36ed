/**
 * Where the network looked, as light over a picture. What captioner/overlay.py draws, drawn by the browser.
 */

const DIMMED = 0.2; // brightness that the picture keeps where the network did not look
const GLOW = 0.25; // white that full light adds
const SPREAD = 0.6; // standard deviation, in grid cells, of the Gaussian that smooths the maps
const SIDE = 64; // pixels; light is smooth, and stretched over the picture it looks the same
const MILLISECONDS = 150; // that light takes to pass from one word to the next

/** @typedef {number[][]} Weights rows of attention weights, not negative */
/** @typedef {[number, number, number, number]} Rectangle left, top, right and bottom, in fractions of a picture */

/** Light on a canvas that lies over a picture. It passes smoothly from what it showed to what it is to show. */
export class Light {
  #canvas;
  #layer = new Float32Array(); // glow and opacity of each pixel, as they are shown
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
    this.#layer = new Float32Array(2 * this.#canvas.width * this.#canvas.height);
  }

  /**
   * Light the picture where the weights are, and dim it elsewhere.
   * @param {Weights} weights
   * @param {Rectangle} rectangle the part of the picture that they cover
   * @param {number} [milliseconds] that the light takes; 0: it is there when this returns
   */
  show(weights, rectangle, milliseconds = MILLISECONDS) {
    const light = spreadLight(weights, rectangle, this.#canvas.width, this.#canvas.height);
    const layer = new Float32Array(2 * light.length);
    light.forEach((bright, pixel) => {
      layer[2 * pixel] = GLOW * bright;
      layer[2 * pixel + 1] = 1 - DIMMED - (1 - DIMMED - GLOW) * bright;
    });
    this.#passTo(layer, milliseconds);
  }

  /** Leave the picture as it is. */
  hide() {
    this.#passTo(new Float32Array(this.#layer.length), MILLISECONDS);
  }

  /**
   * @param {Float32Array} target
   * @param {number} milliseconds
   */
  #passTo(target, milliseconds) {
    cancelAnimationFrame(this.#frame);
    const before = this.#layer;
    const duration = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : milliseconds;
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
    for (let pixel = 0; 2 * pixel < this.#layer.length; pixel++) {
      const glow = this.#layer[2 * pixel];
      const opacity = this.#layer[2 * pixel + 1];
      image.data.fill(opacity && (255 * glow) / opacity, 4 * pixel, 4 * pixel + 3);
      image.data[4 * pixel + 3] = 255 * opacity;
    }
    context.putImageData(image, 0, 0);
  }
}

/**
 * Return how much light falls on each pixel of a picture, 0 to 1, row by row.
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
  const peak = Math.max(...whole);
  return light.map((bright) => Math.min(1, bright / peak));
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
