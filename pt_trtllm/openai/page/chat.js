// The conversation: asks this server's OpenAI endpoints, shows tokens as they come, and can stop.
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty", "frequency_penalty"];
const EXAMPLES = {
  chat: ["What do you think of marriage?", "Describe a country ball."],
  continue: ["It is a truth", "She had never been", "The evening was"],
};
let history = [], running = null, modelName = "";

const mode = () => new FormData(by("composer")).get("mode");

const sampling = () => {
  const options = {};
  for (const name of FIELDS) if (by(name).value !== "") options[name] = Number(by(name).value);
  if (by("stop_text").value) options.stop = [by("stop_text").value];
  return options;
};

const requestFor = (kind, text) => {
  const common = { model: modelName, ...sampling(), stream: true, stream_options: { include_usage: true } };
  const shaded = by("show_probabilities").checked;
  if (kind === "continue") return ["v1/completions", { ...common, prompt: text, ...(shaded && { logprobs: 0 }) }];
  const system = by("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, { role: "user", content: text }];
  return ["v1/chat/completions", { ...common, messages, ...(shaded && { logprobs: true }) }];
};

/** Yields the JSON of every event of a stream. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const tokensOf = (logprobs) =>
  logprobs?.content?.map((entry) => [entry.token, entry.logprob]) ??
  logprobs?.tokens?.map((token, index) => [token, logprobs.token_logprobs[index]]) ?? [];

class Answer {
  constructor(kind, prompt) {
    this.kind = kind;
    this.text = "";
    this.tokens = [];
    this.count = 0;
    this.started = performance.now();
    this.body = element("div", { className: "text" });
    this.facts = element("div", { className: "facts" });
    this.root = element("article", { className: "message assistant waiting" + (kind === "continue" ? " raw" : "") }, this.body, this.facts);
    this.root.setAttribute("aria-label", "Answer");
    this.root.setAttribute("aria-busy", "true");
    this.prompt = prompt;
    this.draw();
    by("log").append(this.root);
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) this.usage = event.usage;
    const [choice] = event.choices ?? [];
    if (!choice) return;
    const piece = choice.text ?? choice.delta?.content ?? "";
    const tokens = tokensOf(choice.logprobs);
    if (piece || tokens.length) {
      this.first ??= performance.now();
      this.last = performance.now();
      this.count += tokens.length || 1;
    }
    this.text += piece;
    this.tokens.push(...tokens);
    this.reason = choice.finish_reason ?? this.reason;
    this.due ??= requestAnimationFrame(() => { this.due = undefined; this.draw(); });
  }

  draw() {
    const log = by("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    const given = this.kind === "continue" ? [element("span", { className: "given", textContent: this.prompt })] : [];
    this.body.replaceChildren(...given, ...this.content());
    const count = this.usage?.completion_tokens ?? this.count;
    const seconds = (this.last - this.first) / 1000;
    const facts = [
      count && `${count} tokens`,
      count > 1 && seconds > 0 && `${((count - 1) / seconds).toFixed(1)} tokens/s`,
      this.first && `first after ${Math.round(this.first - this.started)} ms`,
      this.reason && { length: "ended at max tokens", stop: "ended by itself", stopped: "stopped by you" }[this.reason],
    ].filter(Boolean);
    this.facts.replaceChildren(...facts.map((text) => element("span", { textContent: text })), ...this.buttons());
    if (follows) log.scrollTop = log.scrollHeight;
  }

  content() {
    if (this.tokens.length) {
      return this.tokens.map(([text, logprob]) => {
        const mark = element("mark", { textContent: text, title: `${(100 * Math.exp(logprob)).toFixed(1)} %` });
        mark.style.setProperty("--doubt", 1 - Math.exp(logprob));
        return mark;
      });
    }
    return this.kind === "continue" ? [this.text] : markup(this.text.trimStart());
  }

  buttons() {
    if (!this.ended || !this.reason) return [];
    const button = (label, action) => element("button", { type: "button", textContent: label, onclick: action });
    const copy = button("Copy", async () => {
      await navigator.clipboard.writeText((this.kind === "continue" ? this.prompt : "") + this.text);
      copy.textContent = "Copied";
    });
    return [copy, button("Ask again", () => this.again())];
  }

  again() {
    if (running) return;
    const index = history.indexOf(this.turn);
    if (index >= 0) history.splice(index - 1);
    ask(this.prompt, this.kind);
  }

  end(error) {
    this.ended = true;
    this.root.classList.remove("waiting");
    this.root.setAttribute("aria-busy", "false");
    if (error?.name === "AbortError") this.reason = "stopped";
    else if (error) this.root.append(element("p", { className: "failure", role: "alert", textContent: error.message }));
    cancelAnimationFrame(this.due);
    this.draw();
    if (this.kind === "chat" && this.text && !(error && error.name !== "AbortError")) {
      this.turn = { role: "assistant", content: this.text };
      history.push({ role: "user", content: this.prompt }, this.turn);
    }
    by("announce").textContent = error && error.name !== "AbortError" ? "The request failed." : `Answer complete: ${this.text}`;
  }
}

async function ask(text, kind = mode()) {
  by("empty").hidden = true;
  if (kind === "chat") by("log").append(element("article", { className: "message user" }, element("div", { className: "text", textContent: text })));
  const [url, body] = requestFor(kind, text);
  const answer = new Answer(kind, text);
  by("log").scrollTop = by("log").scrollHeight;
  running = new AbortController();
  buttonsFor(true);
  let failure;
  try {
    const response = await askServer(url, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) answer.take(event);
  } catch (error) {
    failure = error;
  }
  running = null;
  answer.end(failure);
  buttonsFor(false);
}

const buttonsFor = (busy) => {
  by("send").hidden = busy;
  by("stop").hidden = !busy;
  by("clear").disabled = busy;
  if (!busy) by("prompt").focus({ preventScroll: true });
  else if (document.activeElement === document.body || document.activeElement === by("send")) by("stop").focus();
};

const fit = () => {
  const area = by("prompt");
  area.style.height = "auto";
  area.style.height = area.scrollHeight + "px";
};

const offer = () => {
  const kind = mode();
  by("prompt").placeholder = kind === "chat" ? "Write a message" : "Write the beginning of a text";
  by("empty").querySelector("h2").textContent = kind === "chat" ? "Ask the model something" : "Let the model continue a text";
  by("examples").replaceChildren(...EXAMPLES[kind].map((text) => element("button", { type: "button", textContent: text, onclick: () => !running && ask(text) })));
};

const showSliders = () => {
  for (const output of document.querySelectorAll("#sampling output")) output.textContent = Number(by(output.htmlFor.value).value).toFixed(2);
};

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("prompt").value;
  if (running || !text.trim()) return;
  if (!by("sampling").reportValidity()) return;
  by("prompt").value = "";
  fit();
  ask(text);
});
by("composer").addEventListener("change", offer);
by("prompt").addEventListener("input", fit);
by("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    by("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
by("stop").addEventListener("click", () => running?.abort());
by("clear").addEventListener("click", () => {
  history = [];
  by("log").replaceChildren(by("empty"));
  by("empty").hidden = false;
  by("prompt").focus();
});
by("sampling").addEventListener("input", showSliders);
by("sampling").addEventListener("reset", () => setTimeout(showSliders));
by("sampling").addEventListener("submit", (event) => event.preventDefault());
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.show;
    for (const other of document.querySelectorAll("nav button")) other.setAttribute("aria-pressed", String(other === button));
  });
}

showSliders();
offer();
const meet = async () => {
  const response = await askServer("v1/models");
  if (!response.ok) return;
  const { data: [model] } = await response.json();
  modelName = by("model").textContent = model.id;
  document.title = `${model.id} · playground`;
  if (!model.has_chat_template) {
    document.querySelector("input[value='continue']").checked = true;
    offer();
  }
};
onUnlock(meet);
meet();
startCharts(by("charts"), (state, text) => {
  if (by("health").dataset.state === state) return;
  by("health").dataset.state = state;
  by("health").textContent = text;
});
