// What n8n's OpenAI node asks for by itself. n8n is an application, not a library; these are the requests of its
// packages/@n8n/nodes-langchain/nodes/vendors/OpenAi/v2/actions/image/, with the libraries that it sends them by.
import { readFileSync } from "node:fs";
import axios from "axios";
import FormData from "form-data";

const { OPENAI_API_KEY: apiKey, OPENAI_BASE_URL: baseURL } = process.env; // the node's credential: API key and base URL
const Authorization = `Bearer ${apiKey}`;

export async function generate(prompt) {
  const body = { prompt, model: "gpt-image-1-mini" };
  const response = await axios.post("/images/generations", body, { baseURL, headers: { Authorization } });
  return response.data.data[0].b64_json;
}

export async function edit(prompt, image, mask) {
  const form = new FormData();
  const png = { filename: "file.png", contentType: "image/png" };
  form.append("image[]", readFileSync(image), png);
  const fields = { prompt, model: "gpt-image-1", n: "1", size: "1024x1024", quality: "auto" };
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  form.append("mask", readFileSync(mask), png);
  const headers = { ...form.getHeaders(), Authorization };
  const response = await axios.post("/images/edits", form, { baseURL, headers });
  return response.data.data[0].b64_json;
}
