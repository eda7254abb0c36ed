/**
 * Copy a text, and tell whether that worked. Otherwise the element that shows it is left selected.
 * @param {string} text
 * @param {Element} element
 */
export async function copyText(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages have no clipboard in most browsers unless they come over https or from this very machine.
    getSelection()?.selectAllChildren(element);
    return document.execCommand("copy");
  }
}
