// Vercel's AI SDK with its provider for OpenAI.
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { generateImage } from "ai";

const openai = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY });
const model = openai.image("gpt-image-1");

export async function generate(prompt) {
  const { image } = await generateImage({ model, prompt, size: "1024x1024" });
  return image.base64;
}

export async function edit(text, image, mask) {
  const prompt = { text, images: [readFileSync(image)], mask: readFileSync(mask) };
  return (await generateImage({ model, prompt })).image.base64;
}
