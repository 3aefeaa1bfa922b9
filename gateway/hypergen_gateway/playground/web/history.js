// What was drawn since the page was opened. Small and bounded: the oldest go first, and nothing is stored.

import { byId, element } from "./dom.js";

const MOST_PICTURES = 40;
const MOST_BYTES = 64 * 2 ** 20;

export class History {
  #drawings = [];
  #shown = null;

  /** `onChoose(drawing, picture)` is called when somebody chooses a picture. */
  constructor(onChoose) {
    this.onChoose = onChoose;
    byId("clear-history").addEventListener("click", () => this.#forget(this.#drawings.length));
  }

  /** Keeps a drawing: the request that was sent, its settings, and its pictures. */
  add(drawing) {
    this.#drawings.unshift(drawing);
    let [pictures, bytes] = [0, 0];
    const kept = this.#drawings.findIndex((one) => {
      pictures += one.pictures.length;
      bytes += one.pictures.reduce((sum, picture) => sum + picture.blob.size, one.request.image?.size ?? 0);
      return pictures > MOST_PICTURES || bytes > MOST_BYTES;
    });
    // The newest stays, however large it is.
    this.#forget(kept < 0 ? 0 : this.#drawings.length - Math.max(kept, 1));
  }

  /** Marks what is shown: a drawing, or one picture of it. */
  mark(drawing, picture = null) {
    this.#shown = drawing;
    for (const button of byId("strip").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.url === picture?.url));
    }
  }

  #forget(count) {
    for (const drawing of this.#drawings.splice(this.#drawings.length - count, count)) {
      if (drawing !== this.#shown) drawing.pictures.forEach((picture) => URL.revokeObjectURL(picture.url));
    }
    this.#show();
  }

  #show() {
    byId("history").hidden = this.#drawings.length === 0;
    const items = this.#drawings.flatMap((drawing) => drawing.pictures.map((picture) => this.#itemOf(drawing, picture)));
    byId("strip").replaceChildren(...items);
  }

  #itemOf(drawing, picture) {
    const label = `${picture.prompt}, seed ${picture.seed}`;
    const button = element("button", { type: "button", title: label }, element("img", { src: picture.url, alt: label }));
    button.dataset.url = picture.url;
    button.addEventListener("click", () => this.onChoose(drawing, picture));
    return element("li", {}, button);
  }
}
