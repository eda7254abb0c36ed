/**
 * Files as one archive, uncompressed, as pictures are compressed already: PKWARE's APPNOTE.TXT, sections 4.3 to 4.5.
 */

const UTF8 = 1 << 11; // names are UTF-8
const VERSION = 20;
const DATE = (1 << 5) | 1; // 1 January 1980: no time is worth telling

/**
 * Return the archive.
 * @param {{name: string, content: Blob}[]} files of less than 4 GiB together, each with a name of its own
 */
export async function zip(files) {
  /** @type {(Uint8Array<ArrayBuffer> | Blob)[]} */
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, content } of files) {
    const path = new TextEncoder().encode(name);
    const sum = crc32(new Uint8Array(await content.arrayBuffer()));
    // Version, flags, method 0, time, date, checksum, sizes, lengths of the name and of what else there is.
    /** @type {[number, number][]} value and bytes */
    const about = [
      [VERSION, 2], [UTF8, 2], [0, 2], [0, 2], [DATE, 2], [sum, 4], [content.size, 4], [content.size, 4],
      [path.length, 2], [0, 2],
    ]; // prettier-ignore
    const header = pack([[0x04034b50, 4], ...about]);
    parts.push(header, path, content);
    // Also: version that made it; comment, disk and attributes, none; offset of the header.
    directory.push(pack([[0x02014b50, 4], [VERSION, 2], ...about, [0, 4], [0, 2], [0, 4], [offset, 4]]), path);
    offset += header.length + path.length + content.size;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = [[0x06054b50, 4], [0, 4], [files.length, 2], [files.length, 2], [size, 4], [offset, 4], [0, 2]];
  return new Blob([...parts, ...directory, pack(/** @type {[number, number][]} */ (end))], { type: "application/zip" });
}

/**
 * Return whole numbers one after another, the lowest byte of each first.
 * @param {[number, number][]} numbers value and bytes
 */
function pack(numbers) {
  return Uint8Array.from(
    numbers.flatMap(([value, bytes]) => Array.from({ length: bytes }, (_, index) => (value >>> (8 * index)) & 255)),
  );
}

const TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let sum = ~0;
  for (const byte of bytes) sum = TABLE[(sum ^ byte) & 255] ^ (sum >>> 8);
  return ~sum >>> 0;
}
