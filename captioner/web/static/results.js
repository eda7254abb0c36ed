/**
 * The captions of many pictures as one text or table.
 */

/** @typedef {{name: string, text: string}} Result the name of a picture's file, and its caption as a sentence */

/**
 * Return a line for each picture: its name, a tab and its caption.
 * @param {Result[]} results
 */
export function toLines(results) {
  return results.map(({ name, text }) => `${name.replace(/\s/g, " ")}\t${text}\n`).join("");
}

/**
 * Return a table with the columns `image` and `caption` (RFC 4180).
 * @param {Result[]} results
 */
export function toTable(results) {
  const rows = [["image", "caption"], ...results.map(({ name, text }) => [name, text])];
  return rows.map((row) => `${row.map(toCell).join(",")}\r\n`).join("");
}

/**
 * Return a line of JSON for each picture, as `caption --format jsonl` does, with the sentence as `alt`.
 * @param {{name: string, text: string, reply: object}[]} results
 */
export function toJsonLines(results) {
  return results.map(({ name, text, reply }) => `${JSON.stringify({ image: name, alt: text, ...reply })}\n`).join("");
}

/**
 * Return a text as a file. Spreadsheets take a table for UTF-8 if it begins with a byte-order mark.
 * @param {string} type
 * @param {string} text
 */
export function toFile(type, text) {
  return new Blob(["\ufeff", text], { type: `${type};charset=utf-8` });
}

/**
 * Let the browser save a file.
 * @param {string} name
 * @param {Blob} content
 */
export function save(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // when it has been read
}

/**
 * Return the names of files without their suffixes, or with them or a number where they would be the same.
 * @param {string[]} names
 */
export function toStems(names) {
  const taken = new Set();
  return names.map((name) => {
    const whole = name.replaceAll(/[/\\\p{Cc}]/gu, " ");
    const stem = whole.replace(/(.)\.[^.]*$/, "$1");
    let free = [stem, whole].find((name) => !taken.has(name.toLowerCase()));
    for (let number = 2; !free; number++) {
      if (!taken.has(`${stem}-${number}`.toLowerCase())) free = `${stem}-${number}`;
    }
    taken.add(free.toLowerCase());
    return free;
  });
}

/** @param {string} text */
function toCell(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
