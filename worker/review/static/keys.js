// Keys, dialogs, the idle lock and what keeps a reader's text: the page's behaviour besides the viewer.

const csrf = document.querySelector('meta[name="csrf"]')?.content;
const idleMinutes = Number(document.querySelector('meta[name="idle-minutes"]')?.content ?? 0);
const cover = document.getElementById("cover");
const live = document.getElementById("live");
const PRESENT_SECONDS = 20;
const ACTIVE_SECONDS = 30;
const RETRY_SECONDS = 4; // for words that could not be saved, and for the stream of live updates

const side = () => document.getElementById("report-side");
const sentences = () => [...document.querySelectorAll("article.sentence")];
let selected = ""; // id of the sentence that the keys act on; it outlives the card, which every judgement replaces
const current = () => document.getElementById(selected);
const viewer = (command, value) => document.dispatchEvent(new CustomEvent("mu2:viewer", { detail: { command, value } }));
const typing = (element) => element.matches?.("textarea, input:not([type=checkbox]), select");

// The network may lose an answer, or turn two requests around: numbered by their page, what was written last stands.
const page = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
let sequence = 0;
const numbered = () => ({ "X-Page": page, "X-Sequence": ++sequence });

function post(path, body, keepalive = false) {
  const headers = { "X-CSRF-Token": csrf, "X-Requested-By": "script", ...numbered() };
  return fetch(path, { method: "POST", body, credentials: "same-origin", keepalive, headers });
}

function toast(text) {
  const box = document.getElementById("toast");
  box.textContent = text;
  box.hidden = !text;
  if (text) setTimeout(() => { if (box.textContent === text) box.hidden = true; }, 8000);
}

// Sentences

function select(card, { scroll = true } = {}) {
  if (!card) return;
  document.querySelector("article.sentence.current")?.classList.remove("current");
  card.classList.add("current");
  if (card.id !== selected) viewer("plain"); // evidence never stands over the picture while another sentence is chosen
  selected = card.id;
  if (scroll) card.scrollIntoView({ block: "nearest" });
  if (!card.contains(document.activeElement)) card.focus({ preventScroll: true });
}

function step(by) {
  const all = sentences();
  const at = all.indexOf(current());
  select(all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))]);
  look(false);
}

let awaited = ""; // id of the card whose evidence was asked for here and is on its way

function look(overlay) {
  const card = current();
  if (!card) return;
  if (!overlay && card.dataset.bestSlice) viewer("place", card.dataset.bestSlice.split(" ").map(Number));
  else if (card.dataset.evidence) viewer("evidence", { sentence: card.dataset.evidence, overlay });
  else if (overlay) { awaited = card.id; document.getElementById("ask-evidence")?.click(); }
}

function arrived() {
  if (!awaited || document.querySelector("[data-evidence-toggle]:disabled")) return;
  const card = document.getElementById(awaited);
  awaited = "";
  if (!card?.dataset.evidence) toast("There is no evidence for the sentence that you asked about.");
  else if (card === current()) viewer("evidence", { sentence: card.dataset.evidence, overlay: true });
  else toast("The evidence that you asked for is there: choose its sentence and press O.");
}

function act(name) {
  current()?.querySelector(`[data-act="${name}"]`)?.click();
}

function edit() {
  const field = current()?.querySelector("textarea");
  if (!field || field.readOnly) return;
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

async function add() {
  const part = current()?.closest(".part");
  const button = (part ?? document).querySelector("[data-add]");
  if (!button) return;
  const section = JSON.parse(button.getAttribute("hx-vals")).section;
  const values = { section, after: current()?.dataset.sentence ?? "" };
  await htmx.ajax("POST", button.getAttribute("hx-post"), { target: "#report-side", swap: "outerHTML", values, source: live });
}

document.addEventListener("focusin", (event) => select(event.target.closest("article.sentence"), { scroll: false }));

// Dialogs

function open(id) {
  const dialog = document.getElementById(id);
  if (!dialog || dialog.open) return;
  dialog.showModal();
  dialog.querySelector("input:not([type=hidden], .hidden), textarea, button")?.focus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button, a");
  const card = event.target.closest("article.sentence");
  if (card) { select(card, { scroll: false }); if (!button || button.dataset.slice !== undefined) look(false); }
  if (!button) return;
  if (button.dataset.opens) open(button.dataset.opens);
  if (button.dataset.closes !== undefined) button.closest("dialog").close();
  if (button.dataset.lock !== undefined) lock();
  if (button.dataset.refresh !== undefined) refresh();
  if (button.dataset.evidenceToggle !== undefined) { if (!current()) step(0); look(true); }
  if (button.dataset.jump !== undefined) {
    event.preventDefault();
    const target = document.querySelector(button.getAttribute("href"));
    target?.scrollIntoView({ block: "center" });
    if (target?.matches("article")) select(target); else target?.focus();
  }
});

// Keys: one hand on the wheel, one here

const READING = {
  j: () => step(1), k: () => step(-1), a: () => act("accept"), r: () => act("reject"), u: () => act("undo"),
  e: edit, n: add, o: () => look(true),
  s: () => document.querySelector('[data-opens="sign-dialog"]:not(:disabled)')?.click(),
  p: () => document.getElementById("preliminary")?.click(),
  x: () => viewer("plane", "axial"), c: () => viewer("plane", "coronal"), v: () => viewer("plane", "sagittal"),
  m: () => viewer("tool", "measure"), "+": () => viewer("zoom", 1.2), "-": () => viewer("zoom", 1 / 1.2), 0: () => viewer("fit"),
  ArrowUp: () => viewer("slice", -1), ArrowDown: () => viewer("slice", 1), PageUp: () => viewer("slice", -10), PageDown: () => viewer("slice", 10),
  Home: () => viewer("first"), End: () => viewer("last"),
  ...Object.fromEntries([1, 2, 3, 4, 5].map((n) => [n, () => viewer("preset", n - 1)])),
};
const EVERYWHERE = {
  "?": () => open("keys-dialog"), l: lock,
  g: () => document.querySelector("[data-next]")?.click(), w: () => { location.href = "/"; },
  "/": () => document.getElementById("patient")?.focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && typing(event.target)) {
    const card = event.target.closest("article.sentence");
    event.target.blur();
    select(card);
    return;
  }
  if (typing(event.target)) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const chosen = (document.body.classList.contains("study") && READING[key]) || EVERYWHERE[key] || rows(key);
  if (!chosen) return;
  event.preventDefault();
  chosen();
});

function rows(key) {
  const links = [...document.querySelectorAll(".worklist td.patient a")];
  if (!links.length || !["j", "k", "ArrowDown", "ArrowUp"].includes(key)) return null;
  const at = links.indexOf(document.activeElement);
  const by = key === "j" || key === "ArrowDown" ? 1 : -1;
  return () => links[Math.max(0, Math.min(links.length - 1, at < 0 ? 0 : at + by))].focus();
}

// What htmx brings

document.body.addEventListener("htmx:afterSettle", (event) => {
  const focus = side()?.dataset.focus;
  if (focus && event.detail.target?.id === "report-side") {
    delete side().dataset.focus;
    select(document.getElementById(focus));
    edit();
  }
});
document.body.addEventListener("htmx:load", (event) => {
  const card = current();
  if (card && !card.classList.contains("current")) select(card, { scroll: false });
  const sign = document.querySelector("[data-sign]");
  if (sign) sign.disabled = document.querySelector("#settle .problems") !== null;
  if (event.target.id === "report-side") arrived();
});
document.body.addEventListener("htmx:responseError", (event) => failure(event.detail.xhr));
document.body.addEventListener("htmx:sendError", () => toast("The page cannot be reached. Your text stays here and is sent when it can."));
document.body.addEventListener("htmx:configRequest", (event) => Object.assign(event.detail.headers, numbered()));
document.body.addEventListener("htmx:beforeRequest", (event) => {
  const searching = event.detail.elt.id === "live" && document.querySelector("#rows[data-search]");
  const field = event.detail.elt.matches("form.text") ? event.detail.elt.querySelector("textarea") : null;
  const saved = field && field.dataset.unsaved === undefined; // leaving a text that is saved saves nothing again
  if (cover?.open || searching || saved || waitsForWords(event.detail.requestConfig.path)) event.preventDefault();
});
document.body.addEventListener("input", (event) => { if (event.target.matches(".sentence textarea")) event.target.dataset.unsaved = Date.now(); });
document.body.addEventListener("htmx:afterRequest", (event) => {
  const field = event.detail.elt.querySelector?.("textarea");
  if (event.detail.successful && field && event.detail.requestConfig.parameters.text === field.value) delete field.dataset.unsaved;
  if (event.detail.elt.id === "live" && event.detail.successful && event.detail.requestConfig.verb === "get" && side()) compare(event.detail.xhr.responseText);
});

// What is decided is what the server has: nobody signs or puts a text away while words on the screen have not reached it.
function waitsForWords(path) {
  if (!/\/(sign|sign-correction|preliminary|reject|leave-correction|start-over)$/.test(path) || !document.querySelector("textarea[data-unsaved]")) return false;
  sendUnsaved();
  document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
  toast("Words that you wrote were not saved yet; they are being saved now. Read the report once more, then decide.");
  return true;
}

// A sentence, or the whole report, is drawn again while words are on their way: they go back into their fields at once,
// where the reader goes on writing, and are sent again.
const carried = [];
document.body.addEventListener("htmx:beforeSwap", (event) => {
  const { target, elt, serverResponse, shouldSwap } = event.detail;
  const drawn = shouldSwap && target.matches("#report-side, article.sentence");
  for (const field of drawn ? unsaved().filter((field) => target.contains(field)) : []) {
    carried.push([field.id, field.value, field.selectionStart, field.selectionEnd]);
  }
  if (target.id === "rows" && elt === live) {
    const next = new DOMParser().parseFromString(serverResponse, "text/html").getElementById("rows");
    if (next?.isEqualNode(target)) event.detail.shouldSwap = false; // a click on a line that was drawn again would be lost
  }
});
document.body.addEventListener("htmx:afterSwap", () => {
  for (const [id, value, start, end] of carried.splice(0)) {
    const field = document.getElementById(id);
    if (!field || field.readOnly || field.value === value) continue;
    field.value = value;
    field.setSelectionRange(start, end);
    field.dataset.unsaved = field.dataset.carried = Date.now();
  }
});
document.body.addEventListener("htmx:afterSettle", () => {
  for (const field of document.querySelectorAll("textarea[data-carried]")) {
    delete field.dataset.carried;
    htmx.trigger(field, "change");
  }
});

function failure(xhr) {
  if (xhr.status === 401) return showCover(xhr.getResponseHeader("X-Session") === "none" ? "Your session ended. Log in again in another window; what was saved is kept." : "");
  const text = new DOMParser().parseFromString(xhr.responseText, "text/html").querySelector("[role=alert]")?.textContent;
  toast(text || "That did not work. Load the page again.");
}

// A change elsewhere is shown at once unless somebody types or a dialog is open; then the page says so and waits.
function compare(text) {
  const next = new DOMParser().parseFromString(text, "text/html").getElementById("report-side");
  const revision = (element) => `${element.dataset.stamp}/${element.querySelector("#copy-revision")?.value}`;
  if (!next || revision(next) === revision(side())) return;
  const busy = typing(document.activeElement) || document.querySelector("dialog[open], [data-unsaved]");
  if (busy) { const stale = document.getElementById("stale"); if (stale) stale.hidden = false; return; }
  refresh();
}

function refresh() {
  htmx.ajax("GET", `/studies/${live.dataset.study}/report`, { target: "#report-side", swap: "outerHTML" });
}

const unsaved = () => [...document.querySelectorAll("textarea[data-unsaved]")];

function sendUnsaved(olderThan = 0) {
  for (const field of unsaved()) if (Date.now() - field.dataset.unsaved >= olderThan) htmx.trigger(field, "change");
}

// Only a page that is seen listens: a browser opens six connections to a host, and the streams of tabs behind it would
// leave none for images. Every stream begins with a word, so that nothing is missed that changed before it.
let stream = null;
function listen() {
  if (document.visibilityState !== "visible") { stream?.close(); stream = null; return; }
  if (cover?.open || (stream && stream.readyState !== EventSource.CLOSED)) return;
  stream = new EventSource(live.dataset.events);
  stream.addEventListener(live.dataset.study ? "study" : "worklist", () => htmx.trigger(live, "mu2:changed"));
}
if (live) {
  document.addEventListener("visibilitychange", listen);
  setInterval(() => { listen(); sendUnsaved(RETRY_SECONDS * 1000); }, RETRY_SECONDS * 1000);
  listen();
}

// The lock: an idle desk is covered, nothing that was typed is lost

let activeAt = Date.now();
let toldAt = 0;
for (const kind of ["pointermove", "pointerdown", "keydown", "wheel"]) {
  document.addEventListener(kind, () => {
    if (cover?.open) return;
    activeAt = Date.now();
    if (csrf && activeAt - toldAt > ACTIVE_SECONDS * 1000) { toldAt = activeAt; post("/active").then(locked); }
  }, { passive: true, capture: true });
}

function locked(response) {
  if (response.status === 401) showCover("");
}

async function lock() {
  if (!csrf) return;
  sendUnsaved();
  await new Promise((done) => setTimeout(done, 150));
  showCover("");
  lockedThere = false;
  await lockThere();
}

let lockedThere = true; // the server knows of the lock; the network may have failed when it was told
async function lockThere() {
  lockedThere = await post("/lock").then((response) => response.status === 204 || response.status === 401, () => false);
}

function showCover(text) {
  if (!cover || cover.open) return;
  document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
  const problem = cover.querySelector(".problem");
  problem.textContent = text;
  problem.hidden = !text;
  document.getElementById("main").inert = true;
  cover.showModal();
}

cover?.addEventListener("cancel", (event) => event.preventDefault());
cover?.querySelector("form").addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.querySelector("[name=password]")) return;
  event.preventDefault();
  const response = await post("/unlock", new URLSearchParams(new FormData(form)));
  form.querySelector("[name=password]").value = "";
  const problem = cover.querySelector(".problem");
  if (response.status !== 204) {
    problem.textContent = (await response.text()) || "Your session ended. Load the page again and log in.";
    problem.hidden = false;
    return;
  }
  uncover();
});

function uncover() {
  cover.querySelector(".problem").hidden = true;
  document.getElementById("main").inert = false;
  cover.close();
  activeAt = Date.now();
  sendUnsaved();
  if (live) listen();
}

// The identity provider opens in a tab of its own, because leaving this page would lose what is not saved.
setInterval(async () => {
  if (!cover?.open || cover.querySelector("[name=password]")) return;
  if (!lockedThere) return lockThere();
  const response = await post("/active").catch(() => null);
  if (response?.status === 204 && cover.open) uncover();
}, 2000);

setInterval(() => { if (csrf && !cover.open && Date.now() - activeAt > idleMinutes * 60000) lock(); }, 1000);

if (live?.dataset.study) {
  const tell = () => { if (!cover.open) post(`/studies/${live.dataset.study}/present`).then(locked).catch(() => {}); };
  setInterval(tell, PRESENT_SECONDS * 1000);
}

// A request of htmx would die with its page.
window.addEventListener("beforeunload", () => {
  for (const field of unsaved()) post(field.form.getAttribute("hx-post"), new URLSearchParams(new FormData(field.form)), true);
});
