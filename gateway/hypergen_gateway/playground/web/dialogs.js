// The dialogs that ask for the key and show a request as code.

import { storedKey, storeKey } from "./api.js";
import { byId, element } from "./dom.js";
import { toCurl, toPython } from "./snippets.js";

let shown = null; // the request whose code is shown

/** Asks for the key, saying why; false if there was none. */
export function askForKey(problem) {
  const dialog = byId("key-dialog");
  byId("key").value = "";
  byId("key-problem").textContent = problem;
  byId("key-problem").hidden = !problem;
  dialog.returnValue = "";
  dialog.showModal();
  byId("key").focus();
  return new Promise((resolve) => {
    const answered = () => {
      const given = dialog.returnValue === "given";
      if (given) storeKey(byId("key").value.trim());
      byId("key").value = "";
      resolve(given);
    };
    dialog.addEventListener("close", answered, { once: true });
  });
}

export function setUpKeyDialog() {
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("key-dialog").close("given");
  });
}

/** Shows a request as code that can be copied. */
export function showCode(request) {
  const files = Object.entries({ "image.png": request.image, "mask.png": request.mask }).filter(([, blob]) => blob);
  const links = files.map(([name, blob]) => {
    return element("a", { href: URL.createObjectURL(blob), download: name, textContent: name });
  });
  byId("code-files").hidden = links.length === 0;
  byId("code-files").replaceChildren("It reads ", ...links.flatMap((link, index) => (index ? [" and ", link] : [link])), ".");
  shown = request;
  byId("code-dialog").addEventListener("close", () => links.forEach((link) => URL.revokeObjectURL(link.href)), { once: true });
  chooseLanguage("curl");
  byId("code-dialog").showModal();
}

export function setUpCodeDialog() {
  byId("code-close").addEventListener("click", () => byId("code-dialog").close());
  byId("code-curl").addEventListener("click", () => chooseLanguage("curl"));
  byId("code-python").addEventListener("click", () => chooseLanguage("python"));
  byId("code-copy").addEventListener("click", copyCode);
}

function chooseLanguage(language) {
  const write = language === "curl" ? toCurl : toPython;
  byId("code").textContent = write(shown, document.baseURI, Boolean(storedKey()));
  byId("code-status").textContent = "";
  for (const name of ["curl", "python"]) byId(`code-${name}`).setAttribute("aria-pressed", String(name === language));
}

async function copyCode() {
  const copied = await copy(byId("code"));
  byId("code-status").textContent = copied ? "Copied." : "Selected: copy it with Ctrl+C.";
}

// The clipboard's own interface is not there over plain HTTP, which is how a server at home is reached.
async function copy(node) {
  try {
    await navigator.clipboard.writeText(node.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(node);
    return document.execCommand("copy");
  }
}
