// A request as a developer would write it: the same fields, the same values; the key by its variable.

import { texts, toJson } from "./request.js";

const OPENAI = new Set(["prompt", "n", "size", "stream", "partial_images"]);
const PYTHON_WORDS = { true: "True", false: "False", null: "None" };
const SAVE = `
import base64, json, sys
for line in sys.stdin:
    if "\\"error\\"" in line:
        sys.exit(line)
    event = json.loads(line[6:]) if line.startswith("data: ") else {"type": ""}
    if event["type"].endswith(".completed"):
        with open("image-%d.png" % event["image_index"], "wb") as file:
            file.write(base64.b64decode(event["b64_json"]))
`;

/** The request as a line for a shell; it writes image-0.png and so on. */
export function toCurl(request, base, needsKey) {
  const lines = [`curl -sN ${quoted(new URL(request.path, base).href)}`];
  if (needsKey) lines.push('-H "Authorization: Bearer $HYPERGEN_API_KEY"');
  if (request.image) {
    for (const [name, value] of texts(request)) lines.push(`--form-string ${quoted(`${name}=${value}`)}`);
    if (request.others.length) lines.push(...namesOf(request).map((name) => `-F image[]=@${name}`));
    else lines.push("-F image=@image.png");
    if (request.mask) lines.push("-F mask=@mask.png");
  } else {
    lines.push("-H 'Content-Type: application/json'", `--data-binary ${quoted(toJson(request.fields))}`);
  }
  lines.push(`| python3 -c '${SAVE}'`);
  return lines.join(" \\\n  ");
}

/** The request by OpenAI's Python client; it writes image-0.png and so on. */
export function toPython(request, base, needsKey) {
  const key = needsKey ? 'os.environ["HYPERGEN_API_KEY"]' : '"none"';
  const own = request.fields.filter(([name]) => OPENAI.has(name));
  const extra = request.fields.filter(([name]) => !OPENAI.has(name));
  const method = request.image ? "edit" : "generate";
  return [
    `import base64${needsKey ? "\nimport os" : ""}`,
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", base).href)}, api_key=${key})`,
    `events = client.images.${method}(`,
    ...(request.image ? [`    image=${toFiles(request)},`] : []),
    ...(request.mask ? ['    mask=open("mask.png", "rb"),'] : []),
    ...own.map(([name, value]) => `    ${name}=${toLiteral(value)},`),
    "    extra_body={",
    ...extra.map(([name, value]) => `        ${JSON.stringify(name)}: ${toLiteral(value)},`),
    "    },",
    ")",
    "for event in events:",
    '    if event.type.endswith(".completed"):',
    '        with open(f"image-{event.image_index}.png", "wb") as file:',
    "            file.write(base64.b64decode(event.b64_json))",
    "",
  ].join("\n");
}

const namesOf = (request) => ["image.png", ...request.others.map((_, index) => `other-${index}.png`)];

function toFiles(request) {
  const opened = namesOf(request).map((name) => `open("${name}", "rb")`);
  return request.others.length ? `[${opened.join(", ")}]` : opened[0];
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

// A string in JSON is the same string in Python, but for the words of its values.
function toLiteral(json) {
  return PYTHON_WORDS[json] ?? json;
}
