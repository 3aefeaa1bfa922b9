// The images on show, in progress or finished. Keeps each to its size, crisp and in its place.

import { byId, element } from "./dom.js";
import { sides } from "./form.js";
import { fit } from "./images.js";

const COLUMNS = { 1: 1, 2: 2, 3: 3, 4: 2 };
const GAP = 16;
const CAPTION = 40;

export class Stage {
  #tiles = [];

  /** `onStart(image)` is called when somebody wants to go on from an image. */
  constructor(onStart) {
    this.onStart = onStart;
    new ResizeObserver(() => this.#arrange()).observe(byId("tiles"));
    addEventListener("resize", () => this.#arrange());
    this.clear();
  }

  /** An empty easel. */
  clear() {
    this.#tiles = [];
    byId("tiles").classList.add("empty");
    byId("tiles").replaceChildren(element("p", { textContent: "Images appear here." }));
  }

  /** Room for `count` images of a size. */
  prepare(count, size) {
    const [width, height] = sides(size);
    this.#show(Array.from({ length: count }, () => newTile(width, height)));
  }

  /** Shows a preview, the `number`-th of `of`. */
  preview(index, url, number, of) {
    const tile = this.#tiles[index];
    this.#setImage(tile, url, "");
    tile.progress.value = (number + 1) / (of + 1);
  }

  /** Shows a finished image. */
  finish(index, image) {
    const tile = this.#tiles[index];
    this.#setImage(tile, image.url, image.prompt);
    tile.figure.classList.add("finished");
    tile.progress.remove();
    tile.caption.replaceChildren(...this.#captionOf(image));
  }

  /** Shows finished images. */
  show(images) {
    this.#show(images.map((image) => newTile(...sides(image.size))));
    images.forEach((image, index) => this.finish(index, image));
  }

  /** Gives up what is not finished; true if something is left. */
  dropUnfinished() {
    this.#show(this.#tiles.filter((tile) => tile.figure.classList.contains("finished")));
    if (this.#tiles.length === 0) this.clear();
    return this.#tiles.length > 0;
  }

  #show(tiles) {
    this.#tiles = tiles;
    byId("tiles").classList.remove("empty");
    byId("tiles").replaceChildren(...tiles.map((tile) => tile.figure));
    this.#arrange();
  }

  #setImage(tile, url, alt) {
    if (tile.preview) URL.revokeObjectURL(tile.preview);
    tile.preview = alt ? null : url;
    Object.assign(tile.image, { src: url, alt, hidden: false });
    tile.figure.classList.add("begun");
  }

  #captionOf(image) {
    const start = element("button", { type: "button", className: "quiet", textContent: "Start from this" });
    start.addEventListener("click", () => this.onStart(image));
    const save = element("a", { className: "quiet", href: image.url, download: image.filename, textContent: "Download" });
    const details = element("span", { textContent: `${image.size.replace("x", " × ")} · seed ${image.seed}` });
    return this.onStart ? [details, save, start] : [details, save];
  }

  #arrange() {
    const columns = Math.min(COLUMNS[this.#tiles.length] ?? 4, innerWidth < 480 ? 2 : 4);
    const rows = Math.ceil(this.#tiles.length / columns);
    byId("tiles").style.setProperty("--columns", columns);
    const width = (byId("tiles").clientWidth - GAP * (columns - 1)) / columns;
    const height = (Math.max(innerHeight * 0.68, 320) - GAP * (rows - 1)) / rows - CAPTION;
    for (const tile of this.#tiles) fit(tile.frame, tile.width, tile.height, [width, Math.max(height, 96)]);
  }
}

function newTile(width, height) {
  const image = element("img", { alt: "", hidden: true });
  const progress = element("progress", { max: 1, value: 0, ariaLabel: "Progress" });
  const frame = element("div", { className: "frame" }, image, progress);
  const caption = element("figcaption");
  return { width, height, image, progress, frame, caption, figure: element("figure", {}, frame, caption) };
}
