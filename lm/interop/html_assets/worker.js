// The engine in a worker: it generates in slices of time, between which it reads messages.

const SLICE_MS = 40, BARS = 8;
const parts = [];
let engine = null, current = 0, wake = () => {};

// The most likely tokens of filtered logits, with their probabilities.
function likeliest(kept) {
  const ids = [];
  let sum = 0;
  kept.forEach((logit, id) => {
    if (logit === -Infinity) return;
    sum += Math.exp(logit);
    if (ids.length === BARS && logit <= kept[ids.at(-1)]) return;
    let at = ids.length;
    while (at > 0 && kept[ids[at - 1]] < logit) at--;
    ids.splice(at, 0, id);
    ids.length = Math.min(ids.length, BARS);
  });
  return ids.map((id) => ({ id, piece: engine.piece(id), share: Math.exp(kept[id]) / sum }));
}

function pause() {
  return new Promise((resume) => setTimeout(resume));
}

async function generate({ prompt, options, job }) {
  const begun = performance.now();
  let text = "", tokens = 0, ended = false, last = null, until = begun + SLICE_MS;
  const send = (done) => {
    const seconds = (performance.now() - begun) / 1000;
    postMessage({ job, text, tokens, seconds, done, ended, bars: last && likeliest(last.logits), drawn: last && last.id });
    text = "";
  };
  for (const each of engine.generate(prompt, options)) {
    text += each.text;
    if (each.id !== null) [last, tokens, ended] = [each, tokens + 1, engine.ends.includes(each.id)];
    if (performance.now() < until) continue;
    send(false);
    await pause();
    if (current !== job) return;
    until = performance.now() + SLICE_MS;
  }
  send(true);
}

// The parts of the weights, as they arrive from the page; "" is the end.
async function* arriving() {
  for (;;) {
    while (parts.length === 0) await new Promise((resume) => { wake = resume; });
    const part = parts.shift();
    if (!part) return;
    yield part;
  }
}

onmessage = async ({ data }) => {
  try {
    if (data.part !== undefined) {
      parts.push(data.part);
      wake();
    } else if (data.open) {
      engine = await Engine.open(data.open, arriving());
      postMessage({ ready: true });
    } else if (data.stop) {
      current = 0;
    } else {
      current = data.job;
      await generate(data);
    }
  } catch (error) {
    postMessage({ job: data.job, error: error.message });
  }
};
