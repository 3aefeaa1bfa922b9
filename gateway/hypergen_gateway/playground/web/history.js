// What was generated since the page was opened. Small and bounded: the oldest go first, and nothing is stored.

import { byId, element } from "./dom.js";

const MOST_IMAGES = 40;
const MOST_BYTES = 64 * 2 ** 20;

export class History {
  #generations = [];
  #shown = null;

  /** `onChoose(generation, image)` is called when somebody chooses an image. */
  constructor(onChoose) {
    this.onChoose = onChoose;
    byId("clear-history").addEventListener("click", () => this.#forget(this.#generations.length));
  }

  /** Keeps a generation: the request that was sent, its settings, and its images. */
  add(generation) {
    this.#generations.unshift(generation);
    let [images, bytes] = [0, 0];
    const kept = this.#generations.findIndex((one) => {
      images += one.images.length;
      bytes += one.images.reduce((sum, image) => sum + image.blob.size, one.request.image?.size ?? 0);
      return images > MOST_IMAGES || bytes > MOST_BYTES;
    });
    // The newest stays, however large it is.
    this.#forget(kept < 0 ? 0 : this.#generations.length - Math.max(kept, 1));
  }

  /** Marks what is shown: a generation, or one image of it. */
  mark(generation, image = null) {
    this.#shown = generation;
    for (const button of byId("strip").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.url === image?.url));
    }
  }

  #forget(count) {
    for (const generation of this.#generations.splice(this.#generations.length - count, count)) {
      if (generation !== this.#shown) generation.images.forEach((image) => URL.revokeObjectURL(image.url));
    }
    this.#show();
  }

  #show() {
    byId("history").hidden = this.#generations.length === 0;
    const items = this.#generations.flatMap((generation) => generation.images.map((image) => this.#itemOf(generation, image)));
    byId("strip").replaceChildren(...items);
  }

  #itemOf(generation, image) {
    const label = `${image.prompt}, seed ${image.seed}`;
    const button = element("button", { type: "button", title: label }, element("img", { src: image.url, alt: label }));
    button.dataset.url = image.url;
    button.addEventListener("click", () => this.onChoose(generation, image));
    return element("li", {}, button);
  }
}
