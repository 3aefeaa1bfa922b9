// OpenAI's Node client, the last release before 5.0, which had no streams of images.
import { createReadStream } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY

export async function generate(prompt) {
  const response = await client.images.generate({ model: "dall-e-3", prompt, n: 1, size: "1024x1024" });
  return response.data[0].url;
}

export async function edit(prompt, image, mask) {
  const response = await client.images.edit({
    model: "gpt-image-1",
    image: createReadStream(image),
    mask: createReadStream(mask),
    prompt,
  });
  return response.data[0].b64_json;
}

export async function vary(image) {
  const response = await client.images.createVariation({ image: createReadStream(image) });
  return response.data[0].url;
}
