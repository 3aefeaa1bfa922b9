// OpenAI's Node client.
import { createReadStream } from "node:fs";
import OpenAI from "openai";

const client = new OpenAI(); // OPENAI_BASE_URL and OPENAI_API_KEY

export async function generate(prompt) {
  const response = await client.images.generate({ model: "gpt-image-1", prompt, size: "1024x1024" });
  return response.data[0].b64_json;
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

export async function stream(prompt) {
  const images = [];
  const events = await client.images.generate({ model: "gpt-image-1", prompt, stream: true, partial_images: 2 });
  for await (const event of events) images.push(event.b64_json);
  return images;
}

export async function vary(image) {
  const response = await client.images.createVariation({ image: createReadStream(image) });
  return response.data[0].url;
}
