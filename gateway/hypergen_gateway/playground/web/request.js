// A request for images as it goes over the wire. Knows OpenAI's fields and how they are written; sends nothing.

export const PARTIAL_IMAGES = 3;

const NUMBERS = new Set([
  "n", "num_inference_steps", "guidance_scale", "image_guidance_scale", "guidance_start", "guidance_end", "cache_interval",
  "clip_skip", "eta", "guidance_rescale", "skip_layer_guidance_scale", "skip_layer_guidance_start",
  "skip_layer_guidance_stop", "seed", "strength",
]);
// What a request says by leaving these out; a model without guidance by an image has no other scale for it than 0.
const UNSAID = {
  image_guidance_scale: "0", guidance_start: "0", guidance_end: "1", cache_interval: "1", eta: "0", guidance_rescale: "0",
  skip_layer_guidance_start: "0.01", skip_layer_guidance_stop: "0.2",
};
const JSON_NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?$/;

/**
 * The request for `settings` (texts by field name; those that change nothing are left out), and for an `image` if there
 * is one, its `mask` and the `others` that the prompt refers to.
 *
 * The seed is always sent, so that the request can be sent again for the same images. `fields` holds pairs of a name
 * and its value as JSON, where a number keeps every digit that was typed, and what is no number is left to the server
 * to refuse in its own words.
 */
export function toRequest(settings, { image = null, mask = null, others = [] } = {}) {
  const given = { ...settings, seed: settings.seed || randomSeed() };
  const fields = Object.entries(given)
    .filter(([name, text]) => text !== "" && text !== UNSAID[name])
    .map(([name, text]) => [name, asJson(name, text)]);
  fields.push(["stream", "true"], ["partial_images", String(PARTIAL_IMAGES)]);
  return { path: image ? "v1/images/edits" : "v1/images/generations", fields, image, mask, others };
}

/** The body of a request, ready for fetch: JSON, or a form where it carries files. */
export function bodyOf(request) {
  if (!request.image) return { body: toJson(request.fields), headers: { "Content-Type": "application/json" } };
  const form = new FormData();
  for (const [name, value] of texts(request)) form.append(name, value);
  form.append("image[]", request.image, "image.png");
  for (const other of request.others) form.append("image[]", other, other.name);
  if (request.mask) form.append("mask", request.mask, "mask.png");
  return { body: form, headers: {} };
}

/** Fields as a JSON object. */
export function toJson(fields) {
  return `{${fields.map(([name, value]) => `${JSON.stringify(name)}: ${value}`).join(", ")}}`;
}

/** The fields as a form carries them. */
export function texts(request) {
  return request.fields.map(([name, value]) => [name, value.startsWith('"') ? JSON.parse(value) : value]);
}

/** The seed of image `index`, exact above 2^53 too. */
export function seedOf(request, index) {
  const seed = request.fields.find(([name]) => name === "seed")[1];
  return (BigInt(seed) + BigInt(index)).toString();
}

function asJson(name, text) {
  if (name === "loras") return lorasAsJson(text);
  return NUMBERS.has(name) && JSON_NUMBER.test(text) ? text : JSON.stringify(text);
}

/** `ink 0.8, clay` as the field's objects. */
function lorasAsJson(text) {
  const loras = text.split(",").map((lora) => lora.trim()).filter(Boolean).map((lora) => {
    const [name, scale] = lora.split(/[\s:=]+/);
    const parts = [`"name": ${JSON.stringify(name)}`];
    if (scale) parts.push(`"scale": ${JSON_NUMBER.test(scale) ? scale : JSON.stringify(scale)}`);
    return `{${parts.join(", ")}}`;
  });
  return `[${loras.join(", ")}]`;
}

// Short enough to be read out; larger ones are legal.
function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}
