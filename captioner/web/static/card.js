/**
 * A picture on the page with its caption, whose words light the picture where the network looked.
 */

import { copyText } from "./clipboard.js";
import { describeTrust, describeWord, toDistinct, toSentence } from "./figures.js";
import { nameOf } from "./folder.js";
import { Light } from "./light.js";
import { save, toStems } from "./results.js";
import { drawSheet } from "./sheet.js";
import { Words } from "./words.js";

/** @typedef {import("./server.js").Sentence} Sentence */
/** @typedef {import("./server.js").Reply} Reply */
/** @typedef {"waiting" | "working" | "failed" | "captioned"} State */

const MOMENT = 2500; // milliseconds for which a button shows what it did

let made = 0;

/** One picture, and how far its caption has come. */
export class Card {
  #file;
  #say;
  #changed;
  #toText;
  #light;
  #words;
  #number = ++made;
  #leaving = new AbortController();
  #address = "";
  /** @type {State} */
  #state = "waiting";
  /** @type {Sentence | undefined} the caption that is shown */
  #sentence;
  /** @type {Reply | undefined} */
  #reply;

  /**
   * @param {File} file
   * @param {object} owner
   * @param {(text: string) => void} owner.say tells people who hear the page
   * @param {(card: Card) => void} owner.tryAgain
   * @param {(card: Card, neighbour: Element | null) => void} owner.removed is called when the card is gone
   * @param {() => void} owner.changed is called when `state` has changed
   * @param {(caption: string) => string} owner.toText writes a caption as it is copied and saved
   */
  constructor(file, { say, tryAgain, removed, changed, toText }) {
    this.#file = file;
    this.#say = say;
    this.#changed = changed;
    this.#toText = toText;
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("card"));
    this.element = /** @type {HTMLElement} */ (template.content.firstElementChild?.cloneNode(true));
    const heading = this.#part("h2");
    heading.textContent = heading.title = this.name;
    heading.id = `name-${this.#number}`;
    this.element.setAttribute("aria-labelledby", heading.id);
    this.#part(".figures").id = `figures-${this.#number}`;
    this.#light = new Light(this.#part("canvas"));
    this.#words = new Words(this.#part(".caption"), (index) => this.#lookAt(index));
    this.#part(".edited").setAttribute("aria-label", `Alt text of ${this.name}`);
    this.#part(".edited").addEventListener("input", () => this.updateAlt());
    this.#part(".copy").addEventListener("click", () => this.#copy());
    this.#part(".edit").addEventListener("click", () => this.#edit(this.#part(".edited").hidden));
    this.#part(".save").addEventListener("click", () => this.#save());
    this.#part(".again").addEventListener("click", () => tryAgain(this));
    this.#part(".remove").addEventListener("click", () => removed(this, this.remove()));
  }

  /** The picture's file. */
  get file() {
    return this.#file;
  }

  /** The name of the file, with its path in the folder that was chosen. */
  get name() {
    return nameOf(this.#file);
  }

  /** All that is known of the picture; nothing while it has no caption. */
  get reply() {
    return this.#reply;
  }

  /** How far the caption has come. */
  get state() {
    return this.#state;
  }

  /** The caption as it is copied and saved, or as somebody edited it; empty while there is none. */
  get text() {
    const field = this.#part(".edited");
    return field.hidden ? this.#toText(this.#sentence?.caption ?? "") : field.value.trim().replaceAll(/\s+/g, " ");
  }

  /** Is aborted when the card is removed. */
  get signal() {
    return this.#leaving.signal;
  }

  /** Show the picture, or where this browser cannot, say so. */
  showPicture() {
    if (this.#address) return;
    const image = this.#part("img");
    image.addEventListener("load", () => {
      if (!this.#sentence) this.#shape(image.naturalWidth, image.naturalHeight); // the server knows better
    });
    image.addEventListener("error", () => {
      image.hidden = this.#part(".save").hidden = true;
      this.#part(".stand-in").hidden = false;
    });
    this.#address = image.src = URL.createObjectURL(this.#file);
    this.#part(".frame").hidden = false;
  }

  /**
   * Show the progress of the caption.
   * @param {"waiting" | "working"} state
   * @param {string} text
   */
  showProgress(state, text) {
    this.#enter(state, text);
  }

  /**
   * Show an error.
   * @param {string} text
   * @param {boolean} passing whether to offer a retry
   */
  showProblem(text, passing) {
    this.#enter("failed", text);
    this.#part(".again").hidden = !passing;
    this.#part(".frame").hidden = !this.#address;
    this.#say(`${this.name}: ${text}`);
  }

  /**
   * Show the caption, and offer the others.
   * @param {Reply} reply
   */
  showReply(reply) {
    const sentences = toDistinct([reply, ...(reply.candidates ?? [])]);
    this.#reply = reply;
    this.#enter("captioned", "");
    this.#shape(reply.width, reply.height);
    this.#part("fieldset").append(...sentences.map((sentence) => this.#toChoice(sentence)));
    this.#part("fieldset input").checked = true;
    this.#part(".candidates").hidden = sentences.length < 2;
    for (const part of [".caption", ".hint", ".copy", ".edit"]) this.#part(part).hidden = false;
    this.#showSentence(reply);
  }

  /**
   * Draw the picture once for each word, lit; nothing where there are no words or this browser cannot show it.
   * @returns {Promise<Blob | undefined>}
   */
  async drawSheet() {
    if (!this.#sentence?.words.length) return undefined;
    const image = new Image(); // that of the card is not loaded while it is far from the window
    image.src = this.#address;
    try {
      await image.decode();
    } catch {
      return undefined;
    }
    return drawSheet(image, this.#sentence);
  }

  /**
   * @param {State} state
   * @param {string} text
   */
  #enter(state, text) {
    this.#state = this.element.dataset.state = state;
    this.element.ariaBusy = String(state === "waiting" || state === "working");
    this.#part(".state").textContent = text;
    this.#part(".again").hidden = true;
    this.#changed();
  }

  /**
   * @param {number} width
   * @param {number} height
   */
  #shape(width, height) {
    this.element.style.setProperty("--ratio", String(width / height));
    this.#light.fit(width, height);
  }

  /** @param {Sentence} sentence */
  #showSentence(sentence) {
    this.#sentence = sentence;
    this.#words.show(sentence.caption, sentence.words, this.#part(".figures").id, sentence.word_confidences);
    const trust = describeTrust(sentence);
    this.#part(".trust").textContent = trust && `${toSentence(trust)} `;
    this.#edit(false);
    this.#part(".save").hidden = !sentence.words.length || this.#part("img").hidden;
    this.#say(`${this.name}: ${sentence.caption || "no words"}${trust && `, ${trust}`}`);
  }

  /** @param {Sentence} sentence */
  #toChoice(sentence) {
    const choice = document.createElement("label");
    const input = document.createElement("input");
    const text = document.createElement("span");
    choice.className = "candidate";
    input.type = "radio";
    input.name = `candidates-${this.#number}`;
    input.addEventListener("change", () => this.#showSentence(sentence));
    text.className = "text";
    text.textContent = sentence.caption || "no words";
    choice.append(input, text);
    return choice;
  }

  /** @param {number | undefined} index of a word; undefined: show the picture without light */
  #lookAt(index) {
    const sentence = index === undefined ? undefined : this.#sentence;
    this.element.classList.toggle("told", sentence !== undefined);
    if (sentence && index !== undefined) {
      this.#part(".figures").textContent = describeWord(sentence, index);
      this.#light.show(sentence.attention[index], sentence.rectangle);
    } else {
      this.#light.hide();
    }
  }

  /** @param {boolean} start to edit the sentence, or else go back to it as it came */
  #edit(start) {
    const field = this.#part(".edited");
    const button = this.#part(".edit");
    if (start) field.value = this.text;
    field.hidden = !start;
    button.textContent = start ? "Undo edits" : "Edit";
    if (start) field.focus();
    this.updateAlt();
  }

  /** Update the alternative text of the picture, which screen readers read. */
  updateAlt() {
    this.#part("img").alt = this.text;
  }

  async #save() {
    const image = await this.drawSheet();
    if (image) save(`${toStems([this.name])[0]}-words.png`, image);
  }

  async #copy() {
    const text = this.text;
    const field = this.#part(".edited");
    const copied = await copyText(text, field.hidden ? this.#part(".caption") : field);
    const button = this.#part(".copy");
    button.textContent = copied ? "Copied" : "Selected: press Ctrl-C";
    this.#say(copied ? `Copied: ${text}` : "The caption is selected: press Ctrl-C");
    setTimeout(() => (button.textContent = "Copy"), MOMENT);
  }

  /** Take the card off the page, end what is under way for it, and return the card that stood beside it. */
  remove() {
    const neighbour = this.element.nextElementSibling ?? this.element.previousElementSibling;
    this.#leaving.abort();
    this.element.remove();
    URL.revokeObjectURL(this.#address);
    return neighbour;
  }

  /**
   * @param {string} selector of what the template holds
   * @returns {any}
   */
  #part(selector) {
    return this.element.querySelector(selector);
  }
}
