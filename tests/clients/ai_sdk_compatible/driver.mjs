// Vercel's AI SDK with its provider for servers that speak OpenAI's API.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";

const hypergen = createOpenAICompatible({
  name: "hypergen",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
});
const model = hypergen.imageModel("hypergen/emoji");

export async function generate(prompt) {
  const { image } = await generateImage({ model, prompt, size: "1024x1024" });
  return image.base64;
}

export async function edit(text, image, mask) {
  const prompt = { text, images: [readFileSync(image)], mask: readFileSync(mask) };
  return (await generateImage({ model, prompt })).image.base64;
}
