/**
 * A caption as words that can be pointed at, tapped, and reached with the keyboard.
 */

import { UNSURE } from "./figures.js";

/** A line of words, which reports the word that is pointed at. */
export class Words {
  #element;
  #lookAt;
  /** @type {HTMLElement | undefined} */
  #pointed;
  /** @type {HTMLElement | undefined} */
  #focused;

  /**
   * @param {HTMLElement} element to hold the words
   * @param {(index: number | undefined) => void} lookAt called with the word that is pointed at, or else with the
   *   one that has the focus
   */
  constructor(element, lookAt) {
    this.#element = element;
    this.#lookAt = lookAt;
    element.addEventListener("pointerover", (event) => {
      if (event.pointerType === "touch") return; // a finger that scrolls points at nothing; a tap gives the focus
      this.#pointed = toWord(event.target) ?? this.#pointed; // between two words the light stays
      this.#update();
    });
    element.addEventListener("pointerleave", () => {
      this.#pointed = undefined;
      this.#update();
    });
    element.addEventListener("focusin", (event) => {
      this.#focused = toWord(event.target);
      this.#update();
    });
    element.addEventListener("focusout", () => {
      this.#focused = undefined;
      this.#update();
    });
    element.addEventListener("click", (event) => toWord(event.target)?.focus()); // as a tap alone does not everywhere
    element.addEventListener("keydown", moveByKeys);
  }

  /**
   * @param {string} sentence
   * @param {string[]} words in the sentence, in their order
   * @param {string} describedBy id of the element that describes the word
   * @param {(number | null)[]} [confidences] of the words, null for those that name nothing; undefined: unknown
   */
  show(sentence, words, describedBy, confidences) {
    /** @type {(string | HTMLElement)[]} */
    const parts = [];
    let end = 0;
    words.forEach((word, index) => {
      const start = sentence.indexOf(word, end);
      const part = document.createElement("span");
      part.className = "word";
      if (confidences) part.classList.add((confidences[index] ?? 1) < UNSURE ? "unsure" : "sure");
      part.tabIndex = 0;
      part.dataset.index = String(index);
      part.setAttribute("aria-describedby", describedBy);
      part.textContent = word;
      parts.push(sentence.slice(end, start), part);
      end = start + word.length;
    });
    this.#element.replaceChildren(...parts, words.length ? sentence.slice(end) : "no words");
    this.#pointed = this.#focused = undefined;
    this.#update();
  }

  #update() {
    const looked = this.#pointed ?? this.#focused;
    for (const word of this.#element.children) word.classList.toggle("lit", word === looked);
    this.#lookAt(looked && Number(looked.dataset.index));
  }
}

/**
 * Arrows, Home and End go from word to word.
 * @param {KeyboardEvent} event
 */
function moveByKeys(event) {
  const word = toWord(event.target);
  if (!word || event.altKey || event.ctrlKey || event.metaKey) return;
  const line = word.parentElement;
  const next = {
    ArrowLeft: word.previousElementSibling,
    ArrowRight: word.nextElementSibling,
    Home: line?.firstElementChild,
    End: line?.lastElementChild,
  }[event.key];
  if (!next) return;
  event.preventDefault();
  toWord(next)?.focus();
}

/**
 * @param {EventTarget | null} target
 * @returns {HTMLElement | undefined}
 */
function toWord(target) {
  return target instanceof HTMLElement && target.matches(".word") ? target : undefined;
}
