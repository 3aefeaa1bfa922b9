// OpenAI's Node client before 4.0, which knew links alone.
import { createReadStream } from "node:fs";
import { Configuration, OpenAIApi } from "openai";

const { OPENAI_API_KEY: apiKey, OPENAI_BASE_URL: basePath } = process.env;
const openai = new OpenAIApi(new Configuration({ apiKey, basePath }));

const url = (response) => response.data.data[0].url;

export const generate = async (prompt) => url(await openai.createImage({ prompt, n: 1, size: "1024x1024" }));

export const edit = async (prompt, image, mask) =>
  url(await openai.createImageEdit(createReadStream(image), prompt, createReadStream(mask), 1, "1024x1024"));

export const vary = async (image) => url(await openai.createImageVariation(createReadStream(image), 1, "1024x1024"));
