// Drives a gateway with OpenAI's Node client and prints what came back as one line of JSON.
// HYPERGEN_BASE_URL: the gateway's /v1; HYPERGEN_API_KEY: its key; HYPERGEN_MODEL: the id it should list.
import OpenAI, { APIError, toFile } from "openai";
import { Readable } from "node:stream";

const baseURL = process.env.HYPERGEN_BASE_URL;
const apiKey = process.env.HYPERGEN_API_KEY;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    const { status, code, param, message, requestID, constructor } = error;
    return { name: constructor.name, status, code, param, message, requestID };
  }
  throw new Error("no error was raised");
}

const models = [];
for await (const model of client.models.list()) models.push(model);

const images = await client.images.generate({ model: "gpt-image-1", prompt: "a fox", n: 2, seed: 7 });

const streamed = [];
for await (const event of await client.images.generate({
  prompt: "a fox",
  seed: 9,
  stream: true,
  partial_images: 2,
})) {
  const { b64_json, ...rest } = event;
  streamed.push({ ...rest, bytes: Buffer.from(b64_json, "base64").length });
}

// The edits start from the first image: as a file, as a stream whose length nobody knows.
const png = Buffer.from(images.data[0].b64_json, "base64");
const image = () => toFile(png, "image.png");
const edited = await client.images.edit({ image: [await image()], prompt: "a fox", seed: 3 });
const editStreamed = [];
for await (const event of await client.images.edit({
  image: await toFile(Readable.from([png.subarray(0, 50), png.subarray(50)]), "image.png"),
  prompt: "a fox",
  stream: true,
  partial_images: 1,
})) {
  const { b64_json, ...rest } = event;
  editStreamed.push({ ...rest, bytes: Buffer.from(b64_json, "base64").length });
}
const varied = await client.images.createVariation({ image: await image(), n: 2 });
const wrongMask = await errorOf(
  client.images.edit({ image: await image(), mask: await image(), prompt: "a fox" }),
);

const linked = await client.images.generate({ prompt: "a fox", response_format: "url", output_format: "webp" });
const file = await fetch(linked.data[0].url);
const link = { type: file.headers.get("content-type"), bytes: (await file.arrayBuffer()).byteLength };

console.log(
  JSON.stringify({
    models,
    retrieved: await client.models.retrieve(process.env.HYPERGEN_MODEL),
    images,
    streamed,
    link,
    edited,
    editStreamed,
    varied,
    wrongMask,
    unknownModel: await errorOf(client.models.retrieve("no/such-model")),
    wrongSize: await errorOf(client.images.generate({ prompt: "a fox", size: "9000x7" })),
    wrongKey: await errorOf(new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 }).models.list()),
  }),
);
