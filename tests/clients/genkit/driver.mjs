// Google's Genkit with its plugin for OpenAI.
import { openAI } from "@genkit-ai/compat-oai/openai";
import { genkit } from "genkit";

// OPENAI_API_KEY
const ai = genkit({ plugins: [openAI({ baseURL: process.env.OPENAI_BASE_URL })] });

export async function generate(prompt) {
  const { media } = await ai.generate({ model: openAI.model("dall-e-3"), prompt });
  return media.url;
}
