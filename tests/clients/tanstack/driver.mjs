// TanStack AI with its adapter for OpenAI.
import { readFileSync } from "node:fs";
import { generateImage } from "@tanstack/ai";
import { openaiImage } from "@tanstack/ai-openai";

const adapter = openaiImage("gpt-image-1", { baseURL: process.env.OPENAI_BASE_URL }); // and OPENAI_API_KEY

export async function generate(prompt) {
  const { images } = await generateImage({ adapter, prompt, size: "1024x1024" });
  return images[0].b64Json;
}

const part = (path, metadata) => ({
  type: "image",
  source: { type: "data", value: readFileSync(path).toString("base64"), mimeType: "image/png" },
  metadata,
});

export async function edit(text, image, mask) {
  const prompt = [{ type: "text", content: text }, part(image), part(mask, { role: "mask" })];
  const { images } = await generateImage({ adapter, prompt });
  return images[0].b64Json;
}
