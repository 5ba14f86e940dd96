// The CT: int16 Hounsfield slices from the server, windowed here, drawn on one canvas.
//
// Shapes: a slice is Int16Array(rows * columns); image coordinates (x, y) are columns and rows, fractional.
// Every wheel step leaves a performance measure named "slice-painted": from the event to the frame that shows it.
// The report's side of the page names the images that belong beside its text; when it is drawn again, they follow it.

import { drawMeasure, lengthOf } from "./measures.js";
import { ask, sliceStore } from "./slices.js";

const PRESETS = [
  { name: "soft tissue", width: 400, centre: 40 },
  { name: "lung", width: 1500, centre: -600 },
  { name: "liver", width: 150, centre: 90 },
  { name: "bone", width: 2500, centre: 480 },
  { name: "brain", width: 80, centre: 40 },
];
const OVERLAY_SIZE = 128;
const WHEEL_STEP = 40; // pixels of a trackpad that make one slice; a wheel's notch is more
const EDGE_MM = 5; // how far beyond the last slice the middle of the model's last box may lie

const root = document.getElementById("viewer");
const canvas = document.getElementById("canvas");
const context = canvas.getContext("2d", { alpha: false });
const picture = document.createElement("canvas"); // the slice at its own size
const pictureContext = picture.getContext("2d", { alpha: false });
const heatPicture = document.createElement("canvas");
heatPicture.width = heatPicture.height = OVERLAY_SIZE;
const lut = new Uint32Array(65536);

const view = {
  input: null, other: false, volumes: [], volume: null, plane: "axial", index: 0, shown: -1,
  preset: 0, width: 400, centre: 40, zoom: 1, panX: 0, panY: 0, tool: "window",
  measures: [], drawing: null, evidence: null, heat: null, said: "",
};
let wanted = 0; // direction of the last step, for prefetching ahead first
let pendingSteps = []; // times of wheel events whose slice is not painted yet
let frame = 0;
let outdated = false; // the server has this volume no more
let looks = 0; // wishes to look at something, counted: an answer that comes after another wish is dropped

const url = (path) => `/studies/${root.dataset.study}/${path}`;
const plane = () => view.volume.planes[view.plane];
const keyOf = (index, { number, input } = view.volume, name = view.plane) => `${number}/${name}/${index}?input=${input}`;

const slices = sliceStore({
  address: (key) => url(`volumes/${key}`),
  gone: (key) => { outdated ||= view.volume !== null && key.endsWith(`?input=${view.volume.input}`); },
  troubled: (key) => { if (isShown(key)) note("This slice cannot be loaded; it is tried again."); },
  settled: (key) => { if (isShown(key)) repaint(); },
});
const isShown = (key) => view.volume !== null && key === keyOf(view.index);

// The images that the report's side names, when others are shown: a newer draft was made from other images.
function follow() {
  const { images, otherImages } = document.getElementById("report-side").dataset;
  view.other = otherImages !== undefined;
  if (images === view.input) return describe();
  const again = view.input !== null;
  view.input = images;
  clear();
  if (images) load(images, again);
  else note("No images: the study has no volume.");
}

async function load(images, again) {
  note("Loading");
  const response = await ask(url(`volumes?input=${encodeURIComponent(images)}`));
  const volumes = response.ok ? await response.json() : [];
  if (images !== view.input) return; // others were named meanwhile
  if (volumes.length === 0) return note("The images cannot be loaded. Load the page again.");
  view.volumes = volumes;
  for (const volume of volumes) document.getElementById("series").add(new Option(volume.label, volume.number));
  choose(volumes[0]);
  if (again) say("These are the images that belong to the text as it is now.");
}

function clear() {
  hideEvidence();
  [view.volumes, view.volume, view.measures, view.drawing, view.said, view.shown] = [[], null, [], null, "", -1];
  outdated = false;
  slices.want(null);
  document.getElementById("series").replaceChildren();
  document.getElementById("readout").textContent = "";
  for (const letter of root.querySelectorAll(".edge")) letter.textContent = "";
  delete root.dataset.painted;
}

function choose(volume) {
  view.volume = volume;
  view.measures = [];
  hideEvidence(); // it belongs to one volume
  setPlane("axial");
}

function setPlane(name) {
  view.plane = name;
  view.index = Math.floor(plane().count / 2);
  view.shown = -1;
  for (const button of root.querySelectorAll("[data-plane]")) button.setAttribute("aria-pressed", button.dataset.plane === name);
  const [top, right, bottom, left] = plane().edges;
  for (const [side, letter] of Object.entries({ top, right, bottom, left })) root.querySelector(`.edge.${side}`).textContent = letter;
  fit();
  go(view.index);
}

function go(index, since = null) {
  const target = Math.max(0, Math.min(plane().count - 1, index));
  wanted = Math.sign(target - view.index) || wanted;
  view.index = target;
  view.said = "";
  if (since !== null) pendingSteps.push({ since, target });
  fetchAround();
  loadHeat();
  repaint();
}

function fetchAround() {
  const { rows, columns, count } = plane();
  const [volume, name] = [view.volume, view.plane];
  const key = (index) => keyOf(index, volume, name);
  slices.want({ index: view.index, count, ahead: wanted, size: rows * columns, key });
}

function setWindow(width, centre) {
  view.width = Math.max(1, Math.round(width));
  view.centre = Math.round(centre);
  const low = view.centre - view.width / 2;
  for (let i = 0; i < 65536; i++) {
    const hounsfield = i > 32767 ? i - 65536 : i;
    const grey = Math.max(0, Math.min(255, Math.round(((hounsfield - low) / view.width) * 255)));
    lut[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  view.shown = -1;
  repaint();
}

function repaint() {
  if (!frame) frame = requestAnimationFrame(paint);
}

function paint() {
  frame = 0;
  const slice = view.volume ? slices.get(keyOf(view.index)) : undefined;
  if (slice && view.shown !== keyOf(view.index)) develop(slice);
  draw();
  describe();
  if (!slice) return outdated && note("The images were made anew. Load the page again.");
  note(view.said);
  root.dataset.painted = String(view.index);
  const now = performance.now();
  for (const step of pendingSteps) performance.measure("slice-painted", { start: step.since, end: now });
  pendingSteps = [];
}

function develop(slice) {
  const { rows, columns } = plane();
  if (picture.width !== columns || picture.height !== rows) [picture.width, picture.height] = [columns, rows];
  const image = pictureContext.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const bits = new Uint16Array(slice.buffer, slice.byteOffset, slice.length);
  for (let i = 0; i < bits.length; i++) pixels[i] = lut[bits[i]];
  pictureContext.putImageData(image, 0, 0);
  view.shown = keyOf(view.index);
}

// Millimetres decide the shape: a row may be farther from the next than a column.
function scale() {
  const { rows, columns, row_mm, column_mm } = plane();
  const fitted = Math.min(canvas.width / (columns * column_mm), canvas.height / (rows * row_mm));
  const perMm = fitted * view.zoom;
  return {
    x: perMm * column_mm, y: perMm * row_mm,
    left: (canvas.width - columns * column_mm * perMm) / 2 + view.panX,
    top: (canvas.height - rows * row_mm * perMm) / 2 + view.panY,
  };
}

function draw() {
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = "#000";
  context.fillRect(0, 0, canvas.width, canvas.height);
  root.dataset.overlay = "";
  if (!view.volume || view.shown === -1) return;
  const { rows, columns } = plane();
  const s = scale();
  context.imageSmoothingEnabled = true;
  context.drawImage(picture, s.left, s.top, columns * s.x, rows * s.y);
  if (view.shown !== keyOf(view.index)) return; // the slice before stands until this one comes
  const heated = view.heat === view.index && view.plane === "axial"; // never another slice's heat
  if (heated) {
    root.dataset.overlay = String(view.index);
    context.globalAlpha = 0.5;
    context.drawImage(heatPicture, s.left, s.top, columns * s.x, rows * s.y);
    context.globalAlpha = 1;
  }
  const lines = view.drawing ? [...view.measures, view.drawing] : view.measures;
  for (const line of lines) if (line.plane === view.plane && line.index === view.index) drawMeasure(context, line, s, plane());
}

function describe() {
  if (!view.volume) return;
  const preset = PRESETS.find((p) => p.width === view.width && p.centre === view.centre);
  const oblique = view.volume.oblique ? "\noblique to the patient's axes" : "";
  const repairs = view.volume.repairs.map((repair) => `repaired: ${repair}\n`).join(""); // what was mended may mislead the eye
  const other = view.other ? "not the images that this text was drafted from\n" : "";
  const coming = view.shown === keyOf(view.index) ? "" : " is coming"; // the picture is still another slice's
  document.getElementById("readout").textContent = `${other}${repairs}${view.plane} ${view.index + 1} / ${plane().count}${coming}${oblique}`;
  document.getElementById("window-readout").textContent = `W ${view.width}  L ${view.centre}${preset ? `  ${preset.name}` : ""}\n${Math.round(view.zoom * 100)} %`;
  canvas.setAttribute("aria-label", `CT, ${view.plane} slice ${view.index + 1} of ${plane().count}`);
}

const note = (text) => { document.getElementById("stage-note").textContent = text; };

// What stands on the picture until the reader goes to another slice.
function say(text) {
  view.said = text;
  note(text);
}

function fit() {
  [view.zoom, view.panX, view.panY] = [1, 0, 0];
  repaint();
}

function zoomBy(factor) {
  view.zoom = Math.max(0.3, Math.min(20, view.zoom * factor));
  repaint();
}

function setTool(name) {
  view.tool = name;
  for (const button of root.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", button.dataset.tool === name);
}

function resize() {
  const box = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(box.width * devicePixelRatio));
  canvas.height = Math.max(1, Math.round(box.height * devicePixelRatio));
  repaint();
}

let rolled = 0;
function onWheel(event) {
  event.preventDefault();
  if (!view.volume) return;
  if (event.ctrlKey) return zoomBy(event.deltaY < 0 ? 1.1 : 1 / 1.1);
  const pixels = event.deltaMode === 0 ? event.deltaY : event.deltaY * WHEEL_STEP;
  rolled = Math.sign(pixels) === Math.sign(rolled) ? rolled + pixels : pixels;
  const steps = Math.abs(pixels) >= WHEEL_STEP ? Math.sign(pixels) : Math.trunc(rolled / WHEEL_STEP);
  if (steps === 0) return;
  rolled = 0;
  go(view.index + steps, event.timeStamp);
}

function onDown(event) {
  if (!view.volume) return;
  root.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  const tool = event.button === 1 || event.shiftKey ? "pan" : event.button === 2 ? "zoom" : view.tool;
  const from = { x: event.clientX, y: event.clientY };
  if (tool === "measure") {
    const point = imagePoint(event);
    view.drawing = { plane: view.plane, index: view.index, x1: point.x, y1: point.y, x2: point.x, y2: point.y };
  }
  const move = (e) => {
    const [dx, dy] = [e.clientX - from.x, e.clientY - from.y];
    [from.x, from.y] = [e.clientX, e.clientY];
    if (tool === "window") setWindow(view.width + dx * Math.max(1, view.width / 300), view.centre + dy * Math.max(1, view.width / 300));
    if (tool === "pan") { view.panX += dx * devicePixelRatio; view.panY += dy * devicePixelRatio; repaint(); }
    if (tool === "zoom") zoomBy(Math.exp(-dy / 200));
    if (tool === "measure" && view.drawing) { const p = imagePoint(e); [view.drawing.x2, view.drawing.y2] = [p.x, p.y]; repaint(); }
  };
  const up = () => {
    canvas.removeEventListener("pointermove", move);
    if (view.drawing) {
      if (lengthOf(view.drawing, plane()) > 0.5) view.measures.push(view.drawing);
      root.dataset.measured = lengthOf(view.drawing, plane()).toFixed(1);
      view.drawing = null;
      repaint();
    }
  };
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("pointerup", up, { once: true });
  canvas.addEventListener("pointercancel", up, { once: true });
}

function imagePoint(event) {
  const box = canvas.getBoundingClientRect();
  const s = scale();
  return {
    x: ((event.clientX - box.left) * devicePixelRatio - s.left) / s.x,
    y: ((event.clientY - box.top) * devicePixelRatio - s.top) / s.y,
  };
}

function toAxial(number) {
  const volume = view.volumes.find((v) => v.number === number);
  if (volume && volume !== view.volume) choose(volume);
  if (volume && view.plane !== "axial") setPlane("axial");
  return volume;
}

// The slice through a point in the patient (RAS millimetres), with nothing laid over it.
function showPlace([number, x, y, z]) {
  hideEvidence();
  const volume = toAxial(number);
  if (!volume) return say("The best slice of this sentence is in a volume that is not here.");
  const row = volume.axial_of_ras;
  const index = row[0] * x + row[1] * y + row[2] * z + row[3];
  const edge = EDGE_MM / volume.planes.coronal.row_mm;
  if (index < -edge || index > plane().count - 1 + edge) return say("The best slice of this sentence lies outside this volume.");
  go(Math.round(index));
}

// Evidence is off until it is asked for, and always says what it is.
async function showEvidence(sentence, overlay) {
  hideEvidence();
  const mine = looks;
  const response = await ask(url(`evidence/${sentence}`));
  const found = response.ok ? await response.json() : null;
  if (mine !== looks) return;
  if (!found) return say("The evidence cannot be loaded.");
  if (found.input !== view.input || !toAxial(found.volume)) return say("The evidence was found in other images than these.");
  view.evidence = overlay ? { sentence, faithfulness: found.faithfulness } : null;
  go(found.slice);
}

async function loadHeat() {
  const label = document.getElementById("overlay-label");
  label.hidden = !view.evidence || view.plane !== "axial";
  if (!view.evidence || view.plane !== "axial") { view.heat = null; return; }
  label.textContent = `where the model looked (faithfulness ${view.evidence.faithfulness.toFixed(2)})`;
  const { sentence } = view.evidence;
  const index = view.index;
  const response = await ask(url(`evidence/${sentence}/axial/${index}`));
  if (!response.ok || index !== view.index || view.evidence?.sentence !== sentence) return;
  const heat = new Uint8Array(await response.arrayBuffer());
  const drawing = heatPicture.getContext("2d");
  const image = drawing.createImageData(OVERLAY_SIZE, OVERLAY_SIZE);
  for (let i = 0; i < heat.length; i++) image.data.set([255, Math.min(255, heat[i]), 0, heat[i]], 4 * i);
  drawing.putImageData(image, 0, 0);
  view.heat = index;
  repaint();
}

function hideEvidence() {
  looks += 1;
  view.evidence = view.heat = null;
  document.getElementById("overlay-label").hidden = true;
  repaint();
}

const COMMANDS = {
  place: showPlace,
  plain: hideEvidence,
  slice: (by) => go(view.index + by),
  first: () => go(0),
  last: () => go(plane().count - 1),
  preset: (number) => setWindow(PRESETS[number].width, PRESETS[number].centre),
  plane: setPlane,
  tool: (name) => setTool(view.tool === name ? "window" : name),
  zoom: zoomBy,
  fit,
  evidence: ({ sentence, overlay }) => (overlay && view.evidence?.sentence === sentence ? hideEvidence() : showEvidence(sentence, overlay)),
};

function bind() {
  setWindow(PRESETS[0].width, PRESETS[0].centre);
  canvas.addEventListener("wheel", onWheel, { passive: false });
  canvas.addEventListener("pointerdown", onDown);
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  new ResizeObserver(resize).observe(canvas);
  document.getElementById("series").addEventListener("change", (event) => choose(view.volumes.find((v) => v.number === Number(event.target.value))));
  root.querySelector(".tools").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.fit !== undefined) return fit();
    if (button.dataset.tool) return setTool(button.dataset.tool);
    if (!view.volume) return;
    if (button.dataset.plane) setPlane(button.dataset.plane);
    if (button.dataset.preset) COMMANDS.preset(Number(button.dataset.preset));
  });
  document.body.addEventListener("htmx:load", follow);
  document.addEventListener("mu2:viewer", (event) => {
    const { command, value } = event.detail;
    if (view.volume || command === "preset") COMMANDS[command](value);
  });
}

bind();
resize();
follow();
