// The mesh at a glance: models, workers, requests and errors, from /health, /metrics and /debug/requests.
const WINDOW_MS = 10000;
const moments = [];

export function startMesh() {
  poll();
}

async function poll() {
  const isShown = !document.getElementById("mesh").hidden && !document.hidden;
  if (isShown) {
    try {
      await look();
    } catch (error) {
      console.warn("the mesh can't be shown:", error);
    }
  }
  setTimeout(poll, isShown ? 1000 : 300);
}

async function look() {
  const [health, metrics, debug] = await Promise.all([
    fetch("/health").then((answer) => answer.json()),
    fetch("/metrics?workers=1").then((answer) => answer.text()),
    fetch("/debug/requests").then((answer) => (answer.ok ? answer.json() : null)),
  ]);
  moments.push({ at: performance.now(), samples: read(metrics), health, debug });
  while (moments.length > 2 && moments[1].at < performance.now() - WINDOW_MS) moments.shift();
  showModels();
  showWorkers();
  showRequests(debug);
}

// Samples of a page in Prometheus' format: {name, labels, value}.
function read(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found || !found[1].startsWith("dynamo_")) continue;
    const labels = {};
    for (const [, key, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
    }
    samples.push({ name: found[1], labels, value: Number(found[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

const matches = (sample, name, labels) =>
  sample.name === name && Object.entries(labels).every(([key, value]) => sample.labels[key] === value);

const total = (moment, name, labels) =>
  moment.samples.filter((sample) => matches(sample, name, labels)).reduce((sum, sample) => sum + sample.value, 0);

function rate(name, labels) {
  const [first, last] = [moments[0], moments.at(-1)];
  if (last.at <= first.at) return 0;
  const [before, now] = [total(first, name, labels), total(last, name, labels)];
  return ((now >= before ? now - before : now) / (last.at - first.at)) * 1000;
}

// A percentile of what a histogram counted in the window, in milliseconds.
function percentile(name, labels, share) {
  const counts = new Map();
  const add = (moment, sign) => {
    for (const sample of moment.samples) {
      if (!matches(sample, `${name}_bucket`, labels)) continue;
      const limit = Number(sample.labels.le.replace("+Inf", "Infinity"));
      counts.set(limit, (counts.get(limit) ?? 0) + sign * sample.value);
    }
  };
  add(moments.at(-1), 1);
  if (moments.length > 1) add(moments[0], -1);
  const limits = [...counts.keys()].sort((a, b) => a - b);
  const wanted = share * (counts.get(limits.at(-1)) ?? 0);
  if (!(wanted > 0)) return null;
  let [low, below] = [0, 0];
  for (const limit of limits) {
    const count = counts.get(limit);
    if (count >= wanted) {
      if (limit === Infinity) return low * 1000;
      return (low + (limit - low) * ((wanted - below) / (count - below || 1))) * 1000;
    }
    [low, below] = [limit, count];
  }
  return low * 1000;
}

const number = (value, digits = 0) => (value === null || Number.isNaN(value) ? "–" : value.toFixed(digits));
const short = (value) => number(value, value < 10 ? 1 : 0);

function showModels() {
  const last = moments.at(-1);
  const names = new Set(last.samples.filter((one) => one.name === "dynamo_frontend_model_workers").map((one) => one.labels.model));
  const gap = "dynamo_frontend_inter_token_latency_seconds";
  const ttft = "dynamo_frontend_time_to_first_token_seconds";
  fill("models", ["Model", "State", "Workers#", "Running#", "Requests/s#", "Errors/s#", "Tokens/s#", "TTFT p50, p99 ms#", "ITL p50, p99 ms#"],
    [...names].sort().map((model) => {
      const of = (name) => total(last, `dynamo_frontend_${name}`, { model });
      const isReady = of("model_ready") > 0;
      return [
        model,
        { text: isReady ? "ready" : "nobody serves it", className: isReady ? "good" : "bad" },
        of("model_workers"),
        of("inflight_requests"),
        short(rate("dynamo_frontend_requests_total", { model })),
        short(rate("dynamo_frontend_requests_total", { model, status: "error" })),
        number(rate("dynamo_frontend_output_tokens_total", { model })),
        `${short(percentile(ttft, { model }, 0.5))}, ${short(percentile(ttft, { model }, 0.99))}`,
        `${short(percentile(gap, { model }, 0.5))}, ${short(percentile(gap, { model }, 0.99))}`,
      ];
    }), "no model is known yet");
}

function showWorkers() {
  const last = moments.at(-1);
  fill("workers", ["Worker", "Model", "Address", "State", "Running#", "Waiting#", "Requests/s#", "Tokens/s#", "KV used#"],
    last.health.instances.map((one) => {
      const worker_id = one.instance_id;
      const of = (name) => total(last, `dynamo_component_${name}`, { worker_id });
      const blocks = of("total_blocks");
      return [
        worker_id,
        one.model,
        one.address,
        { text: one.is_listed ? "serves" : "kept: its lease is gone", className: one.is_listed ? "good" : "bad" },
        of("inflight_requests"),
        of("queued_requests"),
        short(rate("dynamo_component_requests_total", { worker_id })),
        number(rate("dynamo_component_output_tokens_total", { worker_id })),
        blocks ? `${number((of("used_blocks") / blocks) * 100)} %` : "–",
      ];
    }), "no worker answers");
}

function showRequests(debug) {
  if (debug === null) {
    for (const id of ["requests", "errors"]) fill(id, [], [], "this frontend doesn't tell (--disable-admin-api)");
    return;
  }
  fill("requests", ["Request", "Model", "Endpoint", "Phase", "Worker", "Age s#", "Tokens#"],
    debug.requests.slice(0, 50).map((one) => [one.id, one.model, one.endpoint, one.phase, one.instance ?? "–", number(one.age_s, 1), one.tokens]),
    "none");
  fill("errors", ["When", "Model", "Status#", "Error", "Message", "Worker", "Request"],
    debug.errors.slice(0, 20).map((one) => [
      new Date(one.at * 1000).toLocaleTimeString(), one.model, one.status, one.error_type,
      { text: one.message, className: "long" }, one.instance ?? "–", one.id,
    ]), "none");
}

// A table from heads ("#" behind one: numbers) and rows of text or {text, className}.
function fill(id, heads, rows, empty) {
  const table = document.getElementById(id);
  const isNumber = heads.map((head) => head.endsWith("#"));
  const row = (kind, values) => {
    const made = document.createElement("tr");
    values.forEach((value, index) => {
      const cell = document.createElement(kind);
      if (kind === "th") cell.scope = "col";
      cell.textContent = value?.text ?? value;
      cell.className = [value?.className, isNumber[index] && "number"].filter(Boolean).join(" ");
      made.append(cell);
    });
    return made;
  };
  if (!rows.length) {
    const cell = document.createElement("td");
    Object.assign(cell, { textContent: empty, className: "none" });
    const made = document.createElement("tr");
    made.append(cell);
    table.replaceChildren(made);
    return;
  }
  table.replaceChildren(row("th", heads.map((head) => head.replace("#", ""))), ...rows.map((values) => row("td", values)));
}
