// The playground: one conversation, streamed.
const by = (id) => document.getElementById(id);
const turns = []; // as they are sent: {role, content}
let running = null; // the AbortController of the answer that comes
let conversation = 0; // which one it is: what comes late is for nobody
let offered = "";

export async function showModels() {
  const models = (await (await fetch("/v1/models")).json()).data.map((model) => model.id).sort();
  if (models.join("\n") === offered) return;
  offered = models.join("\n");
  const select = by("model");
  const chosen = select.value;
  select.replaceChildren(...models.map((name) => new Option(name, name, false, name === chosen)));
}

export function startChat() {
  by("more_options").open = innerWidth > 736;
  by("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = by("text").value.trim();
    if (!text || running) return;
    by("text").value = "";
    turns.push({ role: "user", content: text });
    addTurn("user", "you").said.textContent = text;
    answer();
  });
  by("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      by("composer").requestSubmit();
    }
  });
  addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  by("halt").addEventListener("click", () => running?.abort());
  by("again").addEventListener("click", again);
  by("clear").addEventListener("click", clear);
}

function clear() {
  running?.abort();
  conversation += 1;
  turns.length = 0;
  by("turns").replaceChildren();
  by("again").disabled = true;
  by("text").focus();
}

function again() {
  if (running) return;
  if (turns.at(-1)?.role === "assistant") turns.pop();
  if (!turns.length) return;
  by("turns").lastElementChild.remove();
  answer();
}

function addTurn(role, who) {
  const turn = element("div", { className: `turn ${role}` });
  const said = element("div", { className: "said" });
  turn.append(element("div", { className: "who", textContent: who }), said);
  by("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, said };
}

function element(kind, values) {
  return Object.assign(document.createElement(kind), values);
}

// What the options say; empty ones are the model's own.
function body() {
  const system = by("system").value.trim();
  const asked = {
    model: by("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (by(name).value !== "") asked[name] = Number(by(name).value);
  }
  if (by("stop").value) asked.stop = [by("stop").value];
  const more = by("more").value.trim();
  return more ? Object.assign(asked, JSON.parse(more)) : asked;
}

async function answer() {
  const shown = addTurn("assistant", by("model").value);
  const parts = new Parts(shown);
  const started = performance.now();
  let first = null;
  let last = started;
  let asked = {};
  const mine = conversation;
  running = new AbortController();
  setBusy(true);
  try {
    asked = body();
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    parts.requestId = response.headers.get("x-request-id");
    if (!response.ok) throw new Error(told((await response.json()).error));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(told(event.error));
      parts.take(event);
      if (event.choices?.length && parts.hasSome) {
        last = performance.now();
        first ??= last;
      }
    }
  } catch (error) {
    parts.fail(error.name === "AbortError" ? "stopped" : error.message, error.name === "AbortError");
  }
  parts.end(asked, first === null ? null : first - started, first === null ? 0 : last - first);
  if (mine === conversation && (parts.content || parts.finish !== "error")) {
    turns.push({ role: "assistant", content: parts.content });
  }
  running = null;
  setBusy(false);
}

function setBusy(isBusy) {
  by("send").disabled = isBusy;
  by("halt").disabled = !isBusy;
  by("again").disabled = isBusy || !turns.length;
  by("turns").setAttribute("aria-busy", String(isBusy));
}

const told = (error) => `${error.message} (${error.code || error.type}${error.request_id ? `, request ${error.request_id}` : ""})`;

// The JSON of each event of a stream.
async function* events(stream) {
  let held = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    held += text;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// What an answer says so far, and its place on the page.
class Parts {
  constructor({ turn, said }) {
    this.turn = turn;
    this.said = said;
    this.content = "";
    this.calls = [];
    this.events = [];
    this.usage = null;
    this.finish = null;
    this.hasSome = false;
    this.fresh = "";
    this.freshThought = "";
    this.frame = 0;
    this.made = element("div"); // the calls, in order
    said.after(this.made);
  }

  take(event) {
    this.events.push(event);
    this.usage = event.usage ?? this.usage;
    for (const choice of event.choices ?? []) {
      if (choice.index) continue; // one conversation goes on with one answer
      const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
      if (content) {
        this.content += content;
        this.fresh += content;
      }
      if (thought) this.think(thought);
      for (const call of calls ?? []) this.call(call);
      this.hasSome ||= Boolean(content || thought || calls);
      this.finish = choice.finish_reason ?? this.finish;
    }
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  // Once for each picture that the screen shows: layout costs more than tokens do.
  show() {
    this.frame = 0;
    const low = innerHeight + scrollY >= document.body.scrollHeight - 80;
    if (this.fresh) this.said.append(this.fresh);
    if (this.freshThought) this.thought.append(this.freshThought);
    this.fresh = this.freshThought = "";
    if (low) this.turn.scrollIntoView({ block: "end" });
  }

  think(text) {
    if (!this.thought) {
      const details = element("details", { open: true });
      details.append(element("summary", { textContent: "Reasoning" }));
      this.thought = element("span");
      details.append(this.thought);
      this.said.before(details);
    }
    this.freshThought += text;
  }

  call(delta) {
    const place = (this.calls[delta.index] ??= element("div", { className: "call" }));
    if (delta.function?.name) {
      place.textContent = `${delta.function.name} `;
      this.made.append(place);
    }
    place.append(delta.function?.arguments ?? "");
  }

  fail(text, isPlain) {
    this.finish = isPlain ? text : "error";
    if (!isPlain) this.turn.append(element("div", { className: "error", textContent: text, role: "alert" }));
  }

  end(asked, ttft, took) {
    cancelAnimationFrame(this.frame);
    this.show();
    const figures = element("div", { className: "figures" });
    const count = this.usage?.completion_tokens;
    const told = [this.finish];
    if (this.usage) told.push(`${this.usage.prompt_tokens} + ${count} tokens`);
    if (ttft !== null) told.push(`first token ${ttft.toFixed(ttft < 10 ? 1 : 0)} ms`);
    if (count > 1 && took > 0) told.push(`${(((count - 1) / took) * 1000).toFixed(0)} tokens/s`);
    for (const text of told) if (text) figures.append(element("span", { textContent: text }));
    const raw = element("button", { type: "button", textContent: "Raw" });
    raw.setAttribute("aria-expanded", "false");
    raw.addEventListener("click", () => this.toggleRaw(raw, asked));
    figures.append(raw);
    this.turn.append(figures);
  }

  toggleRaw(button, asked) {
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) {
      this.raw.remove();
      return;
    }
    this.raw = element("div");
    const answer = this.events.map((event) => JSON.stringify(event)).join("\n");
    for (const [name, text] of [["request", JSON.stringify(asked, null, 2)], ["response", answer]]) {
      const copy = element("button", { type: "button", textContent: `Copy ${name}` });
      copy.addEventListener("click", () => copyText(text, copy));
      const block = element("pre", { className: "raw", textContent: text, tabIndex: 0 });
      block.setAttribute("aria-label", name);
      this.raw.append(copy, block);
    }
    if (this.requestId) this.raw.append(element("div", { className: "who", textContent: `x-request-id ${this.requestId}` }));
    this.turn.append(this.raw);
  }
}

async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it by hand"; // no secure context
  }
  setTimeout(() => (button.textContent = before), 1500);
}
