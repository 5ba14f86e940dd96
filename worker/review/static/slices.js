// Slices from the server, kept in memory: the wanted one is fetched first, then its neighbours.
//
// A slice is Int16Array(rows * columns) in Hounsfield units; its key is its address below the study's volumes.

const CACHE_BYTES = 512 * 1024 * 1024;
const AT_ONCE = 6; // requests under way; browsers open as many connections to one host
const AHEAD = 400; // slices fetched around the one shown, nearest first
const AGAIN_MS = 3000;

export function ask(address) {
  return fetch(address, { credentials: "same-origin", headers: { "X-Requested-By": "script" } });
}

// `address(key)` is where a slice is; `gone(key)`: the server has it no more; `troubled(key)`: it is tried again;
// `settled(key)`: it came, or will not come now.
export function sliceStore({ address, gone, troubled, settled }) {
  const cache = new Map(); // key → Int16Array, the first that came first
  const running = new Set();
  const failed = new Set();
  let cachedBytes = 0;
  let wish = null; // { index, count, ahead: the direction of scrolling, size: values of a slice, key: of an index }

  function pump() {
    if (!wish) return;
    for (let distance = 0; distance < AHEAD && running.size < AT_ONCE; distance++) {
      const sides = distance === 0 ? [0] : wish.ahead < 0 ? [-distance, distance] : [distance, -distance];
      for (const offset of sides) {
        const index = wish.index + offset;
        if (index < 0 || index >= wish.count || running.size >= AT_ONCE) continue;
        const key = wish.key(index);
        if (!cache.has(key) && !running.has(key) && !failed.has(key)) bring(key, wish.size);
      }
    }
  }

  async function bring(key, size) {
    running.add(key);
    try {
      const response = await ask(address(key));
      if (response.status === 404) { failed.add(key); gone(key); return; }
      if (!response.ok) throw new Error(String(response.status));
      const slice = new Int16Array(await response.arrayBuffer());
      if (slice.length !== size) throw new Error("size");
      remember(key, slice);
    } catch (error) {
      failed.add(key);
      setTimeout(() => { failed.delete(key); pump(); }, AGAIN_MS);
      troubled(key);
    } finally {
      running.delete(key);
      settled(key);
      pump();
    }
  }

  function remember(key, slice) {
    cache.set(key, slice);
    cachedBytes += slice.byteLength;
    for (const [old, values] of cache) {
      if (cachedBytes <= CACHE_BYTES || old === key) break;
      cache.delete(old);
      cachedBytes -= values.byteLength;
    }
  }

  return { get: (key) => cache.get(key), want(next) { wish = next; pump(); } };
}
