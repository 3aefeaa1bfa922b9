// Drives a gateway with OpenAI's Node client for Azure and prints what came back as one line of JSON.
// HYPERGEN_BASE_URL: the gateway's /v1; HYPERGEN_API_KEY: its key.
import { AzureOpenAI, toFile } from "openai";

const endpoint = process.env.HYPERGEN_BASE_URL.replace(/\/v1$/, "");
const apiKey = process.env.HYPERGEN_API_KEY;

const seen = [];
for (const deployment of [undefined, "my-painter"]) {
  const client = new AzureOpenAI({ endpoint, apiKey, deployment, apiVersion: "2025-04-01-preview", maxRetries: 0 });
  const generated = await client.images.generate({ model: "acme/tiny-emoji", prompt: "a fox", seed: 7 });
  const png = Buffer.from(generated.data[0].b64_json, "base64");
  const image = await toFile(png, "image.png", { type: "image/png" });
  const edited = await client.images.edit({ model: "acme/tiny-emoji", image, prompt: "a cat", seed: 8 });
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  seen.push({ generated: generated.data[0].seed, edited: edited.data[0].seed, models });
}
console.log(JSON.stringify({ seen }));
