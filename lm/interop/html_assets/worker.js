// The engine in a worker: it generates in slices of time, between which it reads messages.

const SLICE_MS = 40, BARS = 8;
let engine = null, current = 0;

// The most likely tokens of filtered logits, with their probabilities.
function likeliest(kept) {
  const ids = [...kept.keys()].filter((id) => kept[id] > -Infinity).sort((a, b) => kept[b] - kept[a] || a - b);
  const sum = ids.reduce((total, id) => total + Math.exp(kept[id]), 0);
  return ids.slice(0, BARS).map((id) => ({ id, piece: engine.piece(id), share: Math.exp(kept[id]) / sum }));
}

function pause() {
  return new Promise((resume) => setTimeout(resume));
}

async function generate({ prompt, options, job }) {
  const begun = performance.now();
  let text = "", tokens = 0, last = null, until = begun + SLICE_MS;
  const send = (done) => {
    const seconds = (performance.now() - begun) / 1000;
    postMessage({ job, text, tokens, seconds, done, bars: last && likeliest(last.logits), drawn: last && last.id });
    text = "";
  };
  for (const each of engine.generate(prompt, options)) {
    text += each.text;
    if (each.id !== null) [last, tokens] = [each, tokens + 1];
    if (performance.now() < until) continue;
    send(false);
    await pause();
    if (current !== job) return;
    until = performance.now() + SLICE_MS;
  }
  send(true);
}

onmessage = async ({ data }) => {
  try {
    if (data.open) {
      engine = await Engine.open(data.open, data.weights);
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
