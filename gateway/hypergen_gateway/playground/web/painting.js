// What was painted over an image: pixels that are painted or are not. It draws its own strokes, because what a canvas
// makes of a dot, of round ends and of edges differs between browsers and their releases.

// The smallest radius at which every dot holds the centre of a pixel.
const MIN_RADIUS = Math.SQRT1_2;

export class Painting {
  #pixels;

  constructor(width, height, pixels = new Uint8Array(width * height)) {
    Object.assign(this, { width, height });
    this.#pixels = pixels;
  }

  get isBlank() {
    return !this.#pixels.includes(1);
  }

  copy() {
    return new Painting(this.width, this.height, this.#pixels.slice());
  }

  /**
   * Paints or erases the pixels whose centres are within `radius` of the line from one point to another: a dot, where
   * they are the same. Gives the area that may have changed.
   */
  stroke(from, to, radius, isPainted) {
    const reach = Math.max(radius, MIN_RADIUS);
    const [left, right] = span(from[0], to[0], reach, this.width);
    const [top, bottom] = span(from[1], to[1], reach, this.height);
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        if (distance(x + 0.5, y + 0.5, from, to) <= reach) this.#pixels[y * this.width + x] = Number(isPainted);
      }
    }
    return [left, top, right, bottom];
  }

  /** Shows an area of it on a canvas of its size, in the canvas's own colour. */
  show(canvas, [left, top, right, bottom] = [0, 0, this.width, this.height]) {
    if (left >= right || top >= bottom) return;
    const context = canvas.getContext("2d");
    context.putImageData(this.toImage(0, 255, [left, top, right, bottom]), left, top);
    context.globalCompositeOperation = "source-atop";
    context.fillStyle = getComputedStyle(canvas).color;
    context.fillRect(left, top, right - left, bottom - top);
  }

  /** An area of it in black, of one opacity where nothing is painted and of another where something is. */
  toImage(blank, painted, [left, top, right, bottom] = [0, 0, this.width, this.height]) {
    const image = new ImageData(right - left, bottom - top);
    let alpha = 3;
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++, alpha += 4) image.data[alpha] = this.#pixels[y * this.width + x] ? painted : blank;
    }
    return image;
  }
}

/** The first pixel within `reach` of what lies between two coordinates, and the one after the last. */
function span(from, to, reach, side) {
  return [Math.max(Math.floor(Math.min(from, to) - reach), 0), Math.min(Math.ceil(Math.max(from, to) + reach), side)];
}

/** How far a point is from the line between two others. */
function distance(x, y, [x0, y0], [x1, y1]) {
  const [dx, dy] = [x1 - x0, y1 - y0];
  const along = ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1);
  const share = Math.min(Math.max(along, 0), 1);
  return Math.hypot(x - x0 - share * dx, y - y0 - share * dy);
}
