// What was drawn since the page was opened. Small and bounded: the oldest go first, and nothing is stored.

import { byId, element } from "./dom.js";

const MOST_IMAGES = 40;
const MOST_BYTES = 64 * 2 ** 20;

export class History {
  #drawings = [];
  #shown = null;

  /** `onChoose(drawing, image)` is called when somebody chooses an image. */
  constructor(onChoose) {
    this.onChoose = onChoose;
    byId("clear-history").addEventListener("click", () => this.#forget(this.#drawings.length));
  }

  /** Keeps a drawing: the request that was sent, its settings, and its images. */
  add(drawing) {
    this.#drawings.unshift(drawing);
    let [images, bytes] = [0, 0];
    const kept = this.#drawings.findIndex((one) => {
      images += one.images.length;
      bytes += one.images.reduce((sum, image) => sum + image.blob.size, one.request.image?.size ?? 0);
      return images > MOST_IMAGES || bytes > MOST_BYTES;
    });
    // The newest stays, however large it is.
    this.#forget(kept < 0 ? 0 : this.#drawings.length - Math.max(kept, 1));
  }

  /** Marks what is shown: a drawing, or one image of it. */
  mark(drawing, image = null) {
    this.#shown = drawing;
    for (const button of byId("strip").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.url === image?.url));
    }
  }

  #forget(count) {
    for (const drawing of this.#drawings.splice(this.#drawings.length - count, count)) {
      if (drawing !== this.#shown) drawing.images.forEach((image) => URL.revokeObjectURL(image.url));
    }
    this.#show();
  }

  #show() {
    byId("history").hidden = this.#drawings.length === 0;
    const items = this.#drawings.flatMap((drawing) => drawing.images.map((image) => this.#itemOf(drawing, image)));
    byId("strip").replaceChildren(...items);
  }

  #itemOf(drawing, image) {
    const label = `${image.prompt}, seed ${image.seed}`;
    const button = element("button", { type: "button", title: label }, element("img", { src: image.url, alt: label }));
    button.dataset.url = image.url;
    button.addEventListener("click", () => this.onChoose(drawing, image));
    return element("li", {}, button);
  }
}
