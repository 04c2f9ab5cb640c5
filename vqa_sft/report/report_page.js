"use strict";
// Filters the rows of the page. What is chosen stands in the address, so that a view can be kept and sent:
// #list=errors&type=colour&result=wrong&search=cat; of a second input #result2=correct
const find = (id) => document.getElementById(id);
const fields = Array.from(document.querySelectorAll(".filters select, .filters input"));
const results = fields.filter((field) => field.dataset.place);  // of each input
const wall = find("wall");
const plain = (text) => text.normalize("NFC").toLowerCase().replace(/\s+/g, " ").trim();
const cards = Array.from(wall.children, (card) => ({
  card,
  id: card.dataset.id,
  results: card.dataset.results.split(" "),
  ranks: new Map(card.dataset.lists.split(" ").filter(Boolean).map((entry) => {
    const [key, rank] = entry.split(":");
    return [key, Number(rank)];
  })),
  text: plain([card.dataset.id, ...Array.from(card.querySelectorAll(".question, .context, .words"), (e) => e.textContent)].join(" ")),
}));
let shown = [];

function value(name) {
  const field = find(name);
  return field ? field.value : "";
}

function show() {
  const list = value("list") === "all" ? "" : value("list"), words = plain(value("search")).split(" ");
  shown = cards.filter(({ card, ranks, results: own, text }) =>
    (!list || ranks.has(list)) &&
    (!value("type") || card.dataset.type === value("type")) &&
    results.every((field) => !field.value || own[field.dataset.place] === field.value) &&
    words.every((word) => text.includes(word)));
  const place = (one) => (list ? one.ranks.get(list) : Number(one.card.dataset.number));
  shown.sort((one, other) => place(one) - place(other));
  const visible = new Set(shown);
  for (const one of cards) one.card.hidden = !visible.has(one);
  wall.append(...shown.map((one) => one.card));
  say(shown.length === 1 ? "1 row shown" : `${shown.length.toLocaleString("en")} rows shown`);
}

function say(text) {
  find("count").textContent = text;
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const field of fields) {
    field.value = given.get(field.id) || "";
    if (field.tagName === "SELECT" && field.selectedIndex < 0) field.selectedIndex = 0;
  }
  // Whoever opens the page sees its first list.
  if (!given.size && find("list").length > 1) find("list").selectedIndex = 1;
  show();
}

function writeAddress() {
  const chosen = new URLSearchParams(fields.filter((field) => field.value).map((field) => [field.id, field.value]));
  history.replaceState(null, "", `#${chosen}`);
  show();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // pages opened from a disk may not, in some browsers
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`${what} of ${shown.length.toLocaleString("en")} rows copied`);
}

const ids = () => shown.map((one) => `${one.id}\n`).join("");
// As a recipe takes it; JSON is YAML.
const keepRows = (column) => `keep_rows: ${JSON.stringify({ [column]: shown.map((one) => one.id) })}\n`;

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([ids()], { type: "text/plain" }));
  link.download = "ids.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

for (const field of fields) field.addEventListener("input", writeAddress);
find("copy").addEventListener("click", () => copy(ids(), "Ids"));
find("download").addEventListener("click", download);
find("keep")?.addEventListener("click", (event) => copy(keepRows(event.target.dataset.column), "keep_rows"));
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("hashchange", readAddress);
readAddress();
