// Asks a gateway for images with OpenAI's Node client, which tries again by itself when a connection is lost.
// HYPERGEN_BASE_URL: the gateway's /v1, through whatever loses connections. Prints what came as one line of JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.HYPERGEN_BASE_URL, apiKey: process.env.HYPERGEN_API_KEY });
const images = await client.images.generate({ prompt: "a fox", n: 2 });
console.log(JSON.stringify({ seeds: images.data.map((image) => image.seed) }));
