/** What is kept beyond a reload; where the browser keeps nothing for a page, until it is closed. */

const here = new Map();

/** @param {"localStorage" | "sessionStorage"} area */
export function recall(area, key) {
  try {
    return window[area].getItem(key);
  } catch {
    return here.get(key) ?? null;
  }
}

export function remember(area, key, value) {
  try {
    window[area].setItem(key, value);
  } catch {
    here.set(key, value);
  }
}
