// How often each expert was chosen while one reply was computed: a heat map (layers down, experts across), a sentence about the cell
// under the pointer or the arrow keys, and the same as a table for those who do not see it.

import { $, count, h, many, text } from "./dom.js";

const canvas = $("heat");
let data = null;  // {layers, experts, load}
let cell = null;  // [row, column]
let detailed = "";  // what the table shows

const even = (row) => row.reduce((a, b) => a + b, 0) / row.length;
const ratio = (row, n) => n / (even(row) || 1);

/** Show the answer of /lamoe/requests/{id}/experts; null clears. */
export function showExperts(answer) {
  data = answer?.layers?.length ? answer : null;
  $("experts-some").hidden = !data;
  $("experts-none").hidden = !!data;
  if (!data) {
    cell = null;
    text($("experts-none"), answer ? "This model has no experts: every layer is dense."
      : "Which experts worked on each token, layer by layer, is shown here while a reply is written.");
    return;
  }
  if (cell && (cell[0] >= data.layers.length || cell[1] >= data.experts)) cell = null;
  draw();
  describe();
  if ($("heat-details").open) table();
}

function top() {
  return Math.max(2, ...data.load.map((row) => ratio(row, Math.max(...row))));
}

function draw() {
  const rows = data.layers.length, columns = data.experts, scale = devicePixelRatio || 1;
  const width = canvas.clientWidth || 280, height = Math.round(Math.min(Math.max(rows * 16, 40), Math.max(200, rows * 4)));
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const look = getComputedStyle(canvas), pen = canvas.getContext("2d");
  const w = canvas.width / columns, t = canvas.height / rows, gap = Math.min(w, t) >= 5 * scale ? scale : 0, most = top();
  pen.fillStyle = look.borderTopColor;  // the ground; its colour follows the theme
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) box(pen, r, c, w, t, gap);
  pen.fillStyle = look.color;
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      pen.globalAlpha = Math.min(1, ratio(data.load[r], data.load[r][c]) / most) ** 0.8;
      box(pen, r, c, w, t, gap);
    }
  }
  pen.globalAlpha = 1;
  if (cell) {
    pen.strokeStyle = look.outlineColor;
    pen.lineWidth = 1.5 * scale;
    pen.strokeRect(cell[1] * w + scale / 2, cell[0] * t + scale / 2, Math.max(w - scale, scale), Math.max(t - scale, scale));
  }
  text($("ramp-top"), `${most.toFixed(1)} × even`);
}

function box(pen, r, c, w, t, gap) {
  const x = Math.round(c * w), y = Math.round(r * t);
  pen.fillRect(x, y, Math.round((c + 1) * w) - x - gap, Math.round((r + 1) * t) - y - gap);
}

/** One line for a layer: [busiest, its share of an even one, unused]. */
function line(row) {
  const peak = Math.max(...row);
  return [row.indexOf(peak), ratio(row, peak), row.filter((n) => n === 0).length];
}

function describe() {
  const rows = data.load.map(line);
  const worst = rows.reduce((a, b, i) => (b[1] > rows[a][1] ? i : a), 0);
  const idle = rows.reduce((sum, r) => sum + r[2], 0);
  const summary = `${many(data.layers.length, "layer")} of ${data.experts} experts. Most uneven: layer ${data.layers[worst]}, where expert ${rows[worst][0]} `
    + `had ${rows[worst][1].toFixed(1)} times an even share. Unused: ${count(idle)} of ${count(data.layers.length * data.experts)}.`;
  canvas.setAttribute("aria-label", `Expert load. ${summary}`);
  if (!cell) return text($("heat-cell"), summary);
  const n = data.load[cell[0]][cell[1]];
  text($("heat-cell"), `Layer ${data.layers[cell[0]]}, expert ${cell[1]}: chosen ${count(n)} ${n === 1 ? "time" : "times"}, ${ratio(data.load[cell[0]], n).toFixed(1)} × even.`);
}

function table() {
  const now = JSON.stringify(data.load);
  if (now === detailed) return;
  detailed = now;
  $("heat-rows").replaceChildren(...data.load.map((row, i) => {
    const [busiest, peak, unused] = line(row);
    return h("tr", {}, h("th", { scope: "row" }, String(data.layers[i])), h("td", {}, `expert ${busiest}`), h("td", {}, `${peak.toFixed(1)} ×`),
      h("td", {}, `${unused} of ${data.experts}`));
  }));
}

function look(row, column) {
  const limit = (n, size) => Math.min(Math.max(n, 0), size - 1);
  cell = [limit(row, data.layers.length), limit(column, data.experts)];
  draw();
  describe();
}

canvas.addEventListener("pointermove", (e) => {
  if (!data) return;
  const area = canvas.getBoundingClientRect();
  look(Math.floor(((e.clientY - area.top) / area.height) * data.layers.length), Math.floor(((e.clientX - area.left) / area.width) * data.experts));
});
const leave = () => ((cell = null), data && (draw(), describe()));
canvas.addEventListener("pointerleave", leave);
canvas.addEventListener("blur", leave);
canvas.addEventListener("keydown", (e) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
  if (!step || !data || e.altKey) return;
  e.preventDefault();
  $("heat-cell").setAttribute("aria-live", "polite");
  look((cell?.[0] ?? 0) + (cell ? step[0] : 0), (cell?.[1] ?? 0) + (cell ? step[1] : 0));
});
$("heat-details").addEventListener("toggle", (e) => e.target.open && data && table());

/** Draw again: the theme or the width has changed. */
export const redrawHeat = () => data && draw();
new ResizeObserver(redrawHeat).observe(canvas);
