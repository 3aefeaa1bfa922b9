// What LobeChat asks for. It is an application, not a library; these are the requests of its
// packages/model-runtime/src/core/openaiCompatibleFactory/createImage.ts, sent by the client that it uses. A data URL
// becomes a file there; without one, the parameter `imageUrls` is dropped.
import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const client = new OpenAI(); // OPENAI_BASE_URL (its OPENAI_PROXY_URL) and OPENAI_API_KEY

export async function generate(prompt) {
  const response = await client.images.generate({
    model: "dall-e-3",
    n: 1,
    response_format: "b64_json",
    prompt,
    size: "1024x1024",
    quality: "standard",
  });
  return response.data[0].b64_json;
}

export async function edit(prompt, image) {
  const response = await client.images.edit({
    model: "gpt-image-1",
    n: 1,
    input_fidelity: "high",
    prompt,
    image: await toFile(readFileSync(image), "image.png", { type: "image/png" }),
  });
  return response.data[0].b64_json;
}
