/**
 * Copy a text, and return whether that succeeded. Otherwise the element that shows it is left selected, for copying it
 * by hand.
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
    document.addEventListener(
      "copy",
      (event) => {
        event.preventDefault();
        event.clipboardData?.setData("text/plain", text);
      },
      { once: true },
    );
    return document.execCommand("copy");
  }
}
