// LangChain's DALL-E tool for JavaScript.
import { DallEAPIWrapper } from "@langchain/openai";

const tool = new DallEAPIWrapper({ baseUrl: process.env.OPENAI_BASE_URL }); // and OPENAI_API_KEY

export const generate = (prompt) => tool.invoke(prompt);
