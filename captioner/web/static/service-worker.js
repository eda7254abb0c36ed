/**
 * Keeps the files of the site, so that it works offline after the first visit, and adds the headers by which browsers
 * let a page compute in several threads (cross-origin isolation), as many hosts cannot send them.
 *
 * `caption-web --static` writes a line above this: FILES, the size and a checksum of each file by its path.
 */

const HEADERS = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
const SMALL = 1 << 20; // files that are kept before they are asked for: all but the model and what runs it

const scope = new URL(self.registration.scope);

self.addEventListener("install", (event) => {
  self.skipWaiting();
  const small = Object.keys(FILES).filter((path) => FILES[path].bytes <= SMALL);
  event.waitUntil(Promise.all(small.map((path) => answer(path, event))));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(Promise.all([forgetOthers(), self.clients.claim()]));
});

self.addEventListener("fetch", (event) => {
  const { pathname, origin } = new URL(event.request.url);
  if (event.request.method !== "GET" || origin !== scope.origin) return;
  const path = pathname.slice(scope.pathname.length) || "index.html";
  if (Object.hasOwn(FILES, path)) event.respondWith(answer(path, event));
});

/**
 * Return a file of the site, and keep it.
 * @param {string} path
 * @param {ExtendableEvent} event that asks for it
 */
async function answer(path, event) {
  const cache = await caches.open(scope.href);
  const kept = await cache.match(key(path));
  if (kept) return kept;
  const fetched = await fetch(new URL(path, scope), { cache: "no-cache" }); // not one of a former version
  if (!fetched.ok) return fetched;
  const response = new Response(fetched.body, {
    headers: {
      ...HEADERS,
      "Content-Type": fetched.headers.get("Content-Type") ?? "",
      "Content-Length": FILES[path].bytes,
    },
  });
  event.waitUntil(cache.put(key(path), response.clone()).catch(() => {})); // there may be no room
  return response;
}

/** Delete cached files of earlier versions. */
async function forgetOthers() {
  const cache = await caches.open(scope.href);
  const keys = new Set(Object.keys(FILES).map(key));
  for (const { url } of await cache.keys()) if (!keys.has(url)) await cache.delete(url);
}

/** @param {string} path */
function key(path) {
  return new URL(`${path}?${FILES[path].checksum}`, scope).href;
}
