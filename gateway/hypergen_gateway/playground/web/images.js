// Images as files and as pixels. Knows the canvas and nothing of the page.

// Below this, an image is enlarged as squares: its pixels are meant to be seen.
const PIXEL_ART = 128;

/** The bytes of an image that came as base64. */
export function toBlob(base64, format) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: `image/${format}` });
}

/** The image in a file, upright. Throws where the browser cannot read it. */
export function decode(blob) {
  return createImageBitmap(blob);
}

/** A PNG of exactly this size: the middle of an image, scaled to fill it; what is transparent shows white paper. */
export function cover(bitmap, width, height) {
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  const [canvas, context] = newCanvas(width, height);
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return toPng(canvas);
}

/** The mask that OpenAI's API takes: transparent where something is painted, opaque elsewhere. */
export function toMask(painting) {
  const [canvas, context] = newCanvas(painting.width, painting.height);
  context.putImageData(painting.toImage(255, 0), 0, 0);
  return toPng(canvas);
}

/** Fits an element for an image of `width` × `height` into `room` CSS pixels; small images grow by whole factors. */
export function fit(element, width, height, [roomWidth, roomHeight]) {
  const room = Math.min(roomWidth / width, roomHeight / height);
  const ratio = window.devicePixelRatio || 1;
  const small = Math.max(width, height) <= PIXEL_ART;
  const scale = small ? Math.max(Math.floor(room * ratio), 1) / ratio : Math.min(room, 1);
  element.style.width = `${width * scale}px`;
  element.style.height = `${height * scale}px`;
  element.classList.toggle("pixelated", small);
}

function newCanvas(width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  return [canvas, canvas.getContext("2d", { willReadFrequently: true })];
}

function toPng(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
