// The page: from the settings to a request, from its events to images.

import { ApiError, capabilities, generate, storedKey } from "./api.js";
import { askForKey, setUpCodeDialog, setUpKeyDialog, showCode } from "./dialogs.js";
import { byId } from "./dom.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { toBlob } from "./images.js";
import { showPassport } from "./passport.js";
import { PARTIAL_IMAGES, seedOf, toRequest } from "./request.js";
import { Stage } from "./stage.js";
import { Start } from "./start.js";

const RETRY_MILLISECONDS = 3000;
// Most errors arrive sooner than this; until then the previous images stay on show.
const PREPARE_DELAY_MILLISECONDS = 300;

class Playground {
  #running = null;
  #shown = null;

  constructor(model) {
    this.form = new Form(model);
    this.start = new Start(this.form, say);
    this.stage = new Stage(model.edits ? (image) => this.#goOnFrom(image) : null);
    this.history = new History((generation, image) => this.#reuse(generation, image));
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#running ? this.stop() : this.generate();
    });
    byId("show-code").addEventListener("click", () => showCode(this.#shown.request));
    byId("reset").addEventListener("click", () => this.start.clear() || this.form.reset());
    document.addEventListener("keydown", (event) => this.#press(event));
    for (const type of ["dragover", "drop"]) document.addEventListener(type, (event) => this.#receive(event, event.dataTransfer, model.edits));
    document.addEventListener("paste", (event) => this.#receive(event, event.clipboardData, model.edits));
  }

  /** Generates images by the settings; if it is stopped or fails, the finished ones are kept. */
  async generate() {
    if (this.#running) return;
    const running = (this.#running = new AbortController());
    const settings = this.form.read();
    const generation = { settings, images: [], began: performance.now() };
    showProblem(null);
    this.form.clearErrors();
    this.#showRunning(generation);
    try {
      const { files, painting, hasStrength } = await this.start.read();
      if (!hasStrength) settings.strength = "";
      Object.assign(generation, { request: toRequest(settings, files), painting });
      await this.#generateAll(generation, running.signal);
      say(summaryOf(generation));
    } catch (error) {
      this.#fail(error, running.signal.aborted);
    } finally {
      this.#running = null;
      this.#showIdle();
      this.#keep(generation);
    }
  }

  /** Stops the generation, here and on the server. */
  stop() {
    this.#running?.abort();
  }

  async #generateAll(generation, signal) {
    const count = Number(generation.settings.n);
    const prepare = () => this.stage.prepare(count, generation.settings.size);
    const timer = setTimeout(prepare, PREPARE_DELAY_MILLISECONDS);
    try {
      const { first, stream } = await whenAllowed(() => begin(generation.request, signal));
      clearTimeout(timer);
      if (!document.querySelector("figure:not(.finished)")) prepare();
      for (let next = first; !next.done; next = await stream.next()) this.#take(generation, next.value, count);
    } finally {
      clearTimeout(timer);
    }
  }

  #take(generation, event, count) {
    const index = event.image_index ?? generation.images.length;
    const blob = toBlob(event.b64_json, event.output_format);
    const url = URL.createObjectURL(blob);
    if (event.type.endsWith(".partial_image")) {
      this.stage.preview(index, url, event.partial_image_index, PARTIAL_IMAGES);
      if (index === 0) say(`Preview ${event.partial_image_index + 1} of ${PARTIAL_IMAGES}.`);
      return;
    }
    const image = imageOf(generation, index, blob, url);
    generation.images[index] = image;
    this.stage.finish(index, image);
    if (count > 1) say(`Image ${Object.keys(generation.images).length} of ${count} is finished.`);
  }

  #keep(generation) {
    generation.images = generation.images.filter(Boolean);
    if (generation.images.length) {
      this.#shown = generation;
      this.history.add(generation);
    }
    if (!this.stage.dropUnfinished() && this.#shown) this.stage.show(this.#shown.images);
    this.history.mark(this.#shown, this.#shown?.images[0]);
    byId("show-code").hidden = !this.#shown;
  }

  #fail(error, stopped) {
    if (stopped) return say("Stopped.");
    if (!(error instanceof ApiError)) console.error(error);
    const wait = error.retryAfter ? ` It may be tried again in ${error.retryAfter} s.` : "";
    say("");
    if (!this.form.showError(error.message, error.param)) showProblem(error.message + wait);
    return undefined;
  }

  async #reuse(generation, image) {
    if (this.#running) return;
    this.#shown = generation;
    showProblem(null);
    this.form.clearErrors();
    this.stage.show([image]);
    this.history.mark(generation, image);
    this.form.write({ ...generation.settings, n: "1", seed: image.seed });
    await this.start.restore(generation.request, generation.painting, generation.settings.size);
    this.form.write({ strength: generation.settings.strength });
    say("Its settings and seed are in the form.");
  }

  async #goOnFrom(image) {
    byId("settings").open = true;
    await this.start.choose(image.blob, image.size);
    this.form.write({ prompt: image.prompt, seed: "" });
    say("The next image starts from this one.");
    byId("paint").focus();
  }

  #press(event) {
    // 229: in Safari the Enter that chooses a word of an input method comes after its end.
    if (document.querySelector("dialog[open]") || event.isComposing || event.keyCode === 229) return;
    if (event.key === "Escape" && this.#running) this.stop();
    const submits = event.key === "Enter" && (event.ctrlKey || event.metaKey || (event.target.id === "prompt" && !event.shiftKey));
    if (!submits) return;
    event.preventDefault();
    this.generate();
  }

  #receive(event, transfer, edits) {
    const isFile = [...(transfer?.items ?? [])].some((item) => item.kind === "file");
    if (!isFile || !edits || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    if (event.type !== "dragover" && transfer.files[0]) {
      byId("settings").open = true;
      this.start.choose(transfer.files[0]);
    }
  }

  #showRunning(generation) {
    byId("generate-label").textContent = "Stop";
    byId("generate-key").textContent = "Esc";
    document.body.classList.add("generating");
    say("Generating …");
    const tick = () => (byId("clock").textContent = `${((performance.now() - generation.began) / 1000).toFixed(1)} s`);
    this.ticking = setInterval(tick, 100);
    if (matchMedia("(max-width: 54rem)").matches) byId("stage").scrollIntoView({ block: "nearest" });
  }

  #showIdle() {
    clearInterval(this.ticking);
    byId("clock").textContent = "";
    byId("generate-label").textContent = "Generate";
    byId("generate-key").textContent = "Enter";
    document.body.classList.remove("generating");
  }
}

/** Events of a request, as soon as there is a first one. */
async function begin(request, signal) {
  const stream = generate(request, signal);
  return { first: await stream.next(), stream };
}

function imageOf(generation, index, blob, url) {
  const { prompt, size } = generation.settings;
  const seed = seedOf(generation.request, index);
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "");
  return { blob, url, prompt, size, seed, filename: `${words || "image"}-${seed}.${blob.type.slice(6)}` };
}

function summaryOf(generation) {
  const seconds = ((performance.now() - generation.began) / 1000).toFixed(1);
  const count = generation.images.length;
  return `${count === 1 ? "Generated" : `${count} images generated`} in ${seconds} s.`;
}

/** What `work` gives, asking for the key as long as the server wants another. */
async function whenAllowed(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401) throw error;
      byId("change-key").hidden = false;
      // Without a key there is nothing wrong yet.
      if (!(await askForKey(storedKey() ? error.message : ""))) throw error;
    }
  }
}

function say(message) {
  byId("status").textContent = message;
}

function showProblem(message) {
  byId("problem").textContent = message ?? "";
  byId("problem").hidden = !message;
}

/** The model's description, waiting for a server that is not ready. */
async function describe() {
  for (;;) {
    try {
      const model = await whenAllowed(capabilities);
      showProblem(null);
      return model;
    } catch (error) {
      showProblem(error.message);
      if (error.status === 401) await new Promise((resolve) => byId("change-key").addEventListener("click", resolve, { once: true }));
      else await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
    }
  }
}

async function main() {
  if (matchMedia("(max-width: 54rem)").matches) byId("settings").open = false;
  byId("form").inert = true;
  setUpKeyDialog();
  setUpCodeDialog();
  const model = await describe();
  byId("model").textContent = model.base_model ? `${model.model} (${model.base_model})` : model.model;
  document.title = `${model.model} · HyperGen`;
  new Playground(model);
  showPassport(model.passport);
  byId("change-key").hidden = !storedKey();
  byId("change-key").addEventListener("click", () => askForKey(""));
  byId("form").inert = false;
  byId("prompt").focus();
}

main();
