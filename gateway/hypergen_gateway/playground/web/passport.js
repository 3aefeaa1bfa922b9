// How far the model's images are from those in float32, as /v1/capabilities says it was measured.

import { byId, element } from "./dom.js";

const HEAD = ["", "PSNR", "lowest", "SSIM", "time"];

/** Shows the table; without rows the page has none. */
export function showPassport(rows) {
  byId("passport").hidden = rows.length === 0;
  if (rows.length === 0) return;
  const head = element("tr", {}, ...HEAD.map((text) => element("th", { scope: "col", textContent: text })));
  byId("passport-rows").replaceChildren(head, ...rows.map(rowOf));
  byId("passport-hint").textContent =
    `Images of ${rows[0].prompts} prompts compared with the same seeds in float32. PSNR in dB; of equal images 100, SSIM 1.`;
}

function rowOf({ fields, psnr, lowest_psnr, ssim, time }) {
  const name = Object.entries(fields).map(([field, value]) => `${field} ${value}`).join(", ") || "as served";
  const values = [psnr.toFixed(1), lowest_psnr.toFixed(1), ssim.toFixed(3), time.toFixed(2)];
  return element("tr", {}, element("th", { scope: "row", textContent: name }), ...values.map((text) => element("td", { textContent: text })));
}
