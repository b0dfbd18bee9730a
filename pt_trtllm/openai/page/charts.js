// Live charts of the server's metrics, one reading a second while the page is visible.
const KEPT = 90, PERIOD_MS = 1000, WIDTH = 300, HEIGHT = 48;
const SVG = "http://www.w3.org/2000/svg";

const readable = (value, unit) => {
  if (value === undefined) return "–";
  const digits = Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return value.toFixed(digits) + (unit ? " " + unit : "");
};

const CHARTS = [
  {
    title: "Tokens per second", unit: "",
    series: [{ name: "generated", of: (now, then, s) => rate(then, now, s, "pt_openai_generation_tokens_total") }],
  },
  {
    title: "Requests", unit: "",
    series: [
      { name: "running", of: (now) => valueOf(now, "nv_trt_llm_request_metrics", { request_type: "active" }) ?? valueOf(now, "pt_openai_requests_in_flight") },
      { name: "waiting", of: (now) => valueOf(now, "nv_trt_llm_request_metrics", { request_type: "waiting" }) },
    ],
  },
  {
    title: "KV cache blocks", unit: "",
    series: [
      { name: "used", of: (now) => valueOf(now, "nv_trt_llm_kv_cache_block_metrics", { kv_cache_block_type: "used" }) },
    ],
    note: (now) => {
      const kind = (name) => valueOf(now, "nv_trt_llm_kv_cache_block_metrics", { kv_cache_block_type: name });
      return kind("max") === undefined ? "" : `of ${kind("max")} in use, ${kind("reused") ?? 0} reused so far`;
    },
  },
  {
    title: "Time to first token", unit: "ms", holds: true,
    series: [{ name: "mean", of: (now, then) => 1000 * meanBetween(then, now, "pt_openai_time_to_first_token_seconds") }],
  },
  {
    title: "Time per output token", unit: "ms", holds: true,
    series: [{ name: "mean", of: (now, then) => 1000 * meanBetween(then, now, "pt_openai_time_per_output_token_seconds") }],
  },
];

const shape = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.values = spec.series.map(() => []);
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.now = element("div", { className: "now" });
    this.most = element("span");
    this.root = element("section", { className: "chart" }, element("h3", { textContent: spec.title }), this.now, this.svg,
      element("div", { className: "scale" }, element("span", { textContent: `${(KEPT * PERIOD_MS) / 1000} s ago` }), this.most));
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      this.pointed = Math.round(((event.clientX - box.left) / box.width) * (KEPT - 1));
      this.draw();
    });
    this.svg.addEventListener("pointerleave", () => { this.pointed = undefined; this.draw(); });
    this.draw();
  }

  add(now, before, seconds) {
    this.spec.series.forEach((series, index) => {
      const value = series.of(now, before, seconds);
      const values = this.values[index];
      // Latencies have a value only when a request ended: the line keeps the last one until then.
      values.push(Number.isFinite(value) ? value : this.spec.holds ? values.at(-1) : undefined);
      if (values.length > KEPT) values.shift();
    });
    this.note = this.spec.note?.(now) ?? "";
    this.draw();
  }

  draw() {
    const known = this.values.flat().filter((value) => value !== undefined);
    const most = Math.max(0, ...known), top = most * 1.1 || 1;
    const x = (index, values) => ((index + KEPT - values.length) / (KEPT - 1)) * WIDTH;
    const y = (value) => HEIGHT - (value / top) * HEIGHT;
    this.svg.replaceChildren(shape("line", { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }));
    this.values.forEach((values, series) => {
      const points = values.map((value, index) => (value === undefined ? null : `${x(index, values).toFixed(1)} ${y(value).toFixed(1)}`));
      const path = points.map((point, index) => (point === null ? "" : (points[index - 1] ? "L" : "M") + point)).join("");
      if (!path) return;
      const first = points.findIndex(Boolean);
      if (series === 0 && points.slice(first).every(Boolean)) {
        const from = x(first, values).toFixed(1), to = x(values.length - 1, values).toFixed(1);
        this.svg.append(shape("path", { class: "fill", d: `${path}L${to} ${HEIGHT}L${from} ${HEIGHT}Z` }));
      }
      this.svg.append(shape("path", { class: "ab"[series], d: path }));
    });
    this.legend(known.length ? most : undefined);
  }

  legend(most) {
    const { spec, values, pointed } = this;
    const at = (own) => (pointed === undefined ? own.at(-1) : own[pointed - KEPT + own.length]);
    if (pointed !== undefined) {
      const line = (pointed / (KEPT - 1)) * WIDTH;
      this.svg.append(shape("line", { class: "cursor", x1: line, x2: line, y1: 0, y2: HEIGHT }));
    }
    const rows = spec.series.map((series, index) => [series.name, readable(at(values[index]), spec.unit)]);
    const many = rows.length > 1;
    this.now.replaceChildren(...rows.flatMap(([name, value], index) => [
      element("span", {}, element("b", { textContent: value }), " ",
        element("small", { className: many ? `key ${"ab"[index]}` : "", textContent: many ? name : "" })),
    ]), element("small", { textContent: this.note ?? "" }));
    this.most.textContent = most === undefined ? "no data yet" : `highest ${readable(most, spec.unit)}`;
    this.svg.setAttribute("aria-label", `${spec.title}: ${rows.map(([name, value]) => `${name} ${value}`).join(", ")}`);
  }
}

const startCharts = (place, onState) => {
  const charts = CHARTS.map((spec) => new Chart(spec));
  place.append(...charts.map((chart) => chart.root));
  let before, at;
  const read = async () => {
    if (document.hidden) return;
    try {
      const [metrics, health] = await Promise.all([askServer("metrics"), fetch("health")]);
      onState(health.ok ? "ready" : "down", health.ok ? "ready" : "model not ready");
      if (!metrics.ok) return;
      const now = parseMetrics(await metrics.text()), time = performance.now();
      for (const chart of charts) chart.add(now, before, (time - at) / 1000);
      [before, at] = [now, time];
    } catch {
      onState("down", "server gone");
    }
  };
  const loop = async () => { await read(); setTimeout(loop, PERIOD_MS); };
  loop();
};
