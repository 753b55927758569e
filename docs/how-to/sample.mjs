import { readFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { Tokenizer } from "@huggingface/tokenizers";
const read = (name) => JSON.parse(readFileSync(`book-onnx/${name}`, "utf8"));
const run = read("run.json"), tokenizer = new Tokenizer(read("tokenizer.json"), {});
const session = await ort.InferenceSession.create("book-onnx/model.onnx");
const array = (type, from) => (type === "int64" ? BigInt64Array.from(from, BigInt) : Float32Array.from(from));
const tensor = (type, from, shape) => new ort.Tensor(type, array(type, from), shape);
const filled = (t) => tensor(t.type, Array(t.shape.reduce((a, b) => a * b)).fill(t.value), t.shape);
const first = Object.fromEntries(Object.entries(run.state).map(([name, t]) => [name, filled(t)]));
const ids = [run.start_id, ...tokenizer.encode("The ", { add_special_tokens: false }).ids];
let [state, seen, next] = [first, 0, [...ids]];
for (let step = 0; step < 200; step++) {
  if (seen === run.context_length) [state, seen, next] = [first, 0, ids.slice(-(seen >> 1) - 1)];
  const out = await session.run({ ids: tensor("int64", next, [1, next.length]), ...state });
  state = Object.fromEntries(Object.keys(first).map((name) => [name, out[`next_${name}`]]));
  const logits = out.logits.data.slice(-run.vocab_size);
  [seen, next] = [seen + next.length, [logits.indexOf(Math.max(...logits))]];
  ids.push(...next);
}
console.log(tokenizer.decode(ids.slice(1), { skip_special_tokens: false }));
