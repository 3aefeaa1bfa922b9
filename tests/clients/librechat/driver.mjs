// What LibreChat's image tools ask for: OpenAI's client for a generation, axios with a form for an edit. LibreChat is
// an application, not a library; these are the requests of its api/app/clients/tools/structured/OpenAIImageTools.js,
// with the libraries that it sends them by.
import { createReadStream } from "node:fs";
import axios from "axios";
import FormData from "form-data";
import OpenAI from "openai";

const { OPENAI_API_KEY: apiKey, OPENAI_BASE_URL: baseURL } = process.env; // IMAGE_GEN_OAI_API_KEY, IMAGE_GEN_OAI_BASEURL

export async function generate(prompt) {
  const response = await new OpenAI({ apiKey, baseURL }).images.generate({
    model: "gpt-image-1",
    prompt,
    n: 1,
    background: "auto",
    output_format: "png",
    quality: "auto",
    size: "auto",
  });
  return response.data[0].b64_json;
}

export async function edit(prompt, image) {
  const form = new FormData();
  for (const [name, value] of Object.entries({ model: "gpt-image-1", prompt, quality: "auto", size: "auto" })) {
    form.append(name, value);
  }
  form.append("image[]", createReadStream(image), { filename: "image.png", contentType: "image/png" });
  const headers = { ...form.getHeaders(), Authorization: `Bearer ${apiKey}` };
  const response = await axios.post("/images/edits", form, { baseURL, headers });
  return response.data.data[0].b64_json;
}
