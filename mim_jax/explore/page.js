// SPDX-License-Identifier: Apache-2.0
// The page keeps all of its state; the server keeps none.
"use strict";

const find = (id) => document.getElementById(id);
const state = {
  about: null,
  image: null, // base64 of a PNG of the runs' size
  picture: null, // the same, decoded
  hidden: new Set(), // numbers of patches
  painted: false, // whether the mask was painted by hand
  seed: 0,
  patch: null, // whose attention is shown; null is the class token
  offered: [],
  first: 0, // of the held-out images that are shown
};

function make(tag, text = "", properties = {}) {
  const one = document.createElement(tag);
  one.textContent = text; // never HTML: names of runs and classes are anybody's
  return Object.assign(one, properties);
}

function tell(text, error = false) {
  find("message").textContent = text;
  find("message").className = error ? "error" : "";
}

async function ask(path, body) {
  const json = !(body instanceof Blob);
  const answer = await fetch(path, body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": json ? "application/json" : "application/octet-stream" },
    body: json ? JSON.stringify(body) : body,
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

// Of a kind of question one is on its way at a time; of those that come meanwhile, the
// last is asked afterwards.
function latest(work) {
  let busy = false, waiting = null;
  return async function run(...given) {
    if (busy) { waiting = given; return; }
    busy = true;
    try { await work(...given); } catch (error) { tell(error.message, true); }
    busy = false;
    if (waiting) { const next = waiting; waiting = null; await run(...next); }
  };
}

const url = (png) => `data:image/png;base64,${png}`;

async function decoded(png) {
  const picture = new Image();
  picture.src = url(png);
  await picture.decode();
  return picture;
}

// Canvases have the pixels of a whole multiple of the image, so that lines are sharp.
function fresh(canvas) {
  const [rows, cols] = state.about.image;
  const scale = Math.max(1, Math.ceil(384 / Math.max(rows, cols)));
  canvas.width = cols * scale;
  canvas.height = rows * scale;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  return [context, scale * state.about.patch];
}

function whole(context, picture) {
  context.drawImage(picture, 0, 0, context.canvas.width, context.canvas.height);
}

function place(patch) {
  return [Math.floor(patch / state.about.cols), patch % state.about.cols];
}

function drawMask() {
  const [context, side] = fresh(find("mask"));
  whole(context, state.picture);
  context.fillStyle = "#808080";
  for (const patch of state.hidden) {
    const [row, col] = place(patch);
    context.fillRect(col * side, row * side, side, side);
  }
  context.strokeStyle = "rgba(59, 111, 182, .45)";
  for (let row = 1; row < state.about.rows; row++) {
    context.strokeRect(-1, row * side, context.canvas.width + 2, 0);
  }
  for (let col = 1; col < state.about.cols; col++) {
    context.strokeRect(col * side, -1, 0, context.canvas.height + 2);
  }
}

function outline(context, side) {
  if (state.patch === null) return;
  const [row, col] = place(state.patch);
  context.strokeStyle = "red";
  context.lineWidth = 3;
  context.strokeRect(col * side, row * side, side, side);
}

function drawOriginal() {
  const [context, side] = fresh(find("original"));
  whole(context, state.picture);
  outline(context, side);
}

const COLOURS = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

function colour(share) {
  const at = Math.min(share, 0.9999) * (COLOURS.length - 1);
  const low = COLOURS[Math.floor(at)], high = COLOURS[Math.floor(at) + 1];
  const mixed = low.map((x, i) => Math.round(x + (high[i] - x) * (at % 1)));
  return `rgba(${mixed.join(",")},.7)`;
}

function drawAttention(canvas, weights) {
  const [context, side] = fresh(canvas);
  context.filter = "grayscale(1)";
  whole(context, state.picture);
  context.filter = "none";
  const most = Math.max(...weights, 1e-9);
  weights.forEach((weight, patch) => {
    const [row, col] = place(patch);
    context.fillStyle = colour(weight / most);
    context.fillRect(col * side, row * side, side, side);
  });
  outline(context, side);
}

// While an answer is on its way, what is shown is of the question before.
function stale(yes) {
  for (const one of document.querySelectorAll(".filled, table")) one.classList.toggle("stale", yes);
}

const fill = latest(async () => {
  const { image, about } = state;
  const asked = { image };
  if (state.painted) {
    asked.hidden = [...state.hidden];
    if (asked.hidden.length === 0 || asked.hidden.length === about.rows * about.cols) {
      tell("Hide at least one patch, and leave at least one visible.", true);
      return;
    }
  } else {
    asked.count = Number(find("count").value);
    asked.unit = Number(find("unit").value);
    asked.seed = state.seed;
  }
  tell("filling in ...");
  stale(true);
  const found = await ask("fill", asked).finally(() => stale(false));
  if (image !== state.image) return; // another one was picked meanwhile
  if (!state.painted) {
    state.hidden = new Set(found.hidden);
    drawMask();
  }
  found.runs.forEach((one, i) => {
    if (!one) return;
    const card = find(`run${i}`);
    card.querySelector(".filled").src = url(one.image);
    const table = card.querySelector("table");
    table.replaceChildren(...one.scores.map((score) => {
      const row = make("tr"), head = make("th", score.title);
      head.append(make("small", `${score.meaning} ${score.better === "higher" ? "Higher" : "Lower"} is better.`));
      const unit = score.unit === "1" ? "" : ` ${score.unit}`;
      const digits = score.unit === "dB" ? score.value?.toFixed(1) : score.value?.toFixed(3);
      row.append(head, make("td", score.value === null ? "∞" : digits + unit));
      return row;
    }));
  });
  told();
  tell(`Filled in: ${found.hidden.length} of ${about.rows * about.cols} patches hidden, in ${found.seconds} s.`);
});

const look = latest(async () => {
  const { image, patch } = state;
  const found = await ask("look", { image, patch });
  if (image !== state.image) return;
  drawOriginal();
  found.runs.forEach((weights, i) => {
    const card = find(`run${i}`);
    drawAttention(card.querySelector(".attention"), weights);
    const sum = weights.reduce((all, x) => all + x, 0);
    const from = patch === null ? "the class token" : `the patch in row ${place(patch)[0] + 1}, column ${place(patch)[1] + 1}`;
    card.querySelector(".looks").textContent =
      `From ${from}, mean over heads: ${(100 * sum).toFixed(0)} % goes to patches, the rest to the class token. ` +
      `The brightest patch gets ${(100 * Math.max(...weights)).toFixed(1)} %.`;
  });
});

const near = latest(async () => {
  const { image } = state;
  const found = await ask("near", { image });
  if (image !== state.image) return;
  found.runs.forEach((ones, i) => {
    find(`run${i}`).querySelector(".near").replaceChildren(...ones.map((one) => {
      const figure = make("figure"), text = `${one.label} ${one.similarity.toFixed(2)}`.trim();
      figure.append(make("img", "", { src: url(one.image), alt: `a near training image, ${text}` }), make("figcaption", text));
      return figure;
    }));
  });
});

async function take(png) {
  state.image = png;
  state.picture = await decoded(png);
  state.patch = null;
  drawMask();
  drawOriginal();
  await Promise.all([fill(), look(), near()]);
}

function told() {
  const { rows, cols, patch } = state.about, size = rows * cols;
  const count = state.painted ? state.hidden.size : Number(find("count").value);
  find("count_said").textContent = `${(100 * count / size).toFixed(0)} %, ${count} of ${size}` + (state.painted ? ", painted" : "");
  const side = Number(find("unit").value) * patch;
  find("unit_said").textContent = `${side} x ${side} pixels`;
}

function random() {
  state.painted = false;
  told();
  fill();
}

function at(event, canvas) {
  const { rows, cols } = state.about, box = canvas.getBoundingClientRect();
  const inside = (x, most) => Math.min(most - 1, Math.max(0, Math.floor(x)));
  const row = inside((event.clientY - box.top - canvas.clientTop) / canvas.clientHeight * rows, rows);
  const col = inside((event.clientX - box.left - canvas.clientLeft) / canvas.clientWidth * cols, cols);
  return row * cols + col;
}

function paint() {
  const canvas = find("mask");
  let hides = null; // what a stroke does; its first patch decides
  const touch = (event) => {
    const patch = at(event, canvas);
    if (hides === state.hidden.has(patch)) return;
    if (hides) state.hidden.add(patch); else state.hidden.delete(patch);
    drawMask();
    told();
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (!state.image || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    state.painted = true;
    hides = !state.hidden.has(at(event, canvas));
    touch(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (hides !== null) touch(event); });
  const end = () => { if (hides !== null) { hides = null; fill(); } };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
}

function offer() {
  const shown = state.offered.slice(state.first, state.first + 12);
  find("held_out").replaceChildren(...shown.map((one, i) => {
    const button = make("button", "", { type: "button" });
    button.append(make("img", "", { src: url(one.image), alt: `held-out image ${state.first + i + 1}` }), one.label);
    button.setAttribute("aria-pressed", String(one.image === state.image));
    button.addEventListener("click", () => pressed(button, one));
    return button;
  }));
}

function pressed(button, one) {
  for (const other of find("held_out").children) other.setAttribute("aria-pressed", String(other === button));
  take(one.image);
}

const upload = latest(async (file) => {
  const most = state.about.upload_bytes;
  if (file.size > most) {
    throw new Error(`${file.name} has ${file.size.toLocaleString("en")} bytes: want at most ${most.toLocaleString("en")}`);
  }
  let found;
  try {
    found = await ask("image", file);
  } catch (error) {
    throw new Error(`${file.name}: ${error.message}`);
  }
  for (const other of find("held_out").children) other.setAttribute("aria-pressed", "false");
  await take(found.image);
});

function cards() {
  find("names").textContent = state.about.runs.map((one) => one.title).join(" and ");
  find("runs").replaceChildren(...state.about.runs.map((one, i) => {
    const card = make("div", "", { className: "run", id: `run${i}` });
    card.append(make("h2", one.title), make("p", one.method, { className: "note" }), make("h3", "Filled in"));
    if (one.fills) {
      const figure = make("figure");
      figure.append(make("img", "", { className: "filled", alt: "hidden patches as the run fills them in" }));
      card.append(figure, make("table"));
    } else {
      card.append(make("p", "This method predicts no pixels."));
    }
    card.append(make("h3", "Where the last block looks"));
    const figure = make("figure");
    figure.append(make("canvas", "", { className: "attention" }));
    card.append(figure, make("p", "", { className: "note looks" }));
    card.append(make("h3", `Nearest of ${one.bank.toLocaleString("en")} training images`), make("div", "", { className: "near" }));
    card.append(make("p", "By the cosine of the features of the whole image: 1 is the same direction.", { className: "note" }));
    return card;
  }));
}

async function begin() {
  const about = state.about = await ask("about"), size = about.rows * about.cols;
  cards();
  Object.assign(find("count"), { min: 1, max: size - 1, step: Math.max(1, Math.floor(size / 64)), value: Math.round(0.75 * size) });
  Object.assign(find("unit"), { max: about.units, value: 1 });
  find("count").addEventListener("input", random);
  find("unit").addEventListener("input", random);
  find("again").addEventListener("click", () => { state.seed += 1; random(); });
  find("class_token").addEventListener("click", () => { state.patch = null; look(); });
  find("others").addEventListener("click", () => {
    state.first = state.first + 12 < state.offered.length ? state.first + 12 : 0;
    offer();
  });
  find("file").addEventListener("change", (event) => {
    if (event.target.files[0]) upload(event.target.files[0]);
    event.target.value = ""; // the same file again is a change, too
  });
  find("original").addEventListener("click", (event) => { state.patch = at(event, find("original")); look(); });
  paint();
  told();
  state.offered = await ask("held_out");
  offer();
  pressed(find("held_out").firstChild, state.offered[0]);
}

begin().catch((error) => tell(error.message, true));
