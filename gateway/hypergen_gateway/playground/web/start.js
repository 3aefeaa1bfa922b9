// The image to start from, or to edit, and its mask. Both are sent in the size that is generated: what is seen is what is sent.

import { byId } from "./dom.js";
import { sides } from "./form.js";
import { MaskBrush } from "./mask.js";
import { cover, decode } from "./images.js";

export class Start {
  #brush = new MaskBrush();
  #bitmap = null;
  #image = null;
  #size = "";
  #mask = null;
  #painting = null;

  /** `say(message)` tells the user something that is no error. */
  constructor(form, say) {
    this.form = form;
    this.say = say;
    if (this.#refers) byId("image-label").textContent = "Edit an image";
    byId("image").addEventListener("change", () => byId("image").files[0] && this.choose(byId("image").files[0]));
    byId("clear-image").addEventListener("click", () => this.clear() || byId("image").focus());
    byId("paint").addEventListener("click", () => this.#paint());
    byId("clear-mask").addEventListener("click", () => this.#setMask(null, null) || byId("paint").focus());
    for (const id of ["size", "width", "height"]) byId(id).addEventListener("change", () => this.#fitToSize());
  }

  /** Starts from a file. The size becomes the one that suits it, unless it is given. */
  async choose(blob, size = null) {
    try {
      this.#bitmap = await decode(blob);
    } catch {
      this.clear();
      this.form.showError("This file is not an image that the browser can read.", "image");
      return;
    }
    this.form.clearErrors();
    this.form.write({ size: size ?? this.form.closestSize(this.#bitmap.width, this.#bitmap.height) });
    this.#size = "";
    await this.#fitToSize();
  }

  /** Starts where a request did. */
  async restore({ image, mask, others }, painting, size) {
    if (image) await this.choose(image, size);
    else this.clear();
    if (mask) this.#setMask(mask, painting);
    byId("others").files = listOf(others);
  }

  /** Starts from nothing. */
  clear() {
    byId("image").value = byId("others").value = "";
    this.#bitmap = this.#image = null;
    this.#size = "";
    this.#setMask(null, null);
    this.#show();
  }

  /** The files to send, in the size of the settings, and whether `strength` is for them. */
  async read() {
    await this.#fitToSize();
    const files = { image: this.#image, mask: this.#mask, others: this.#image ? [...byId("others").files] : [] };
    return { files, painting: this.#painting, hasStrength: this.#hasStrength };
  }

  // Whether the model is shown the images as references, rather than started from one.
  get #refers() {
    return this.form.model.max_references > 0;
  }

  get #hasStrength() {
    if (this.form.model.max_image_guidance_scale) return false;
    return this.#image !== null && (!this.#refers || this.#mask !== null);
  }

  async #fitToSize() {
    const { size } = this.form.read();
    const bitmap = this.#bitmap;
    if (bitmap === null || size === this.#size) return;
    const [width, height] = sides(size);
    // Where the size is not one, the server says so.
    const image = width > 0 && height > 0 ? await cover(bitmap, width, height) : this.#image;
    if (this.#bitmap !== bitmap) return;
    this.#image = image;
    if (this.#mask) this.say("The mask was removed because the image’s size changed.");
    this.#size = size;
    this.#setMask(null, null);
    this.#show();
  }

  async #paint() {
    await this.#fitToSize();
    const painted = await this.#brush.paint(byId("start-image").src, ...sides(this.#size), this.#painting);
    if (painted) this.#setMask(painted.mask, painted.painting);
    byId("paint").focus();
  }

  #setMask(mask, painting) {
    if (Boolean(mask) !== Boolean(this.#mask)) this.form.write({ strength: mask ? "1" : "0.8" });
    [this.#mask, this.#painting] = [mask, painting];
    byId("clear-mask").hidden = !mask;
    byId("strength-field").hidden = !this.#hasStrength;
    byId("paint").textContent = mask ? "Change the mask" : "Paint a mask";
    showPainting(byId("start-mask"), painting);
  }

  #show() {
    const shown = this.#image !== null;
    byId("start").hidden = !shown;
    byId("strength-field").hidden = !this.#hasStrength;
    byId("others-field").hidden = !shown || this.form.model.max_references < 2;
    byId("image").hidden = shown;
    showBlob(byId("start-image"), this.#image);
  }
}

// Only a transfer makes the list that a file input holds.
function listOf(files) {
  const transfer = new DataTransfer();
  for (const file of files) transfer.items.add(file);
  return transfer.files;
}

function showPainting(canvas, painting) {
  canvas.hidden = !painting;
  if (!painting) return;
  Object.assign(canvas, { width: painting.width, height: painting.height });
  painting.show(canvas);
}

function showBlob(image, blob) {
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = !blob;
  if (blob) image.src = URL.createObjectURL(blob);
  else image.removeAttribute("src");
}
