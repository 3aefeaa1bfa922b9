// Runs one client's driver, as driving.py does: `node driving.mjs DRIVER RESULTS`. What a driver is stands there.
import { writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const ARGUMENTS = {
  generate: ["PROMPT"],
  edit: ["EDIT_PROMPT", "IMAGE", "MASK"],
  stream: ["PROMPT"],
  vary: ["IMAGE"],
};

async function base64Of(image) {
  if (image instanceof Uint8Array) return Buffer.from(image).toString("base64");
  if (typeof image !== "string") throw new TypeError(`no image came back: ${JSON.stringify(image)}`.slice(0, 200));
  if (!image.startsWith("http")) return image.split(";base64,").at(-1);
  const response = await fetch(image);
  if (!response.ok) throw new Error(`the link gave ${response.status}`);
  return Buffer.from(await response.arrayBuffer()).toString("base64");
}

async function outcome(operation, values) {
  try {
    return { images: await Promise.all([await operation(...values)].flat().map(base64Of)) };
  } catch (error) {
    console.error(error);
    return { error: `${error.constructor.name}: ${error.message}` };
  }
}

const [driver, results] = process.argv.slice(2);
const operations = await import(pathToFileURL(resolve(driver)));
const found = {};
for (const [name, names] of Object.entries(ARGUMENTS)) {
  if (!(name in operations)) continue;
  found[name] = await outcome(operations[name], names.map((argument) => process.env[`HYPERGEN_${argument}`]));
}
writeFileSync(results, JSON.stringify(found));
