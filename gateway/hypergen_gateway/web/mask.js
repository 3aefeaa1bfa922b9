// The brush: a dialog in which what should be drawn anew is painted over, with a pointer or with the keyboard.

import { byId } from "./dom.js";
import { fit, toMask } from "./pictures.js";

const MOST_UNDOS = 20;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class MaskBrush {
  #canvas = byId("easel-paint");
  #context = this.#canvas.getContext("2d", { willReadFrequently: true });
  #undos = [];
  #erasing = false;
  #last = null;
  #at = [0, 0];
  #done = null;

  constructor() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => this.#end());
    canvas.addEventListener("pointerleave", () => (byId("easel-cursor").hidden = true));
    canvas.addEventListener("keydown", (event) => this.#press(event));
    canvas.addEventListener("focus", () => this.#showCursor());
    byId("tool-brush").addEventListener("click", () => this.#choose(false));
    byId("tool-eraser").addEventListener("click", () => this.#choose(true));
    byId("mask-undo").addEventListener("click", () => this.#undo());
    byId("mask-clear").addEventListener("click", () => this.#clear());
    byId("mask-cancel").addEventListener("click", () => byId("mask-dialog").close());
    byId("mask-use").addEventListener("click", () => this.#use());
    byId("mask-dialog").addEventListener("close", () => this.#finish(null));
    addEventListener("resize", () => this.#fit());
  }

  /** Lets somebody paint over a picture. Gives the mask as a PNG and its painting; null if nothing came of it. */
  paint(url, width, height, painting) {
    const canvas = Object.assign(this.#canvas, { width, height });
    byId("easel-image").src = url;
    this.#undos = [];
    this.#at = [width / 2, height / 2];
    if (painting) this.#context.putImageData(painting, 0, 0);
    byId("mask-dialog").showModal();
    this.#fit();
    canvas.focus();
    return new Promise((resolve) => (this.#done = resolve));
  }

  async #use() {
    const painting = this.#snapshot();
    const isBlank = !painting.data.some((value, index) => index % 4 === 3 && value);
    const mask = isBlank ? null : await toMask(this.#canvas);
    this.#finish({ mask, painting: isBlank ? null : painting });
    byId("mask-dialog").close();
  }

  #finish(result) {
    this.#done?.(result);
    this.#done = null;
  }

  #begin(event) {
    event.preventDefault();
    this.#canvas.setPointerCapture(event.pointerId);
    this.#canvas.focus();
    this.#remember();
    this.#last = this.#at = this.#pointOf(event);
    this.#stroke(this.#last, this.#last);
  }

  #move(event) {
    this.#at = this.#pointOf(event);
    this.#showCursor();
    if (this.#last === null) return;
    this.#stroke(this.#last, this.#at);
    this.#last = this.#at;
  }

  #end() {
    if (this.#last === null) return;
    this.#last = null;
    this.#harden();
  }

  #press(event) {
    const arrow = ARROWS[event.key];
    if (arrow) this.#walk(arrow, event.shiftKey);
    else if (event.key === " ") this.#dab(this.#at, this.#at);
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.#undo();
    else return;
    event.preventDefault();
  }

  #walk([right, down], painting) {
    const from = this.#at;
    const step = Math.max(this.#radius(), 1);
    const inside = (value, most) => Math.min(Math.max(value, 0), most);
    this.#at = [inside(from[0] + right * step, this.#canvas.width), inside(from[1] + down * step, this.#canvas.height)];
    if (painting) this.#dab(from, this.#at);
    this.#showCursor();
  }

  #dab(from, to) {
    this.#remember();
    this.#stroke(from, to);
    this.#harden();
  }

  #stroke(from, to) {
    const context = this.#context;
    context.globalCompositeOperation = this.#erasing ? "destination-out" : "source-over";
    context.strokeStyle = getComputedStyle(this.#canvas).color;
    context.lineWidth = this.#radius() * 2;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
  }

  // A pixel is painted or it is not: what is seen is what is sent.
  #harden() {
    const painting = this.#snapshot();
    for (let alpha = 3; alpha < painting.data.length; alpha += 4) painting.data[alpha] = painting.data[alpha] > 127 ? 255 : 0;
    this.#context.putImageData(painting, 0, 0);
  }

  #radius() {
    const share = Number(byId("brush-size").value) / 100;
    return Math.max(0.5, share * share * 0.5 * Math.min(this.#canvas.width, this.#canvas.height));
  }

  #pointOf(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.#canvas.width,
      ((event.clientY - box.top) / box.height) * this.#canvas.height,
    ];
  }

  #showCursor() {
    const scale = this.#canvas.clientWidth / this.#canvas.width;
    const cursor = byId("easel-cursor");
    const diameter = Math.max(this.#radius() * 2 * scale, 4);
    Object.assign(cursor.style, {
      width: `${diameter}px`,
      height: `${diameter}px`,
      left: `${this.#canvas.offsetLeft + this.#at[0] * scale}px`,
      top: `${this.#canvas.offsetTop + this.#at[1] * scale}px`,
    });
    cursor.hidden = false;
  }

  #choose(erasing) {
    this.#erasing = erasing;
    byId("tool-brush").setAttribute("aria-pressed", String(!erasing));
    byId("tool-eraser").setAttribute("aria-pressed", String(erasing));
  }

  #fit() {
    const room = [Math.min(innerWidth - 64, 640), innerHeight - 320];
    for (const layer of [byId("easel-image"), this.#canvas]) fit(layer, this.#canvas.width, this.#canvas.height, room);
  }

  #clear() {
    this.#remember();
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  #undo() {
    const before = this.#undos.pop();
    if (before) this.#context.putImageData(before, 0, 0);
  }

  #remember() {
    this.#undos.push(this.#snapshot());
    if (this.#undos.length > MOST_UNDOS) this.#undos.shift();
  }

  #snapshot() {
    return this.#context.getImageData(0, 0, this.#canvas.width, this.#canvas.height);
  }
}
