/**
 * Captions for the pictures that are chosen, dropped or pasted: a card each, in the order in which they came.
 */

import { Card } from "./card.js";
import { copyText } from "./clipboard.js";
import { toSentence } from "./figures.js";
import { canWriteBeside, chooseFolder, writeBeside } from "./folder.js";
import { Problem } from "./problem.js";
import { save, toFile, toJsonLines, toLines, toStems, toTable } from "./results.js";
import { zip } from "./zip.js";

/**
 * @typedef {object} Options
 * @property {AbortSignal} signal aborted when the caption is no longer needed
 * @property {(seconds: number) => void} tellWait called at each wait for a busy server
 */
/**
 * What captions pictures: a server, or this browser. What its functions throw is a `Problem`.
 * @typedef {object} Captioner
 * @property {(file: File) => Promise<void>} check refuses a file that cannot be captioned, before any work is spent
 * @property {(file: File, options: Options) => Promise<import("./server.js").Reply>} caption
 * @property {() => Promise<File>} getExample gets a picture to try the page with
 */

const MOMENT = 2500; // milliseconds for which a button shows what it did

/** @type {Captioner} */
let captioner;
/** @type {Card[]} in the order of the page */
let cards = [];
const shelf = /** @type {HTMLElement} */ (document.getElementById("cards"));
const together = /** @type {HTMLElement} */ (document.getElementById("together"));
const count = /** @type {HTMLElement} */ (document.getElementById("count"));
const copyAll = /** @type {HTMLButtonElement} */ (document.getElementById("copy-all"));
const saveZip = /** @type {HTMLButtonElement} */ (document.getElementById("save-zip"));
const saveBeside = /** @type {HTMLButtonElement} */ (document.getElementById("save-beside"));
const progress = /** @type {HTMLProgressElement} */ (document.getElementById("progress"));
const folder = /** @type {HTMLButtonElement} */ (document.getElementById("folder"));
const asSentences = /** @type {HTMLInputElement} */ (document.getElementById("as-sentences"));
const example = /** @type {HTMLButtonElement} */ (document.getElementById("example"));
const choose = /** @type {HTMLInputElement} */ (document.getElementById("choose"));
const notice = /** @type {HTMLElement} */ (document.getElementById("notice"));
const said = /** @type {HTMLElement} */ (document.getElementById("said"));

/**
 * Start the page.
 * @param {Captioner} chosen
 */
export function showPage(chosen) {
  captioner = chosen;
}

choose.addEventListener("change", () => {
  add(choose.files);
  choose.value = ""; // so that the same file can be chosen again
});

asSentences.addEventListener("change", () => {
  for (const card of cards) card.updateAlt();
});

copyAll.addEventListener("click", async () => {
  const copied = await copyText(toLines(results()), shelf);
  copyAll.textContent = copied ? "Copied" : "Selected: press Ctrl-C";
  say(copied ? "Copied all captions" : "The captions are selected: press Ctrl-C");
  setTimeout(() => (copyAll.textContent = "Copy all"), MOMENT);
});
document.getElementById("save-text")?.addEventListener("click", () => {
  save("captions.txt", toFile("text/plain", toLines(results())));
});
document.getElementById("save-table")?.addEventListener("click", () => {
  save("captions.csv", toFile("text/csv", toTable(results())));
});
document.getElementById("save-lines")?.addEventListener("click", () => {
  const known = captioned().map((card) => ({ name: card.name, text: card.text, reply: card.reply ?? {} }));
  save("captions.jsonl", new Blob([toJsonLines(known)], { type: "application/jsonl" }));
});
saveBeside.addEventListener("click", () =>
  report(saveBeside, async () => {
    const { written, skipped } = await writeBeside(captioned());
    const others = skipped ? `, ${skipped} skipped: their files are there already, or would be the same` : "";
    notice.textContent = `${written} text files written${others}.`;
  }),
);
saveZip.addEventListener("click", () => report(saveZip, async () => save("captions.zip", await zip(await toFiles()))));
example.addEventListener("click", () =>
  report(example, async () => {
    add([await captioner.getExample()]);
    choose.focus();
  }),
);
folder.addEventListener("click", () =>
  report(folder, async () => {
    const files = await chooseFolder();
    if (files) add(files, "There are no pictures in this folder.");
  }),
);
document.getElementById("remove-all")?.addEventListener("click", () => {
  if (results().length && !confirm("Remove all pictures and their captions from this page?")) return;
  for (const card of cards) card.remove();
  cards = [];
  showCount();
  choose.focus();
});

// A browser asks before it leaves the page, and all captions with it.
addEventListener("beforeunload", (event) => {
  if (cards.some((card) => card.state !== "failed")) event.preventDefault();
});

document.addEventListener("paste", (event) => add(event.clipboardData?.files, "There is no picture to paste."));

document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping"); // it left the window
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  add(event.dataTransfer?.files, "That was no file. Save the picture first, then drop its file here.");
});

/**
 * Do what a button asks for, and say what goes wrong. Meanwhile it cannot be pressed again.
 * @param {HTMLButtonElement} button
 * @param {() => Promise<void>} task
 */
async function report(button, task) {
  button.disabled = true;
  try {
    await task();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    notice.textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

/**
 * Show files below those that are there, and caption them in their order.
 * @param {Iterable<File> | null | undefined} files
 * @param {string} [nothing] message if there is none
 */
function add(files, nothing = "") {
  const added = [...(files ?? [])].map(
    (file) => new Card(file, { say, tryAgain: process, removed: forget, changed: showCount, toText }),
  );
  notice.textContent = added.length ? "" : nothing;
  cards.push(...added);
  shelf.append(...added.map((card) => card.element));
  added[0]?.element.scrollIntoView({ block: "nearest" });
  added.forEach(process);
}

/**
 * Caption a picture, and show on its card how that goes and ends.
 * @param {Card} card
 */
async function process(card) {
  const { signal } = card;
  try {
    card.showProgress("waiting", "Waiting …");
    const checked = captioner.check(card.file);
    const replied = inTurn(async () => {
      await checked;
      signal.throwIfAborted();
      card.showProgress("working", "Looking …");
      return captioner.caption(card.file, {
        signal,
        tellWait: (seconds) => card.showProgress("waiting", `The server is busy. Trying again in ${seconds} s …`),
      });
    });
    await checked;
    card.showPicture();
    card.showReply(await replied);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) throw error;
    card.showProblem(error.message, error.passing);
  }
}

let last = Promise.resolve();

/**
 * Run tasks one after another, whether they succeed or not.
 * @template Result
 * @param {() => Promise<Result>} task
 * @returns {Promise<Result>}
 */
function inTurn(task) {
  const result = last.then(task);
  last = result.then(
    () => {},
    () => {},
  );
  return result;
}

/** @param {string} text for people who hear the page */
function say(text) {
  const line = document.createElement("span"); // a new one, or a text that is said twice is read once
  line.textContent = text;
  said.replaceChildren(line);
}

/** @param {string} caption */
function toText(caption) {
  return asSentences.checked ? toSentence(caption) : caption;
}

/** The cards that have a caption. */
function captioned() {
  return cards.filter((card) => card.state === "captioned");
}

/** The captions that there are. */
function results() {
  return captioned().map((card) => ({ name: card.name, text: card.text }));
}

/** A text file for each caption and, where it can be drawn, the picture lit for each word. */
async function toFiles() {
  const done = captioned();
  const stems = toStems(done.map((card) => card.name));
  /** @type {{name: string, content: Blob}[]} */
  const files = [];
  for (const [index, card] of done.entries()) {
    files.push({ name: `${stems[index]}.txt`, content: new Blob([`${card.text}\n`]) });
    const sheet = await card.drawSheet();
    if (sheet) files.push({ name: `${stems[index]}-words.png`, content: sheet });
  }
  return files;
}

/** Say how many captions there are, and offer what can be done with all of them. */
function showCount() {
  const failed = cards.filter((card) => card.state === "failed").length;
  const done = captioned().length;
  together.hidden = cards.length < 2;
  together.classList.toggle("none", done === 0);
  progress.max = cards.length;
  progress.value = done + failed;
  progress.hidden = done + failed === cards.length;
  saveBeside.hidden = !cards.some((card) => canWriteBeside(card.file));
  count.textContent = `${done} of ${cards.length} captioned` + (failed ? `, ${failed} failed` : "");
}

/**
 * Forget a card that was removed, and keep the keyboard's index.
 * @param {Card} gone
 * @param {Element | null} neighbour the card that stood beside it
 */
function forget(gone, neighbour) {
  cards = cards.filter((card) => card !== gone);
  showCount();
  /** @type {HTMLElement} */ (neighbour?.querySelector(".remove") ?? choose).focus();
}
