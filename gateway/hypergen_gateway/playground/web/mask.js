// The brush: a dialog in which what should be regenerated is painted over, with a pointer or with the keyboard.

import { byId } from "./dom.js";
import { Painting } from "./painting.js";
import { fit, toMask } from "./images.js";

const MOST_UNDOS = 20;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class MaskBrush {
  #canvas = byId("easel-paint");
  #painting = null;
  #undos = [];
  #erasing = false;
  #pointer = null; // the one that paints
  #at = [0, 0];
  #done = null;

  constructor() {
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, (event) => this.#end(event));
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

  /** Lets somebody paint over an image. Gives the mask as a PNG and its painting; null if nothing came of it. */
  paint(url, width, height, painting) {
    Object.assign(this.#canvas, { width, height });
    byId("easel-image").src = url;
    this.#undos = [];
    this.#at = [width / 2, height / 2];
    this.#show(painting?.copy() ?? new Painting(width, height));
    byId("mask-dialog").showModal();
    this.#fit();
    this.#canvas.focus();
    return new Promise((resolve) => (this.#done = resolve));
  }

  async #use() {
    const painting = this.#painting.isBlank ? null : this.#painting;
    this.#finish({ mask: painting && (await toMask(painting)), painting });
    byId("mask-dialog").close();
  }

  #finish(result) {
    this.#done?.(result);
    this.#done = null;
  }

  // One pointer paints at a time: a second finger would draw lines across.
  #begin(event) {
    if (this.#pointer !== null || event.button !== 0) return;
    event.preventDefault();
    this.#pointer = event.pointerId;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#canvas.focus();
    this.#remember();
    this.#strokeTo(this.#pointOf(event), this.#pointOf(event));
    this.#showCursor();
  }

  #move(event) {
    if (this.#pointer === null) this.#at = this.#pointOf(event);
    else if (event.pointerId === this.#pointer) allOf(event).forEach((each) => this.#strokeTo(this.#pointOf(each)));
    this.#showCursor();
  }

  #end(event) {
    if (event.pointerId === this.#pointer) this.#pointer = null;
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
    if (painting) this.#dab(this.#at, from);
    this.#showCursor();
  }

  #dab(to, from) {
    this.#remember();
    this.#strokeTo(to, from);
  }

  #strokeTo(to, from = this.#at) {
    const area = this.#painting.stroke(from, to, this.#radius(), !this.#erasing);
    this.#painting.show(this.#canvas, area);
    this.#at = to;
  }

  #radius() {
    const share = Number(byId("brush-size").value) / 100;
    return share * share * 0.5 * Math.min(this.#canvas.width, this.#canvas.height);
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
    this.#show(new Painting(this.#canvas.width, this.#canvas.height));
  }

  #undo() {
    const before = this.#undos.pop();
    if (before) this.#show(before);
  }

  #remember() {
    this.#undos.push(this.#painting.copy());
    if (this.#undos.length > MOST_UNDOS) this.#undos.shift();
  }

  // A stroke ends where another painting takes the place of the one that it was on.
  #show(painting) {
    this.#pointer = null;
    this.#painting = painting;
    painting.show(this.#canvas);
  }
}

/** All moves that an event stands for. Over plain HTTP browsers do not tell them, and some tell none of a single one. */
function allOf(event) {
  const moves = event.getCoalescedEvents?.() ?? [];
  return moves.length ? moves : [event];
}
