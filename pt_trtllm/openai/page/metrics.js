// Prometheus' text form, and what the charts need from it.
const parseMetrics = (text) => {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return samples;
};

/** The sum over all samples of a family with these labels; undefined when there is none. */
const valueOf = (samples, name, labels = {}) => {
  const found = (samples.get(name) ?? []).filter((sample) => Object.entries(labels).every(([key, value]) => sample.labels[key] === value));
  return found.length ? found.reduce((sum, sample) => sum + sample.value, 0) : undefined;
};

const rate = (before, after, seconds, name) => {
  const [from, to] = [before && valueOf(before, name), valueOf(after, name)];
  return from === undefined || to === undefined || to < from ? undefined : (to - from) / seconds;
};

/** The mean of what a histogram took in between two readings; undefined when that is nothing. */
const meanBetween = (before, after, name) => {
  if (!before) return undefined;
  const grown = (part) => valueOf(after, name + part) - valueOf(before, name + part);
  return grown("_count") > 0 ? grown("_sum") / grown("_count") : undefined;
};
