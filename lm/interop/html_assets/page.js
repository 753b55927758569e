// The page: its controls, and the worker that generates.

const element = (id) => document.getElementById(id);
const content = JSON.parse(element("content").textContent);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const worker = new Worker(URL.createObjectURL(new Blob([element("engine").textContent], { type: "text/javascript" })));
const PEEK_MS = 250;
let job = 0, running = false, whole = "", waiting = null;

for (const { name, label, minimum, maximum, step, off, help } of content.knobs) {
  const knob = document.createElement("label");
  const slider = Object.assign(document.createElement("input"), { type: "range", id: name, min: minimum, max: maximum, step });
  const shown = document.createElement("output");
  slider.addEventListener("input", () => {
    shown.textContent = Number(slider.value) === off ? "off" : slider.value;
    showCommand();
    peekSoon();
  });
  knob.title = help;
  knob.append(Object.assign(document.createElement("span"), { textContent: label }), shown, slider);
  element("knobs").append(knob);
}

function knob(name) {
  return Number(element(name).value);
}

// The command's own value of an option.
function ownValue({ defaults }) {
  return isChat() ? defaults.chat : defaults.text;
}

// Puts a slider where the command has the option by itself.
function resetKnob(each) {
  element(each.name).value = ownValue(each);
  element(each.name).dispatchEvent(new Event("input"));
}

function seed() {
  return element("seed").value.replace(/\D/g, "") || "1";
}

function options(maxTokens) {
  return {
    seed: seed(), maxTokens, temperature: knob("temperature"), topK: knob("top_k"), topP: knob("top_p"),
    minP: knob("min_p"), chat: isChat(),
  };
}

function isChat() {
  return element("chat").checked;
}

// The command that gives the same text.
function showCommand() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`, prompt = element("prompt").value;
  const program = isChat() ? `printf '%s\\n' ${quoted(prompt)} | lm chat` : "lm sample";
  const parts = [program, quoted(content.run), "--precision int8", "--seed", seed(), "--max-tokens", length()];
  const flag = (name, value) => parts.push(`--${name.replaceAll("_", "-")}`, value);
  for (const each of content.knobs) {
    const { name, off, neutral } = each, value = knob(name);
    if (value !== ownValue(each)) flag(name, value === off ? neutral : value);
  }
  for (const [name, value] of Object.entries(content.others)) flag(name, value);
  if (prompt && !isChat()) parts.push("--prompt", quoted(prompt));
  // A line is a message there.
  element("same").hidden = isChat() && (prompt.trim() === "" || prompt.includes("\n"));
  element("command").textContent = parts.join(" ");
}

function length() {
  return Math.min(100000, Math.max(1, Math.round(Number(element("length").value)) || 300));
}

function start() {
  running = true;
  job += 1;
  whole = "";
  element("text").replaceChildren();
  const prompt = element("prompt").value + (isChat() ? "\n\n" : "");
  element("text").append(Object.assign(document.createElement("b"), { textContent: prompt }), "");
  element("status").textContent = "";
  element("go").textContent = "Stop";
  worker.postMessage({ job, prompt: element("prompt").value, options: options(length()) });
}

function stop() {
  running = false;
  element("go").textContent = "Generate";
  element("copy").disabled = whole === "";
}

// Shows what may follow the prompt: one token is drawn and not shown.
function peek() {
  // The button is off until the model is open.
  if (running || element("go").disabled) return;
  job += 1;
  worker.postMessage({ job, prompt: element("prompt").value, options: options(1) });
}

function peekSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(peek, PEEK_MS);
}

function visible(piece) {
  return piece.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

function showBars(bars, drawn) {
  element("bars").replaceChildren(
    ...bars.map(({ id, piece, share }) => {
      const row = document.createElement("li"), bar = document.createElement("i");
      bar.style.width = `${100 * share}%`;
      row.className = id === drawn ? "drawn" : "";
      const name = Object.assign(document.createElement("code"), { textContent: visible(piece) });
      const track = document.createElement("span");
      track.append(bar);
      row.append(name, track, Object.assign(document.createElement("data"), { textContent: `${(100 * share).toFixed(1)} %` }));
      return row;
    }),
  );
}

worker.onmessage = ({ data }) => {
  if (data.ready) {
    element("go").disabled = false;
    element("status").textContent = "";
    peek();
  }
  if (data.error && (data.job === undefined || data.job === job)) {
    element("status").textContent = data.error;
    stop();
  }
  if (data.ready || data.error || data.job !== job) return;
  if (data.bars) showBars(data.bars, running ? data.drawn : null);
  if (!running) return;
  whole += data.text;
  element("text").lastChild.appendData(data.text);
  const rate = data.tokens ? whole.length / data.seconds : 0;
  const facts = [`${number.format(data.tokens)} tokens`, `${number.format(rate)} characters/s`];
  if (data.ended) facts.push("the model ended the text");
  element("status").textContent = facts.join(", ");
  if (data.done) stop();
};
worker.onerror = (event) => { element("status").textContent = `This browser cannot run the model: ${event.message}`; };

element("go").addEventListener("click", () => {
  if (!running) return start();
  job += 1;
  worker.postMessage({ stop: true });
  stop();
});
element("dice").addEventListener("click", () => {
  element("seed").value = Math.floor(Math.random() * 1e6);
  showCommand();
});
element("copy").addEventListener("click", () => navigator.clipboard?.writeText(element("text").textContent));
element("prompt").addEventListener("input", () => { showCommand(); peekSoon(); });
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) start();
});
element("chatting").hidden = !content.tokenizer.chat;
element("chat").checked = Boolean(content.tokenizer.chat);
const placeholder = () => {
  element("prompt").placeholder = isChat() ? "A question, or a task." : "Empty: the model begins a text.";
};
element("chat").addEventListener("change", () => {
  placeholder();
  // A slider that was not moved follows.
  const still = ({ name, defaults }) => knob(name) === (isChat() ? defaults.text : defaults.chat);
  content.knobs.filter(still).forEach(resetKnob);
  showCommand();
  peekSoon();
});
placeholder();
content.knobs.forEach(resetKnob);
for (const name of ["seed", "length"]) element(name).addEventListener("input", showCommand);
worker.postMessage({ open: content });
for (const part of document.querySelectorAll(".weights")) {
  worker.postMessage({ part: part.textContent });
  part.remove();
}
worker.postMessage({ part: "" });
