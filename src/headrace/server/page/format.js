/** Numbers as a reader wants them. What is not known is a dash. */

export const NONE = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? value.toLocaleString("en-US") : NONE);

/** Tokens per second: one decimal below 100, none above. */
export const rate = (value) => (known(value) ? (value < 99.95 ? value.toFixed(1) : count(Math.round(value))) : NONE);

/** A time of milliseconds to seconds, three digits at least. */
export function seconds(value) {
  if (!known(value)) return NONE;
  if (value < 0.09995) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 9.995 ? 2 : 1)} s`;
}

export const percent = (share) => (known(share) ? `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %` : NONE);

/** How long something has lasted: its two largest units. */
export function duration(value) {
  if (!known(value)) return NONE;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => value >= size);
  if (first < 0) return "0 s";
  let rest = Math.floor(value);
  return units
    .slice(first, first + 2)
    .map(([name, size]) => {
      const whole = Math.floor(rest / size);
      rest -= whole * size;
      return `${whole} ${name}`;
    })
    .join(" ");
}
