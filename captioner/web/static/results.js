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
 * Let the browser save a text as a file.
 * @param {string} name
 * @param {string} type
 * @param {string} text
 */
export function save(name, type, text) {
  const link = document.createElement("a");
  // Spreadsheets take a table for UTF-8 if it begins with a byte-order mark.
  link.href = URL.createObjectURL(new Blob(["\ufeff", text], { type: `${type};charset=utf-8` }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // when it has been read
}

/** @param {string} text */
function toCell(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
