// Drives a gateway with Vercel's AI SDK and prints what came back as one line of JSON.
// HYPERGEN_BASE_URL: the gateway's /v1; HYPERGEN_API_KEY: its key; HYPERGEN_MASK: a mask of 64 × 48 pixels in base64.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateImage } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false; // They would come before the JSON, and are in it.

const baseURL = process.env.HYPERGEN_BASE_URL;
const modelWith = (apiKey) =>
  createOpenAICompatible({ name: "hypergen", baseURL, apiKey }).imageModel("gpt-image-1");
const model = modelWith(process.env.HYPERGEN_API_KEY);

async function generate(options) {
  const { images, warnings, responses } = await generateImage({ model, maxRetries: 0, ...options });
  return {
    images: images.map(({ base64, mediaType }) => ({ base64, mediaType })),
    warnings,
    requestID: responses[0].headers["x-request-id"],
  };
}

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    if (!APICallError.isInstance(error)) throw error;
    const { statusCode, message, isRetryable, data } = error;
    return { statusCode, message, isRetryable, param: data.error.param, code: data.error.code };
  }
  throw new Error("no error was raised");
}

// What the SDK has no name for goes through its providerOptions; a seed as well, which this provider does not send.
const hypergen = { seed: 7, num_inference_steps: 4 };
const generated = await generate({ prompt: "a fox", n: 2, size: "64x48", providerOptions: { hypergen } });
const webp = await generate({
  prompt: "a fox",
  seed: 9,
  providerOptions: { hypergen: { ...hypergen, output_format: "webp" } },
});

// The edits start from these images: as bytes, as base64, and as a data URL.
const [first, second] = generated.images.map((image) => image.base64);
const bytes = Buffer.from(first, "base64");
const edited = await generate({ prompt: { text: "a fox", images: [bytes] }, providerOptions: { hypergen: { seed: 3 } } });
const editedFromSeveral = await generate({
  prompt: { text: "a fox", images: [first, `data:image/png;base64,${second}`] },
  n: 2,
  providerOptions: { hypergen: { seed: 3, strength: 0.5 } },
});
const repainted = await generate({
  prompt: { text: "a fox", images: [bytes], mask: process.env.HYPERGEN_MASK },
  providerOptions: { hypergen: { seed: 3 } },
});

console.log(
  JSON.stringify({
    generated,
    webp,
    edited,
    editedFromSeveral,
    repainted,
    wrongSize: await errorOf(generate({ prompt: "a fox", size: "9000x7" })),
    wrongMask: await errorOf(generate({ prompt: { text: "a fox", images: [bytes], mask: bytes } })),
    wrongKey: await errorOf(generate({ model: modelWith("sk-wrong"), prompt: "a fox" })),
  }),
);
