// Opens the model of this file and generates text.

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

const NUMBERS = {
  int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array,
  float32: Float32Array, float64: Float64Array,
};

// The content of the file, its arrays in their places.
function withArrays(content, buffer) {
  const array = ({ type, shape, offset, scales }) => {
    const count = shape.reduce((product, size) => product * size, 1), values = new NUMBERS[type](buffer, offset, count);
    if (shape.length !== 2) return values;
    return scales === undefined
      ? new Matrix(shape[0], shape[1], null, null, values)
      : new Matrix(shape[0], shape[1], values, new Float32Array(buffer, scales, shape[0]), null);
  };
  const placed = (value) => {
    if (Array.isArray(value)) return value.map(placed);
    if (value === null || typeof value !== "object") return value;
    if ("offset" in value) return array(value);
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, placed(each)]));
  };
  return placed(content);
}

class Engine {
  static async open({ model, tokenizer }, base64) {
    const engine = new Engine();
    engine.model = new Model(withArrays(model, await inflated(base64)));
    engine.tokenizer = new TOKENIZERS[tokenizer.type](tokenizer);
    Object.assign(engine, { start: tokenizer.start_id, unknown: tokenizer.unknown_id });
    return engine;
  }

  // Yields { id, text, logits } for each token that follows the prompt; `logits` are those it was drawn with.
  *generate(prompt, options) {
    const ids = [this.start, ...this.tokenizer.encode(prompt)], stream = this.tokenizer.stream(ids);
    this.model.clear();
    let logits = null;
    for (let i = 0; i < ids.length; i++) {
      logits = this.model.step(ids[i], i + 1 === ids.length);
      if (i % 64 === 63) yield { id: null, text: "", logits: null };
    }
    for (let position = 0; position < options.maxTokens; position++) {
      const kept = filtered(logits, options, this.unknown), id = draw(kept, uniform(options.seed, position));
      yield { id, text: stream.feed(id), logits: kept };
      if (position + 1 < options.maxTokens) logits = this.model.step(id);
    }
    yield { id: null, text: stream.end(), logits: null };
  }

  // The text of one token for display.
  piece(id) {
    const stream = this.tokenizer.stream([this.start]), text = stream.feed(id);
    return text + stream.end();
  }

  // Nats per token of ids after the start token, as `lm eval` counts them.
  loss(ids) {
    this.model.clear();
    let sum = 0, before = this.start;
    for (const id of ids) {
      sum -= logProbability(this.model.step(before), id);
      before = id;
    }
    return sum / ids.length;
  }
}
