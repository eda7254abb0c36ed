/**
 * Folders of pictures: what is in them, and captions as text files beside the pictures, where browsers can write.
 */

import { Problem } from "./problem.js";

/** @typedef {{path: string[], root?: any}} Place of a file in a folder; root: a FileSystemDirectoryHandle */

const PICTURES = /^[^.].*\.(jpg|jpeg|jpe|jfif|mpo|png|webp|gif|bmp|tif|tiff|avif)$/i; // SUFFIXES of captioner/images.py

/** @type {WeakMap<File, Place>} */
const places = new WeakMap();

/**
 * Return the name of a file, with its path where it came with a folder.
 * @param {File} file
 */
export function nameOf(file) {
  return places.get(file)?.path.join("/") ?? file.name;
}

/**
 * Ask for a folder, and return the pictures in it and in folders below, by name.
 * @returns {Promise<File[] | undefined>} undefined if the dialog was cancelled
 */
export async function chooseFolder() {
  const files = "showDirectoryPicker" in window ? await pick() : await choose();
  /** @param {File} file */
  const isPicture = (file) => PICTURES.test(file.name) && places.get(file)?.path.every((part) => !part.startsWith("."));
  return files?.filter(isPicture).sort((first, second) => (nameOf(first) < nameOf(second) ? -1 : 1));
}

/** Ask browsers that can write to the folder, if one asks again. */
async function pick() {
  const root = await /** @type {any} */ (window).showDirectoryPicker().catch(() => undefined);
  if (!root) return undefined;
  /** @type {File[]} */
  const files = [];
  /**
   * @param {any} folder
   * @param {string[]} above
   */
  const walk = async (folder, above) => {
    for await (const entry of folder.values()) {
      const path = [...above, entry.name];
      if (entry.kind === "directory") {
        await walk(entry, path);
      } else {
        const file = await entry.getFile();
        places.set(file, { path, root });
        files.push(file);
      }
    }
  };
  await walk(root, []);
  return files;
}

/** @returns {Promise<File[] | undefined>} */
function choose() {
  const input = document.createElement("input");
  input.type = "file";
  input.webkitdirectory = true;
  return new Promise((resolve) => {
    input.addEventListener("cancel", () => resolve(undefined));
    input.addEventListener("change", () => {
      const files = [...(input.files ?? [])];
      for (const file of files) places.set(file, { path: file.webkitRelativePath.split("/").slice(1) });
      resolve(files);
    });
    input.click();
  });
}

/** @param {File} file */
export function canWriteBeside(file) {
  return Boolean(places.get(file)?.root);
}

/**
 * Write each caption into a text file beside its picture, `dog.txt` for `dog.jpg`. Files that are there stay as they
 * are, and pictures that would share a file get none.
 * @param {{file: File, text: string}[]} results
 * @returns {Promise<{written: number, skipped: number}>}
 * @throws {Problem} if the folder cannot be written
 */
export async function writeBeside(results) {
  const count = { written: 0, skipped: 0 };
  const targets = results.flatMap(({ file, text }) => {
    const { path, root } = places.get(file) ?? { path: [] };
    return root ? [{ root, path, text, name: nameOf(file).replace(/\.[^.]*$/, ".txt") }] : [];
  });
  try {
    for (const { root, path, text, name } of targets) {
      if ((await root.requestPermission({ mode: "readwrite" })) !== "granted") {
        throw new Problem("The browser may not write into this folder.", true);
      }
      let folder = root;
      for (const part of path.slice(0, -1)) folder = await folder.getDirectoryHandle(part);
      const own = name.slice(name.lastIndexOf("/") + 1);
      const isShared = targets.filter((other) => other.name === name && other.root === root).length > 1;
      const isThere = await folder.getFileHandle(own).then(() => true, () => false); // prettier-ignore
      if (isShared || isThere) {
        count.skipped++;
        continue;
      }
      const stream = await (await folder.getFileHandle(own, { create: true })).createWritable();
      await stream.write(`${text}\n`);
      await stream.close();
      count.written++;
    }
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw new Problem("The folder cannot be written: it is gone, or protected.", true);
  }
  return count;
}
