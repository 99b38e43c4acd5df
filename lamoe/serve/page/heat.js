// The expert load of one reply: how often each expert computed one of its tokens.
// It is shown as a heat map (one row per layer, one column per expert), as a sentence about the
// selected cell, and as a table for screen readers.

import { $, count, h, many, text } from "./dom.js";

const canvas = $("heat");
let data = null; // {layers, experts, load}
let cell = null; // the selected [row, column]
let tableLoad = ""; // the load that the table shows, as JSON

const mean = (row) => row.reduce((sum, n) => sum + n, 0) / row.length;

/** Return a load relative to the mean of its layer (1 = even). */
const relative = (row, n) => n / (mean(row) || 1);

/** Show a response of /lamoe/requests/{id}/experts; null clears the display. */
export function showExperts(response) {
  data = response?.layers?.length ? response : null;
  $("experts-some").hidden = !data;
  $("experts-none").hidden = !!data;
  if (!data) {
    cell = null;
    const message = response
      ? "This model has no experts: every layer is dense."
      : "Which experts worked on each token, layer by layer, " +
        "is shown here while a reply is written.";
    text($("experts-none"), message);
    return;
  }
  if (cell && (cell[0] >= data.layers.length || cell[1] >= data.experts)) cell = null;
  draw();
  describe();
  if ($("heat-details").open) updateTable();
}

function draw() {
  const rows = data.layers.length;
  const columns = data.experts;
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth || 280;
  const height = Math.round(Math.min(Math.max(rows * 16, 40), Math.max(200, rows * 4)));
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const style = getComputedStyle(canvas);
  const context = canvas.getContext("2d");
  const cellWidth = canvas.width / columns;
  const cellHeight = canvas.height / rows;
  const gap = Math.min(cellWidth, cellHeight) >= 5 * scale ? scale : 0;
  const maximum = Math.max(2, ...data.load.map((row) => relative(row, Math.max(...row))));

  const fill = (row, column) => {
    // rounded edges, so that neighbouring cells meet without a seam
    const left = Math.round(column * cellWidth);
    const top = Math.round(row * cellHeight);
    const right = Math.round((column + 1) * cellWidth);
    const bottom = Math.round((row + 1) * cellHeight);
    context.fillRect(left, top, right - left - gap, bottom - top - gap);
  };

  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const share = Math.min(1, relative(data.load[row], data.load[row][column]) / maximum);
      context.globalAlpha = 1;
      context.fillStyle = style.borderTopColor; // CSS sets the colours, so they follow the theme
      fill(row, column);
      context.globalAlpha = share ** 0.8;
      context.fillStyle = style.color;
      fill(row, column);
    }
  }
  context.globalAlpha = 1;
  if (cell) {
    context.strokeStyle = style.outlineColor;
    context.lineWidth = 1.5 * scale;
    context.strokeRect(
      cell[1] * cellWidth + scale / 2,
      cell[0] * cellHeight + scale / 2,
      Math.max(cellWidth - scale, scale),
      Math.max(cellHeight - scale, scale),
    );
  }
  text($("ramp-top"), `${maximum.toFixed(1)} × even`);
}

/** Summarise a layer: its busiest expert, that expert's relative load, the unused experts. */
function summarise(row) {
  const maximum = Math.max(...row);
  return {
    busiest: row.indexOf(maximum),
    peak: relative(row, maximum),
    unused: row.filter((n) => n === 0).length,
  };
}

/** Describe the selected cell, or the whole map if no cell is selected. */
function describe() {
  const summaries = data.load.map(summarise);
  const peaks = summaries.map(({ peak }) => peak);
  const uneven = peaks.indexOf(Math.max(...peaks));
  const unused = summaries.reduce((sum, row) => sum + row.unused, 0);
  const summary =
    `${many(data.layers.length, "layer")} of ${data.experts} experts. ` +
    `Most uneven: layer ${data.layers[uneven]}, where expert ${summaries[uneven].busiest} ` +
    `had ${peaks[uneven].toFixed(1)} times an even share. ` +
    `Unused: ${count(unused)} of ${count(data.layers.length * data.experts)}.`;
  canvas.setAttribute("aria-label", `Expert load. ${summary}`);
  if (!cell) return text($("heat-cell"), summary);
  const [row, column] = cell;
  const n = data.load[row][column];
  text(
    $("heat-cell"),
    `Layer ${data.layers[row]}, expert ${column}: chosen ${many(n, "time")}, ` +
      `${relative(data.load[row], n).toFixed(1)} × even.`,
  );
}

function updateTable() {
  const load = JSON.stringify(data.load);
  if (load === tableLoad) return;
  tableLoad = load;
  const rows = data.load.map((row, i) => {
    const { busiest, peak, unused } = summarise(row);
    const header = h("th", { scope: "row" }, String(data.layers[i]));
    const cells = [`expert ${busiest}`, `${peak.toFixed(1)} ×`, `${unused} of ${data.experts}`];
    return h("tr", {}, header, ...cells.map((content) => h("td", {}, content)));
  });
  $("heat-rows").replaceChildren(...rows);
}

function select(row, column) {
  const clamp = (n, size) => Math.min(Math.max(n, 0), size - 1);
  cell = [clamp(row, data.layers.length), clamp(column, data.experts)];
  draw();
  describe();
}

function deselect() {
  cell = null;
  if (!data) return;
  draw();
  describe();
}

canvas.addEventListener("pointermove", (e) => {
  if (!data) return;
  const area = canvas.getBoundingClientRect();
  const row = ((e.clientY - area.top) / area.height) * data.layers.length;
  const column = ((e.clientX - area.left) / area.width) * data.experts;
  select(Math.floor(row), Math.floor(column));
});
canvas.addEventListener("pointerleave", deselect);
canvas.addEventListener("blur", deselect);
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
canvas.addEventListener("keydown", (e) => {
  const step = STEPS[e.key];
  if (!step || !data || e.altKey) return;
  e.preventDefault();
  $("heat-cell").setAttribute("aria-live", "polite");
  if (cell) select(cell[0] + step[0], cell[1] + step[1]);
  else select(0, 0);
});
$("heat-details").addEventListener("toggle", (e) => {
  if (e.target.open && data) updateTable();
});

/** Draw again after a change of the theme or the width. */
export function redrawHeat() {
  if (data) draw();
}
new ResizeObserver(redrawHeat).observe(canvas);
