/**
 * Captions for the pictures that are chosen, dropped or pasted: a card each, the newest first.
 */

import { Card } from "./card.js";
import { caption, check, Problem } from "./server.js";

const cards = /** @type {HTMLElement} */ (document.getElementById("cards"));
const choose = /** @type {HTMLInputElement} */ (document.getElementById("choose"));
const notice = /** @type {HTMLElement} */ (document.getElementById("notice"));
const said = /** @type {HTMLElement} */ (document.getElementById("said"));

choose.addEventListener("change", () => {
  add(choose.files);
  choose.value = ""; // so that the same file can be chosen again
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
 * Show files above those that are there, and caption them in their order.
 * @param {FileList | null | undefined} files
 * @param {string} [nothing] what to tell if there is none
 */
function add(files, nothing = "") {
  const added = [...(files ?? [])].map((file) => new Card(file, { say, tryAgain: process, removed: moveFocus }));
  notice.textContent = added.length ? "" : nothing;
  cards.prepend(...added.map((card) => card.element));
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
    const checked = check(card.file);
    const replied = inTurn(async () => {
      await checked;
      signal.throwIfAborted();
      card.showProgress("working", "Looking …");
      return caption(card.file, signal, (seconds) =>
        card.showProgress("waiting", `The server is busy. Trying again in ${seconds} s …`),
      );
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
  const mine = last.then(task);
  last = mine.then(
    () => {},
    () => {},
  );
  return mine;
}

/** @param {string} text for people who hear the page */
function say(text) {
  const line = document.createElement("span"); // a new one, or a text that is said twice is read once
  line.textContent = text;
  said.replaceChildren(line);
}

/**
 * Keep the keyboard's place when a card is gone.
 * @param {Element | null} neighbour the card that stood beside it
 */
function moveFocus(neighbour) {
  /** @type {HTMLElement} */ (neighbour?.querySelector(".remove") ?? choose).focus();
}
