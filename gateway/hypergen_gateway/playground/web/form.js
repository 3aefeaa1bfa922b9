// The settings: filled from what the model can do, read as texts by field name, with the server's words beside them.

import { byId, element } from "./dom.js";

const asItIs = (value) => value;
const percent = (value) => `${Math.round(value * 100)} %`;
// Each slider's name, and how its value is written.
const RANGES = {
  num_inference_steps: asItIs,
  guidance_scale: asItIs,
  image_guidance_scale: asItIs,
  guidance_start: percent,
  guidance_end: percent,
  cache_interval: (value) => (value === "1" ? "in every step" : `in 1 of ${value} steps`),
  eta: asItIs,
  guidance_rescale: asItIs,
  skip_layer_guidance_scale: (value) => (value === "0" ? "none" : value),
  skip_layer_guidance_start: percent,
  skip_layer_guidance_stop: percent,
  strength: asItIs,
};
const TEXTS = ["prompt", "negative_prompt", "n", "loras", "scheduler", "sigmas", "timestep_spacing", "prompt_weighting", "clip_skip", "seed", ...Object.keys(RANGES)];
// Intervals of steps: each ends where it begins at the earliest, so one end takes the other along.
const INTERVALS = [["guidance_start", "guidance_end"], ["skip_layer_guidance_start", "skip_layer_guidance_stop"]];
const RATIOS = [[1, 1, "square"], [4, 3, "landscape"], [3, 4, "portrait"], [3, 2, "landscape"], [2, 3, "portrait"], [16, 9, "wide"], [9, 16, "tall"]];
const SUGGESTIONS_SHOWN = 4;

export class Form {
  /** `model` is what /v1/capabilities says. */
  constructor(model) {
    this.model = model;
    this.#fillChoices();
    this.reset();
    this.#suggest();
    for (const [start, end] of INTERVALS) {
      byId(start).addEventListener("input", () => (byId(end).value = Math.max(byId(start).value, byId(end).value)));
      byId(end).addEventListener("input", () => (byId(start).value = Math.min(byId(start).value, byId(end).value)));
    }
    for (const name of Object.keys(RANGES)) byId(name).addEventListener("input", () => this.#showValues());
    byId("size").addEventListener("change", () => this.#showCustomSize());
    byId("seed").addEventListener("input", () => this.#showValues());
    byId("clear-seed").addEventListener("click", () => this.write({ seed: "" }) || byId("seed").focus());
    byId("form").addEventListener("input", (event) => clearError(event.target.closest("[data-param]")));
  }

  /** The settings as they stand, texts by field name. */
  read() {
    const size = byId("size").value === "custom" ? `${byId("width").value}x${byId("height").value}` : byId("size").value;
    const isOffered = (name) => this.model.max_skip_layer_guidance_scale || !name.startsWith("skip_layer");
    return { ...Object.fromEntries(TEXTS.filter(isOffered).map((name) => [name, byId(name).value.trim()])), size };
  }

  /** Sets the settings that are given. */
  write({ size, ...settings }) {
    for (const [name, text] of Object.entries(settings)) byId(name).value = text;
    if (size) this.#chooseSize(size);
    this.#showValues();
  }

  /** The model's own settings; the prompt stays. */
  reset() {
    const model = this.model;
    this.write({
      negative_prompt: "",
      n: "1",
      size: model.default_size,
      num_inference_steps: model.default_num_inference_steps,
      guidance_scale: model.default_guidance_scale,
      image_guidance_scale: model.default_image_guidance_scale,
      guidance_start: "0",
      guidance_end: "1",
      cache_interval: "1",
      loras: "",
      scheduler: "",
      sigmas: "",
      timestep_spacing: "",
      eta: "0",
      guidance_rescale: "0",
      skip_layer_guidance_scale: model.default_skip_layer_guidance_scale,
      skip_layer_guidance_start: "0.01",
      skip_layer_guidance_stop: "0.2",
      prompt_weighting: "",
      clip_skip: "",
      seed: "",
    });
  }

  /** The legal size that is closest to `width` × `height` in shape, and to the model's own in area. */
  closestSize(width, height) {
    const exact = `${width}x${height}`;
    if (this.#isLegal(width, height)) return exact;
    if (this.model.sizes.length) return closestShape(this.model.sizes, width / height);
    return this.#sizeOf(width / height);
  }

  /** Shows what the server said beside the field it is about; false where there is none. */
  showError(message, param) {
    const place = param && byId(`${param}-error`);
    if (!place) return false;
    place.textContent = message;
    place.hidden = false;
    const control = this.#controlOf(param);
    control.setAttribute("aria-invalid", "true");
    for (let fold = control.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    control.focus();
    return true;
  }

  clearErrors() {
    document.querySelectorAll("#form .error").forEach((place) => (place.hidden = true));
    document.querySelectorAll("#form [aria-invalid]").forEach((control) => control.removeAttribute("aria-invalid"));
  }

  #controlOf(param) {
    if (param === "size" && byId("size").value === "custom") return byId("width");
    return byId(param === "mask" ? "paint" : param);
  }

  #fillChoices() {
    const { model } = this;
    const [width, height] = sides(model.default_size);
    Object.assign(byId("num_inference_steps"), { max: model.max_num_inference_steps });
    Object.assign(byId("guidance_scale"), { min: model.min_guidance_scale, max: model.max_guidance_scale });
    byId("guidance_scale").closest("[data-param]").hidden = model.min_guidance_scale === model.max_guidance_scale;
    const imageScale = model.max_image_guidance_scale;
    Object.assign(byId("image_guidance_scale"), { min: Math.min(imageScale, 1), max: imageScale });
    byId("image_guidance_scale").closest("[data-param]").hidden = !imageScale;
    byId("negative_prompt").closest("[data-param]").hidden = !model.negative_prompt;
    byId("guidance_rescale").closest("[data-param]").hidden = !model.guidance_rescale;
    Object.assign(byId("skip_layer_guidance_scale"), { max: model.max_skip_layer_guidance_scale });
    byId("skip-layer-fields").hidden = !model.max_skip_layer_guidance_scale;
    byId("eta").closest("[data-param]").hidden = !model.schedulers.includes("ddim");
    // Flow matching has one scheduler, which has sigmas alone.
    for (const name of ["scheduler", "timestep_spacing"]) byId(name).closest("[data-param]").hidden = model.schedulers.length < 2;
    Object.assign(byId("cache_interval"), { max: model.max_cache_interval });
    byId("cache-field").hidden = model.max_cache_interval === 1;
    byId("loras-field").hidden = model.loras.length === 0;
    byId("loras").placeholder = model.loras.slice(0, 2).map(({ name, default_scale: scale }) => `${name} ${scale}`).join(", ");
    byId("loras-hint").textContent = `There are ${model.loras.map(({ name }) => name).join(", ")}. The number after a name is its scale.`;
    byId("n").replaceChildren(...range(1, model.max_num_images).map((count) => new Option(count, count)));
    byId("scheduler").replaceChildren(new Option("model’s own", ""), ...model.schedulers.map((name) => new Option(name, name)));
    byId("text-fields").hidden = model.prompt_weightings.length === 1;
    const own = [model.default_prompt_weighting, model.default_clip_skip].map((value) => `default (${value})`);
    byId("prompt_weighting").replaceChildren(new Option(own[0], ""), ...model.prompt_weightings.map((name) => new Option(name, name)));
    byId("clip_skip").replaceChildren(new Option(own[1], ""), ...range(0, model.max_clip_skip).map((count) => new Option(count, count)));
    const fits = model.size_policy === "fit";
    const limits = fits ? { min: 1, max: model.max_side, step: 1 } : { min: model.min_size, max: model.max_size, step: model.size_factor };
    Object.assign(byId("width"), { ...limits, value: width });
    Object.assign(byId("height"), { ...limits, value: height });
    const sizes = model.sizes.length ? model.sizes.map((size) => [size, ""]) : this.#commonSizes();
    byId("size").replaceChildren(...sizes.map(([size, shape]) => new Option(sizeLabel(size, shape), size)));
    if (fits || !model.sizes.length) byId("size").append(new Option("other …", "custom"));
    byId("image-field").hidden = !model.edits;
  }

  #commonSizes() {
    const sizes = new Map([[this.model.default_size, shapeOf(this.model.default_size)]]);
    for (const [width, height, shape] of RATIOS) {
      const size = this.#sizeOf(width / height);
      if (!sizes.has(size)) sizes.set(size, shapeOf(size, shape));
    }
    return [...sizes];
  }

  #sizeOf(ratio) {
    const { min_size: min, max_size: max, size_factor: factor, default_size: own } = this.model;
    const [width, height] = sides(own);
    const legal = (side) => Math.round(Math.min(Math.max(side, min), max) / factor) * factor;
    return `${legal(Math.sqrt(width * height * ratio))}x${legal(Math.sqrt((width * height) / ratio))}`;
  }

  #isLegal(width, height) {
    const { min_size: min, max_size: max, size_factor: factor, sizes } = this.model;
    if (sizes.length) return sizes.includes(`${width}x${height}`);
    return [width, height].every((side) => side >= min && side <= max && side % factor === 0);
  }

  #chooseSize(size) {
    const select = byId("size");
    const listed = [...select.options].some((option) => option.value === size);
    select.value = listed ? size : "custom";
    if (!listed) [byId("width").value, byId("height").value] = sides(size);
    this.#showCustomSize();
  }

  #showCustomSize() {
    byId("custom-size").hidden = byId("size").value !== "custom";
  }

  #showValues() {
    for (const [name, written] of Object.entries(RANGES)) {
      const text = written(byId(name).value);
      byId(`${name}-value`).textContent = text;
      byId(name).setAttribute("aria-valuetext", text);
    }
    // At the lowest scale there is no guidance that could begin or end.
    const isGuided = Number(byId("guidance_scale").value) > this.model.min_guidance_scale;
    byId("guidance-interval").hidden = !this.model.guidance_interval || !isGuided;
    byId("skip-layer-interval").hidden = byId("skip_layer_guidance_scale").value === "0";
    byId("clear-seed").hidden = byId("seed").value === "";
  }

  #suggest() {
    const all = this.model.suggestions;
    byId("prompt").placeholder = all[0] ?? "a lighthouse at dusk";
    byId("suggestions").hidden = all.length === 0;
    const some = [...all].sort(() => Math.random() - 0.5).slice(0, SUGGESTIONS_SHOWN);
    const chips = some.map((prompt) => chip(prompt, () => this.#choosePrompt(prompt)));
    if (all.length > some.length) chips.push(chip("others", () => this.#suggest(), "quiet"));
    byId("suggestions").replaceChildren(...chips);
  }

  #choosePrompt(prompt) {
    this.write({ prompt });
    clearError(byId("prompt").closest("[data-param]"));
    byId("prompt").focus();
  }
}

export const sides = (size) => size.split("x").map(Number);

function chip(text, onClick, kind = "chip") {
  const button = element("button", { type: "button", className: kind, textContent: text });
  button.addEventListener("click", onClick);
  return button;
}

// What is wrong with one of two fields side by side stands below both.
function clearError(field) {
  if (!field) return;
  const places = [...field.querySelectorAll(".error"), byId(`${field.dataset.param}-error`)];
  for (const place of places) place.hidden = true;
  field.querySelectorAll("[aria-invalid]").forEach((control) => control.removeAttribute("aria-invalid"));
}

function closestShape(sizes, ratio) {
  const distance = (size) => Math.abs(Math.log(sides(size)[0] / sides(size)[1] / ratio));
  return sizes.reduce((best, size) => (distance(size) < distance(best) ? size : best));
}

function shapeOf(size, otherwise = "") {
  const [width, height] = sides(size);
  return width === height ? "square" : otherwise || (width > height ? "landscape" : "portrait");
}

const sizeLabel = (size, shape) => [size.replace("x", " × "), shape].filter(Boolean).join(" · ");
const range = (from, to) => Array.from({ length: to - from + 1 }, (_, index) => from + index);
