// The proof of an export, in Node.js or a browser: the ids of a text, its nats per token, and a sample.

async function prove(content, parts, { text, samples }) {
  const engine = await Engine.open(content, parts), ids = engine.tokenizer.encode(text);
  const texts = samples.map(({ prompt, ...options }) => {
    let all = "";
    for (const { text } of engine.generate(prompt, options)) all += text;
    return all;
  });
  return { ids, loss: engine.loss(ids), texts };
}
