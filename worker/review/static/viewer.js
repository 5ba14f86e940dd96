// The CT: int16 Hounsfield slices from the server, windowed here, drawn on one canvas.
//
// Shapes: a slice is Int16Array(rows * columns); image coordinates (x, y) are columns and rows, fractional.
// Every wheel step leaves a performance measure named "slice-painted": from the event to the frame that shows it.

const PRESETS = [
  { name: "soft tissue", width: 400, centre: 40 },
  { name: "lung", width: 1500, centre: -600 },
  { name: "liver", width: 150, centre: 90 },
  { name: "bone", width: 2500, centre: 480 },
  { name: "brain", width: 80, centre: 40 },
];
const CACHE_BYTES = 512 * 1024 * 1024;
const AT_ONCE = 6; // requests under way; browsers open as many connections to one host
const AHEAD = 400; // slices fetched around the one shown, nearest first
const OVERLAY_SIZE = 128;
const WHEEL_STEP = 40; // pixels of a trackpad that make one slice; a wheel's notch is more

const root = document.getElementById("viewer");
const canvas = document.getElementById("canvas");
const context = canvas.getContext("2d", { alpha: false });
const picture = document.createElement("canvas"); // the slice at its own size
const pictureContext = picture.getContext("2d", { alpha: false });
const heatPicture = document.createElement("canvas");
heatPicture.width = heatPicture.height = OVERLAY_SIZE;
const lut = new Uint32Array(65536);

const view = {
  volumes: [], volume: null, plane: "axial", index: 0, shown: -1,
  preset: 0, width: 400, centre: 40, zoom: 1, panX: 0, panY: 0, tool: "window",
  measures: [], drawing: null, evidence: null, heat: null,
};
const cache = new Map(); // key → Int16Array, the least recently used first
let cachedBytes = 0;
const running = new Map(); // key → true
const failed = new Set();
let wanted = 0; // direction of the last step, for prefetching ahead first
let pendingSteps = []; // times of wheel events whose slice is not painted yet
let frame = 0;
let outdated = false; // the server has another volume by now

const url = (path) => `/studies/${root.dataset.study}/${path}`;
const plane = () => view.volume.planes[view.plane];
const keyOf = (index) => `${view.volume.number}/${view.plane}/${index}?input=${view.volume.input}`;

async function start() {
  bind();
  resize();
  const response = await ask(url("volumes"));
  if (!response.ok) return note("The images cannot be loaded.");
  view.volumes = await response.json();
  if (view.volumes.length === 0) return note("No images: the study has no volume.");
  const series = document.getElementById("series");
  for (const volume of view.volumes) series.add(new Option(volume.label, volume.number));
  choose(view.volumes[0]);
}

function ask(address) {
  return fetch(address, { credentials: "same-origin", headers: { "X-Requested-By": "script" } });
}

function choose(volume) {
  view.volume = volume;
  view.measures = [];
  view.evidence = view.heat = null; // it belongs to one volume
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
  if (since !== null) pendingSteps.push({ since, target });
  pump();
  loadHeat();
  repaint();
}

// Fetches the slice that is wanted first, then its neighbours, nearest first and ahead before behind.
function pump() {
  if (!view.volume) return;
  const count = plane().count;
  for (let distance = 0; distance < AHEAD && running.size < AT_ONCE; distance++) {
    const sides = distance === 0 ? [0] : wanted < 0 ? [-distance, distance] : [distance, -distance];
    for (const offset of sides) {
      const index = view.index + offset;
      if (index < 0 || index >= count || running.size >= AT_ONCE) continue;
      const key = keyOf(index);
      if (!cache.has(key) && !running.has(key) && !failed.has(key)) fetchSlice(index, key);
    }
  }
}

async function fetchSlice(index, key) {
  running.set(key, true);
  const { rows, columns } = plane();
  try {
    const response = await ask(url(`volumes/${key}`));
    if (response.status === 404) { outdated = true; failed.add(key); return; }
    if (!response.ok) throw new Error(String(response.status));
    const slice = new Int16Array(await response.arrayBuffer());
    if (slice.length !== rows * columns) throw new Error("size");
    remember(key, slice);
  } catch (error) {
    failed.add(key);
    setTimeout(() => { failed.delete(key); pump(); }, 3000);
    if (key === keyOf(view.index)) note("This slice cannot be loaded; it is tried again.");
  } finally {
    running.delete(key);
    if (key === keyOf(view.index)) repaint();
    pump();
  }
}

function remember(key, slice) {
  cache.set(key, slice);
  cachedBytes += slice.byteLength;
  for (const [old, bytes] of cache) {
    if (cachedBytes <= CACHE_BYTES || old === key) break;
    cache.delete(old);
    cachedBytes -= bytes.byteLength;
  }
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
  const slice = view.volume ? cache.get(keyOf(view.index)) : undefined;
  if (slice && view.shown !== keyOf(view.index)) develop(slice);
  draw();
  describe();
  if (!slice) return outdated && note("The images were made anew. Load the page again.");
  note("");
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
  if (!view.volume || view.shown === -1) return;
  const { rows, columns } = plane();
  const s = scale();
  context.imageSmoothingEnabled = true;
  context.drawImage(picture, s.left, s.top, columns * s.x, rows * s.y);
  if (view.shown !== keyOf(view.index)) return void (root.dataset.overlay = ""); // the slice before stands until this one comes
  const heated = view.heat === view.index && view.plane === "axial"; // never another slice's heat
  root.dataset.overlay = heated ? String(view.index) : "";
  if (heated) {
    context.globalAlpha = 0.5;
    context.drawImage(heatPicture, s.left, s.top, columns * s.x, rows * s.y);
    context.globalAlpha = 1;
  }
  const lines = view.drawing ? [...view.measures, view.drawing] : view.measures;
  for (const line of lines) if (line.plane === view.plane && line.index === view.index) drawMeasure(line, s);
}

function drawMeasure(line, s) {
  const [x1, y1, x2, y2] = [s.left + line.x1 * s.x, s.top + line.y1 * s.y, s.left + line.x2 * s.x, s.top + line.y2 * s.y];
  const ratio = devicePixelRatio;
  context.strokeStyle = context.fillStyle = "#ffe27a";
  context.lineWidth = 1.5 * ratio;
  context.beginPath();
  context.moveTo(x1, y1);
  context.lineTo(x2, y2);
  context.stroke();
  const label = `${lengthOf(line).toFixed(1)} mm`;
  context.font = `${14 * ratio}px system-ui, sans-serif`;
  const [width, height] = [context.measureText(label).width + 8 * ratio, 19 * ratio];
  const left = Math.max(0, Math.min(x2 + 6 * ratio, canvas.width - width)); // a label at the edge is not cut
  const top = Math.max(0, Math.min(y2 - 20 * ratio, canvas.height - height));
  context.fillStyle = "rgb(0 0 0 / 75%)";
  context.fillRect(left, top, width, height);
  context.fillStyle = "#ffe27a";
  context.fillText(label, left + 4 * ratio, top + 14 * ratio);
}

function lengthOf(line) {
  const { row_mm, column_mm } = plane();
  return Math.hypot((line.x2 - line.x1) * column_mm, (line.y2 - line.y1) * row_mm);
}

function describe() {
  if (!view.volume) return;
  const preset = PRESETS.find((p) => p.width === view.width && p.centre === view.centre);
  const oblique = view.volume.oblique ? "\noblique to the patient's axes" : "";
  const repairs = view.volume.repairs.map((repair) => `repaired: ${repair}\n`).join(""); // what was mended may mislead the eye
  const coming = view.shown === keyOf(view.index) ? "" : " is coming"; // the picture is still another slice's
  document.getElementById("readout").textContent = `${repairs}${view.plane} ${view.index + 1} / ${plane().count}${coming}${oblique}`;
  document.getElementById("window-readout").textContent = `W ${view.width}  L ${view.centre}${preset ? `  ${preset.name}` : ""}\n${Math.round(view.zoom * 100)} %`;
  canvas.setAttribute("aria-label", `CT, ${view.plane} slice ${view.index + 1} of ${plane().count}`);
}

const note = (text) => { document.getElementById("stage-note").textContent = text; };

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
    if (tool === "measure") { const p = imagePoint(e); [view.drawing.x2, view.drawing.y2] = [p.x, p.y]; repaint(); }
  };
  const up = () => {
    canvas.removeEventListener("pointermove", move);
    if (view.drawing) {
      if (lengthOf(view.drawing) > 0.5) view.measures.push(view.drawing);
      root.dataset.measured = lengthOf(view.drawing).toFixed(1);
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
  const row = toAxial(number)?.axial_of_ras;
  hideEvidence();
  if (row) go(Math.round(row[0] * x + row[1] * y + row[2] * z + row[3]));
}

// Evidence is off until it is asked for, and always says what it is.
async function showEvidence(sentence, overlay) {
  const response = await ask(url(`evidence/${sentence}`));
  if (!response.ok) return note("The evidence cannot be loaded.");
  const found = await response.json();
  if (!toAxial(found.volume)) return;
  view.evidence = overlay ? { sentence, faithfulness: found.faithfulness } : null;
  view.heat = null;
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
  view.evidence = view.heat = null;
  document.getElementById("overlay-label").hidden = true;
  repaint();
}

const COMMANDS = {
  place: showPlace,
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
  document.addEventListener("mu2:viewer", (event) => {
    const { command, value } = event.detail;
    if (view.volume || command === "preset") COMMANDS[command](value);
  });
}

start();
