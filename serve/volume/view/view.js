"use strict";
const byId = (id) => document.getElementById(id);
const slider = byId("slice"), layer = byId("layer"), threshold = byId("threshold"), opacity = byId("opacity"), canvas = byId("view");
const ARRAYS = { uint8: Uint8Array, float32: Float32Array, uint32: Uint32Array };
const MEMBRANE = [255, 64, 32];
const KEPT = 24;
const planes = new Map();
let about = null, drawn = null, wanted = 0;

// A slice of a layer; those seen last are kept.
function plane(index, page) {
  const key = index + "/" + page;
  let found = planes.get(key);
  if (!found) {
    found = fetch("plane/" + key).then(async (answer) => {
      if (!answer.ok) throw new Error(await answer.text());
      return new ARRAYS[about.layers[index].type](await answer.arrayBuffer());
    });
    found.catch(() => planes.delete(key));
  }
  planes.delete(key);
  planes.set(key, found);
  for (const oldest of planes.keys()) {
    if (planes.size <= KEPT) break;
    planes.delete(oldest);
  }
  return found;
}

// A colour for each number, the same in all slices; neighbouring numbers get colours far apart.
function colourOf(id) {
  const hue = ((id * 0.61803398875) % 1) * 6, part = Math.floor(hue), rest = Math.round(255 * (hue - part));
  return [[255, rest, 0], [255 - rest, 255, 0], [0, 255, rest], [0, 255 - rest, 255], [rest, 0, 255], [255, 0, 255 - rest]][part];
}

// What colour a layer has at a place; null where the image alone is seen.
function overlayOf(index, values) {
  const kind = about.layers[index].kind, cut = Math.fround(Number(threshold.value));
  if (kind === "probability") return (at) => (values[at] > cut ? null : MEMBRANE);
  if (kind === "mask") return (at) => (values[at] > 0 ? null : MEMBRANE);
  const colours = new Map();
  return (at) => {
    const id = values[at];
    if (id === 0) return null;
    if (!colours.has(id)) colours.set(id, colourOf(id));
    return colours.get(id);
  };
}

function paint() {
  if (!drawn) return;
  const { image, over, index } = drawn, context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height), data = picture.data;
  const colourAt = over ? overlayOf(index, over) : () => null, share = Number(opacity.value);
  for (let at = 0, to = 0; at < image.length; at++, to += 4) {
    const grey = image[at], colour = colourAt(at);
    for (let channel = 0; channel < 3; channel++) {
      data[to + channel] = colour ? Math.round(grey + (colour[channel] - grey) * share) : grey;
    }
    data[to + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
  canvas.dataset.slice = drawn.page;
  canvas.dataset.layer = index;
}

function label() {
  const shown = about.layers[Number(layer.value)];
  byId("number").textContent = slider.value + " of 0 to " + slider.max;
  byId("cut").textContent = Number(threshold.value).toFixed(2);
  byId("strength").textContent = Math.round(100 * opacity.value) + " %";
  threshold.disabled = !shown || shown.kind !== "probability";
}

async function show() {
  const page = Number(slider.value), index = Number(layer.value), turn = ++wanted;
  label();
  try {
    const [image, over] = await Promise.all([plane(0, page), index > 0 ? plane(index, page) : null]);
    // A slower answer to an earlier wish is not drawn.
    if (turn !== wanted) return;
    drawn = { image, over, index, page };
    byId("fault").hidden = true;
    paint();
    for (const next of [page + 1, page - 1]) {
      if (next < 0 || next >= about.slices) continue;
      for (const one of index > 0 ? [0, index] : [0]) plane(one, next).catch(() => {});
    }
  } catch (error) {
    if (turn !== wanted) return;
    byId("fault").textContent = "slice " + page + " cannot be shown: " + error.message;
    byId("fault").hidden = false;
  }
}

function go(steps) {
  const before = slider.value;
  slider.value = Number(slider.value) + steps;
  if (slider.value !== before) show();
}

// A bar of a round length, at most a quarter of the picture.
function scaleBar() {
  const bar = byId("bar");
  if (!about.pixel_nm) return;
  const shown = canvas.getBoundingClientRect(), factor = Math.min(shown.width / canvas.width, shown.height / canvas.height);
  const nmOfPixel = (about.pixel_nm * about.step) / factor, most = (canvas.width * factor * nmOfPixel) / 4;
  const power = Math.pow(10, Math.floor(Math.log10(most))), length = power * [5, 2, 1].find((one) => one * power <= most);
  bar.style.width = length / nmOfPixel + "px";
  bar.textContent = length >= 1000 ? length / 1000 + " µm" : length + " nm";
  bar.hidden = false;
}

function readPixel(event) {
  if (!drawn) return;
  const shown = canvas.getBoundingClientRect(), factor = Math.min(shown.width / canvas.width, shown.height / canvas.height);
  const column = Math.floor((event.clientX - shown.left) / factor), row = Math.floor((event.clientY - shown.top) / factor);
  if (row < 0 || column < 0 || row >= canvas.height || column >= canvas.width) return;
  const at = row * canvas.width + column, one = about.layers[drawn.index];
  const value = drawn.over ? ", " + one.kind + " " + (one.kind === "probability" ? drawn.over[at].toFixed(3) : drawn.over[at]) : "";
  byId("pixel").textContent = "row " + row * about.step + ", column " + column * about.step + ": " + drawn.image[at] + value;
}

async function start() {
  about = await (await fetch("about.json")).json();
  document.title = about.layers[0].name;
  byId("title").textContent = about.layers[0].name;
  slider.max = about.slices - 1;
  slider.value = 0;
  about.layers.forEach((one, index) => layer.add(new Option(index ? one.kind + " (" + one.name + ")" : "nothing", index)));
  layer.value = Math.min(1, about.layers.length - 1);
  const cut = about.layers.find((one) => one.threshold !== null);
  threshold.value = cut ? cut.threshold : 0.5;
  canvas.width = Math.ceil(about.width / about.step);
  canvas.height = Math.ceil(about.height / about.step);
  byId("size").textContent = about.slices + " slices of " + about.height + " x " + about.width + (about.step > 1 ? ", every " + about.step + ". pixel shown" : "");
  scaleBar();
  addEventListener("resize", scaleBar);
  slider.addEventListener("input", show);
  layer.addEventListener("change", show);
  threshold.addEventListener("input", () => { label(); paint(); });
  opacity.addEventListener("input", () => { label(); paint(); });
  canvas.addEventListener("pointermove", readPixel);
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); go(Math.sign(event.deltaY)); }, { passive: false });
  addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement) return;
    if (event.key === "ArrowRight" || event.key === "ArrowDown") { event.preventDefault(); go(1); }
    if (event.key === "ArrowLeft" || event.key === "ArrowUp") { event.preventDefault(); go(-1); }
  });
  await show();
}

start().catch((error) => {
  byId("fault").textContent = "the page's server does not answer: " + error.message;
  byId("fault").hidden = false;
});
