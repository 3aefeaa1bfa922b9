// xsAI, small functions for servers that speak OpenAI's API.
import { generateImage } from "@xsai/generate-image";

export async function generate(prompt) {
  const { image } = await generateImage({
    apiKey: process.env.OPENAI_API_KEY,
    baseURL: `${process.env.OPENAI_BASE_URL}/`,
    model: "gpt-image-1",
    prompt,
  });
  return image.base64;
}
