// Opens the model of this file and generates text.

// Bytes of base64.
function decoded64(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// Puts inflated bytes into a buffer, from its begin on. `parts`: pieces of the deflated bytes in base64, from a list or
// as they arrive.
async function inflate(parts, buffer) {
  const stream = new DecompressionStream("deflate"), reader = stream.readable.getReader();
  const write = async () => {
    const writer = stream.writable.getWriter();
    for await (const part of parts) await writer.write(decoded64(part));
    await writer.close();
  };
  const read = async () => {
    const bytes = new Uint8Array(buffer);
    for (let at = 0, next = await reader.read(); !next.done; next = await reader.read()) {
      bytes.set(next.value, at);
      at += next.value.length;
    }
  };
  await Promise.all([write(), read()]);
}

const NUMBERS = {
  int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int32: Int32Array,
  float32: Float32Array, float64: Float64Array,
};

// The content of the file, with its arrays as views of the memory.
function withArrays(content, memory) {
  const { buffer } = memory;
  const array = ({ type, shape, offset, stride, scales }) => {
    const [rows, columns] = shape, count = scales === undefined ? shape.reduce((product, size) => product * size, 1) : rows * stride;
    const values = new NUMBERS[type](buffer, offset, count);
    if (shape.length !== 2) return values;
    return scales === undefined
      ? new Matrix({ rows, columns, values })
      : new Matrix({ rows, columns, codes: values, stride, scales: new Float32Array(buffer, scales, rows), memory });
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
  // `parts`: of the arrays, as `inflate` takes them.
  static async open({ memory: sizes, model, tokenizer }, parts) {
    const engine = new Engine(), memory = new Memory(sizes);
    await inflate(parts, memory.buffer);
    engine.model = new Model(withArrays(model, memory));
    engine.tokenizer = new TOKENIZERS[tokenizer.type](withArrays(tokenizer, memory));
    const { start_id: start, unknown_id: unknown, end_ids: ends, chat } = tokenizer;
    return Object.assign(engine, { start, unknown, ends, chat });
  }

  // Yields { id, text, logits } for each token that follows the prompt; `logits` are those it was drawn with. A token
  // that ends a text is the last, and has no text.
  *generate(prompt, options) {
    const ids = this.idsOf(prompt, options.chat), stream = this.tokenizer.stream(ids);
    let logits = null;
    for (let i = this.model.resume(ids); i < ids.length; i++) {
      logits = this.model.step(ids[i], i + 1 === ids.length);
      yield { id: null, text: "", logits: null };
    }
    for (let position = 0; position < options.maxTokens; position++) {
      const kept = filtered(logits, options, this.unknown), id = draw(kept, uniform(options.seed, position));
      const isEnd = this.ends.includes(id);
      yield { id, text: isEnd ? "" : stream.feed(id), logits: kept };
      if (isEnd) break;
      if (position + 1 < options.maxTokens) logits = this.model.step(id);
    }
    yield { id: null, text: stream.end(), logits: null };
  }

  // The ids of a prompt; in a chat those of a conversation with this one message.
  idsOf(prompt, isChat) {
    if (!isChat) return [this.start, ...this.tokenizer.encode(prompt)];
    const { before, prefix, suffix, after } = this.chat;
    return [...before, ...this.tokenizer.encode(prefix + prompt + suffix), ...after];
  }

  // The text of one token for display.
  piece(id) {
    if (this.tokenizer.piece) return this.tokenizer.piece(id);
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
