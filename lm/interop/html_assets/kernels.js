// The decoding step of each compiled kernel, in the arithmetic of its int8 precision: integer products with a scale
// for each row, float32 elsewhere. It repeats lm/kernels/native; the names of the parts are those of its arguments.
//
// JavaScript computes in float64. Math.fround after each operation makes it float32; fround(a * b + c) is a fused
// multiply-add, as the product of two float32 is exact in float64.

const f32 = Math.fround;
const bits = new DataView(new ArrayBuffer(4));

function float(code) {
  bits.setUint32(0, code >>> 0);
  return bits.getFloat32(0);
}

const LOG2_E = f32(1.44269504088896341), LN2_LOW = f32(-2.12194440e-4);
const EXP = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1].map(f32);
const [E0, E1, E2, E3, E4, E5] = EXP;
const TWO_TO = Float32Array.from({ length: 256 }, (_, i) => 2 ** (i - 127));

// As in simd.hpp (Cephes expf).
function exp(x) {
  x = x > 88 ? 88 : x < -87 ? -87 : x;
  const n = f32(f32(x * LOG2_E + 12582912) - 12582912);
  let r = f32(x - n * 0.693359375);
  r = f32(r - n * LN2_LOW);
  let p = f32(E0 * r + E1);
  p = f32(p * r + E2);
  p = f32(p * r + E3);
  p = f32(p * r + E4);
  p = f32(p * r + E5);
  p = f32(f32(p * f32(r * r) + r) + 1);
  return f32(p * TWO_TO[n + 127]);
}

const LOG = [
  7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
  2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
].map(f32);

// As in simd.hpp (Cephes logf), for positive x.
function log(x) {
  bits.setFloat32(0, x);
  const code = bits.getInt32(0), n = (code - 0x3f3504f3) >> 23;
  const m = f32(float(code - (n << 23)) - 1), square = f32(m * m);
  let p = LOG[0];
  for (let i = 1; i < LOG.length; i++) p = f32(p * m + LOG[i]);
  p = f32(f32(p * m) * square);
  p = f32(n * LN2_LOW + p);
  p = f32(p - 0.5 * square);
  return f32(n * 0.693359375 + f32(m + p));
}

const sigmoid = (x) => f32(1 / f32(1 + exp(-x)));
const tanh = (x) => f32(1 - f32(2 / f32(1 + exp(f32(x + x)))));

// The sum of 16 lanes, in the order of simd.hpp.
function addLanes(lanes) {
  const half = (i) => f32(lanes[i] + lanes[i + 8]), quarter = (i) => f32(half(i) + half(i + 4));
  return f32(f32(quarter(0) + quarter(2)) + f32(quarter(1) + quarter(3)));
}

const lanes = new Float32Array(16);

// The sum over i < count of term(i).
function summed(count, term) {
  lanes.fill(0);
  for (let i = 0; i < count; i++) lanes[i & 15] += term(i);
  return addLanes(lanes);
}

// The sum over i < count of a[i] * b[i], fused.
function dotted(a, b, count, at = 0) {
  lanes.fill(0);
  for (let i = 0; i < count; i++) lanes[i & 15] = a[at + i] * b[i] + lanes[i & 15];
  return addLanes(lanes);
}

// Context tables: rows of logits by the last tokens; as tables.hpp.
class Tables {
  constructor(tables, buckets, vocabulary) {
    this.vocabulary = vocabulary;
    this.tables = tables.map(([order, weight]) => ({ order, weight, hashed: vocabulary ** (order - 1) > buckets }));
    this.held = Math.max(0, ...this.tables.map(({ order }) => order - 2));
    this.clear();
  }
  clear() {
    this.recent = new Array(this.held).fill(-1);
    this.rows = [];
  }
  append(id) {
    let hash = 0, digits = 0, worth = 1, next = 0, back = 0;
    for (; back <= this.held; back++) {
      const token = back === 0 ? id : this.recent[this.held - back], whole = token >= 0;
      hash = (Math.imul(hash, 1540483477) + token + 1) >>> 0;
      digits += whole ? token * worth : 0;
      worth = worth > 0xffffffff ? worth : worth * this.vocabulary;
      if (next < this.tables.length && this.tables[next].order === back + 2) {
        const { weight, hashed } = this.tables[next], buckets = weight.rows - 1;
        this.rows[next++] = !whole ? buckets : hashed ? this.bucket(hash) % buckets : digits;
      }
      if (!whole) break;
    }
    for (; next < this.tables.length; next++) this.rows[next] = this.tables[next].weight.rows - 1;
    if (this.held > 0) this.recent = [...this.recent.slice(1), id];
  }
  bucket(hash) {
    hash = Math.imul(hash ^ (hash >>> 15), 1540483477);
    return (hash ^ (hash >>> 13)) >>> 0;
  }
  add(logits) {
    this.tables.forEach(({ weight }, index) => {
      const row = weight.row(this.rows[index]);
      for (let i = 0; i < row.length; i++) logits[i] += row[i];
    });
  }
}

const MOST_TABLE_BYTES = 64 * 2 ** 20;
const padded = (count) => Math.ceil(count / 16) * 16;

// As recurrent.hpp.
class Recurrent {
  constructor({ cell, embedding, layers, heads, tables, buckets, counts, gate, gate_bias }) {
    this.cell = cell;
    this.gates = { gru: 3, lstm: 4 }[cell] ?? 1;
    this.hidden = layers[0][1].columns;
    this.embedding = embedding;
    this.logits = new Float32Array(embedding.rows);
    this.tables = new Tables(tables, buckets, embedding.rows);
    this.mixture = counts ? new Mixture(counts, gate, gate_bias, this.hidden) : null;
    const width = this.gates * this.hidden;
    // The first layer's input products are those of tokens, in whole precision, if a table of them is small enough.
    this.folds = embedding.rows * this.gates * padded(this.hidden) * 4 <= MOST_TABLE_BYTES;
    this.folded = new Map();
    this.first = this.folds ? { weight: layers[0][0].all(), bias: layers[0][2] } : null;
    this.layers = layers.map(([input, hidden, inputBias, hiddenBias], index) => ({
      input: index === 0 && this.folds ? null : new Product([input], inputBias),
      hidden: new Product([hidden], hiddenBias),
    }));
    this.heads = heads.map(([weight, bias]) => new Product([weight], bias));
    this.inputs = new Float32Array(width);
    this.sums = new Float32Array(width);
    this.projected = this.heads.map(({ outputs }) => new Float32Array(outputs));
    this.clear();
  }

  clear() {
    this.states = this.layers.map(() => new Float32Array(this.hidden));
    this.memories = this.layers.map(() => new Float32Array(this.cell === "lstm" ? this.hidden : 0));
    this.tables.clear();
    this.mixture?.clear();
  }

  inputsOf(id) {
    let row = this.folded.get(id);
    if (!row) {
      const { weight, bias } = this.first, x = this.embedding.row(id);
      row = new Float32Array(bias.length);
      for (let i = 0; i < row.length; i++) {
        let sum = 0;
        for (let k = 0, at = i * x.length; k < x.length; k++) sum = f32(weight[at + k] * x[k] + sum);
        row[i] = sum + bias[i];
      }
      this.folded.set(id, row);
    }
    return row;
  }

  // Reads one more token. Returns the logits after it, valid until the next call; null if they are not needed.
  step(id, needsLogits = true) {
    this.tables.append(id);
    this.mixture?.append(id);
    let below = null;
    this.layers.forEach(({ input, hidden }, layer) => {
      let inputs = this.inputs;
      if (input === null) inputs = this.inputsOf(id);
      else input.multiply(layer === 0 ? this.embedding.row(id) : below, inputs);
      hidden.multiply(this.states[layer], this.sums);
      this.gate(inputs, this.sums, this.states[layer], this.memories[layer]);
      below = this.states[layer];
    });
    if (!needsLogits) return null;
    let from = below;
    this.heads.forEach((head, index) => {
      const to = index + 1 === this.heads.length ? this.logits : this.projected[index];
      head.multiply(from, to);
      from = to;
    });
    this.tables.add(this.logits);
    this.mixture?.mix(below, this.logits);
    return this.logits;
  }

  // The element-wise part: gates in the order of torch.
  gate(gi, gh, state, memory) {
    const size = this.hidden, both = (gate, unit) => f32(gi[gate * size + unit] + gh[gate * size + unit]);
    for (let unit = 0; unit < size; unit++) {
      if (this.cell === "gru") {
        const reset = sigmoid(both(0, unit)), update = sigmoid(both(1, unit));
        const fresh = tanh(f32(reset * gh[2 * size + unit] + gi[2 * size + unit]));
        state[unit] = f32(state[unit] - fresh) * update + fresh;
      } else if (this.cell === "lstm") {
        const added = f32(sigmoid(both(0, unit)) * tanh(both(2, unit)));
        const kept = f32(sigmoid(both(1, unit)) * memory[unit] + added);
        memory[unit] = kept;
        state[unit] = sigmoid(both(3, unit)) * tanh(kept);
      } else {
        const sum = both(0, unit);
        state[unit] = this.cell === "rnn-relu" ? Math.max(sum, 0) : tanh(sum);
      }
    }
  }
}

// Smoothed counts as a trie of contexts: a child has one older token more. As counts.cpp.
class Counts {
  constructor({ unigrams, levels, share_values, backoff_values }) {
    this.unigrams = unigrams;
    this.levels = levels.map(({ contexts, children, sizes, backoffs, tokens, shares }) => {
      const pairs = sums(sizes);
      return {
        contexts, tokens, pairs, children: sums(children),
        ...(shares instanceof Float32Array
          ? { shares, backoffs }
          : decoded(shares, backoffs, pairs, share_values, backoff_values)),
      };
    });
  }
  // Adds up the distribution after a history, newest token last; -1 is before the start of the text.
  distribution(history, out) {
    const path = [];
    for (let k = 0, node = 0; k < this.levels.length; k++) {
      const token = history[history.length - 1 - k];
      node = token < 0 ? -1 : this.child(k, node, token);
      if (node < 0) break;
      path.push(node);
    }
    out.fill(0);
    let weight = 1;
    for (let k = path.length - 1; k >= 0; k--) {
      const { pairs, tokens, shares, backoffs } = this.levels[k], node = path[k], scale = f32(weight);
      for (let i = pairs[node]; i < pairs[node + 1]; i++) out[tokens[i]] += f32(shares[i] * scale);
      weight *= backoffs[node];
    }
    const scale = f32(weight);
    for (let i = 0; i < out.length; i++) out[i] += f32(this.unigrams[i] * scale);
  }
  // `children` of a level belong to the nodes of the level before it.
  child(k, node, token) {
    const { children, contexts } = this.levels[k], end = children[node + 1];
    let first = children[node], last = end;
    while (first < last) {
      const middle = (first + last) >> 1;
      if (contexts[middle] < token) first = middle + 1;
      else last = middle;
    }
    return first < end && contexts[first] === token ? first : -1;
  }
}

// Where each of these many things begins, and the end of the last.
function sums(counts) {
  const found = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) found[i + 1] = found[i] + counts[i];
  return found;
}

// Shares and backoff weights of a compact level, from their codes; as lm/kernels/counts.py.
function decoded(codes, backoffCodes, pairs, shareValues, backoffValues) {
  const shares = new Float32Array(codes.length), backoffs = new Float32Array(backoffCodes.length);
  for (let node = 0; node < backoffs.length; node++) {
    const begin = pairs[node], end = pairs[node + 1], backoff = begin === end ? 1 : backoffValues[backoffCodes[node]];
    let sum = 0;
    for (let i = begin; i < end; i++) sum += shareValues[codes[i]];
    const scale = (1 - backoff) / Math.max(sum, 1e-9);
    for (let i = begin; i < end; i++) shares[i] = shareValues[codes[i]] * scale;
    backoffs[node] = backoff;
  }
  return { shares, backoffs };
}

// The last tokens, which the counts use.
class History {
  constructor(counts) { this.size = counts.levels.length; this.clear(); }
  clear() { this.tokens = new Array(this.size).fill(-1); }
  append(id) { if (this.size) this.tokens = [...this.tokens.slice(1), id]; }
}

// The gated mixture of a network with counts; as mixture.hpp.
class Mixture {
  constructor(counts, gate, bias, hidden) {
    this.counts = new Counts(counts);
    this.history = new History(this.counts);
    Object.assign(this, { gate, bias, hidden });
    this.shares = new Float32Array(this.counts.unigrams.length);
  }
  clear() { this.history.clear(); }
  append(id) { this.history.append(id); }
  // Logits become log-probabilities of the mixture.
  mix(hidden, logits) {
    const { shares, gate } = this, width = shares.length;
    this.counts.distribution(this.history.tokens, shares);
    const entropy = -summed(width, (i) => f32(shares[i] * log(shares[i])));
    const open = f32(f32(entropy * gate[this.hidden] + this.bias) + dotted(hidden, gate, this.hidden));
    let most = -Infinity;
    for (let i = 0; i < width; i++) most = Math.max(most, logits[i]);
    const sum = summed(width, (i) => (logits[i] = exp(f32(logits[i] - most))));
    const ofCounts = sigmoid(open), ofNetwork = f32(sigmoid(-open) / sum);
    for (let i = 0; i < width; i++) logits[i] = log(f32(shares[i] * ofCounts + f32(logits[i] * ofNetwork)));
  }
}

// Counts alone; as mixture.hpp.
class NGram {
  constructor({ counts }) {
    this.counts = new Counts(counts);
    this.history = new History(this.counts);
    this.logits = new Float32Array(this.counts.unigrams.length);
  }
  clear() { this.history.clear(); }
  step(id, needsLogits = true) {
    this.history.append(id);
    if (!needsLogits) return null;
    this.counts.distribution(this.history.tokens, this.logits);
    for (let i = 0; i < this.logits.length; i++) this.logits[i] = log(this.logits[i]);
    return this.logits;
  }
}

// to = from / sqrt(mean of squares + epsilon) * gain, for `gain.length` numbers from `at` on.
function norm(from, to, gain, epsilon, at = 0) {
  const count = gain.length;
  lanes.fill(0);
  for (let i = 0; i < count; i++) lanes[i & 15] = from[at + i] * from[at + i] + lanes[i & 15];
  const scale = f32(1 / f32(Math.sqrt(f32(f32(addLanes(lanes) / count) + f32(epsilon)))));
  for (let i = 0; i < count; i++) to[at + i] = f32(from[at + i] * scale) * gain[i];
}

// A Llama-shaped Transformer with its key-value cache; as transformer.hpp. A full window drops its older half.
class Transformer {
  constructor({ embedding, head, norm, blocks, cosines, sines, heads, kv_heads, epsilon, tables, buckets }) {
    Object.assign(this, { embedding, cosines, sines, heads, groups: kv_heads, epsilon, norm });
    this.context = cosines.rows;
    this.headSize = 2 * cosines.columns;
    this.head = new Product([head]);
    this.logits = new Float32Array(head.rows);
    this.tables = new Tables(tables, buckets, embedding.rows);
    this.blocks = blocks.map(([[query, key, value, output, gate, up, down], norms, bias]) => ({
      mix: new Product([query, key, value], bias), output: new Product([output]), expand: new Product([gate, up]),
      down: new Product([down]), inner: gate.rows,
      inputNorm: norms[0], mlpNorm: norms[1], queryNorm: norms[2], keyNorm: norms[3],
      keys: new Float32Array(this.context * kv_heads * this.headSize),
      values: new Float32Array(this.context * kv_heads * this.headSize),
    }));
    const size = embedding.columns;
    const widest = Math.max(...this.blocks.flatMap(({ mix, expand }) => [mix.outputs, expand.outputs]));
    this.residual = new Float32Array(size);
    this.normed = new Float32Array(size);
    this.added = new Float32Array(size);
    this.raw = new Float32Array(widest);
    this.mixed = new Float32Array(heads * this.headSize);
    this.active = new Float32Array(Math.max(...this.blocks.map(({ inner }) => inner)));
    this.scores = new Float32Array(this.context);
    this.even = new Float32Array(this.headSize);
    this.odd = new Float32Array(this.headSize);
    this.clear();
  }

  clear() {
    this.window = [];
    this.tables.clear();
  }

  // The keys and values of the first tokens, if the last text began with the same.
  resume(ids) {
    let same = 0;
    if (this.tables.tables.length === 0) while (same + 1 < ids.length && ids[same] === this.window[same]) same++;
    const kept = this.window.slice(0, same);
    this.clear();
    this.window = kept;
    return same;
  }

  step(id, needsLogits = true) {
    if (this.window.length === this.context) {
      const kept = this.window.slice(this.context - (this.context >> 1));
      this.clear();
      for (const each of kept) this.read(each);
    }
    this.read(id);
    if (!needsLogits) return null;
    norm(this.residual, this.normed, this.norm, this.epsilon);
    this.head.multiply(this.normed, this.logits);
    this.tables.add(this.logits);
    return this.logits;
  }

  read(id) {
    const position = this.window.length, { residual, normed, raw, mixed, active, epsilon } = this;
    this.window.push(id);
    this.tables.append(id);
    residual.set(this.embedding.row(id));
    for (const block of this.blocks) {
      norm(residual, normed, block.inputNorm, epsilon);
      block.mix.multiply(normed, raw);
      this.keep(block, position);
      for (let head = 0; head < this.heads; head++) this.attend(block, position, head);
      this.add(block.output, mixed);
      norm(residual, normed, block.mlpNorm, epsilon);
      block.expand.multiply(normed, raw);
      for (let i = 0; i < block.inner; i++) active[i] = f32(raw[i] * sigmoid(raw[i])) * raw[block.inner + i];
      this.add(block.down, active);
    }
  }

  add(product, from) {
    product.multiply(from, this.added);
    for (let i = 0; i < this.residual.length; i++) this.residual[i] += this.added[i];
  }

  // Norm and rotation of queries and keys; keys and values go to the cache.
  keep(block, position) {
    const { raw, headSize, heads, groups } = this, half = headSize / 2;
    const cos = this.cosines.row(position), sin = this.sines.row(position);
    const turn = (at, gain) => {
      if (gain) norm(raw, raw, gain, this.epsilon, at);
      for (let i = at; i < at + half; i++) {
        const first = raw[i], second = raw[i + half], c = cos[i - at], s = sin[i - at];
        raw[i] = first * c - f32(second * s);
        raw[i + half] = second * c + f32(first * s);
      }
    };
    for (let head = 0; head < heads; head++) turn(head * headSize, block.queryNorm);
    for (let group = 0; group < groups; group++) turn((heads + group) * headSize, block.keyNorm);
    const width = groups * headSize, keys = heads * headSize;
    block.keys.set(raw.subarray(keys, keys + width), position * width);
    block.values.set(raw.subarray(keys + width, keys + 2 * width), position * width);
  }

  // One head. Four positions at a time: their sums do not wait for each other.
  attend({ keys, values }, position, head) {
    const { raw, headSize, scores, mixed, even, odd } = this, width = this.groups * headSize;
    const offset = Math.floor(head / (this.heads / this.groups)) * headSize, begin = head * headSize;
    const scale = f32(1 / f32(Math.sqrt(headSize)));
    const query = raw.subarray(begin, begin + headSize);
    let t = 0;
    for (; t + 3 <= position; t += 4) {
      let a = 0, b = 0, c = 0, d = 0;
      for (let i = 0, at = t * width + offset; i < headSize; i++, at++) {
        const x = query[i];
        a = f32(keys[at] * x + a);
        b = f32(keys[at + width] * x + b);
        c = f32(keys[at + 2 * width] * x + c);
        d = f32(keys[at + 3 * width] * x + d);
      }
      scores[t] = a * scale;
      scores[t + 1] = b * scale;
      scores[t + 2] = c * scale;
      scores[t + 3] = d * scale;
    }
    for (; t <= position; t++) {
      let sum = 0;
      for (let i = 0, at = t * width + offset; i < headSize; i++) sum = f32(keys[at + i] * query[i] + sum);
      scores[t] = sum * scale;
    }
    let most = -Infinity;
    for (t = 0; t <= position; t++) most = Math.max(most, scores[t]);
    const inverse = f32(1 / summed(position + 1, (t) => (scores[t] = exp(f32(scores[t] - most)))));
    even.fill(0);
    odd.fill(0);
    for (t = 0; t <= position; t++) {
      const sums = t & 1 ? odd : even, share = scores[t];
      for (let i = 0, at = t * width + offset; i < headSize; i++) sums[i] = values[at + i] * share + sums[i];
    }
    for (let i = 0; i < headSize; i++) mixed[begin + i] = f32(even[i] + odd[i]) * inverse;
  }
}

// log(sum(exp(logits))) of the numbers from `begin` to `end`.
function logSum(logits, begin, end) {
  let most = -Infinity, sum = 0;
  for (let i = begin; i < end; i++) most = Math.max(most, logits[i]);
  for (let i = begin; i < end; i++) sum += Math.exp(logits[i] - most);
  return f32(most + Math.log(sum));
}

// Log-probabilities of the mean of the members' probabilities.
class Ensemble {
  constructor({ members }) {
    this.members = members.map((each) => new Model(each));
    this.logits = new Float32Array(members[0].vocab_size);
  }
  clear() { this.members.forEach((each) => each.clear()); }
  step(id, needsLogits = true) {
    const all = this.members.map((each) => each.step(id, needsLogits));
    if (!needsLogits) return null;
    const totals = all.map((logits) => logSum(logits, 0, logits.length));
    for (let i = 0; i < this.logits.length; i++) {
      const scores = all.map((logits, member) => logits[i] - totals[member]), most = Math.max(...scores);
      const sum = scores.reduce((total, score) => total + Math.exp(score - most), 0);
      this.logits[i] = most + Math.log(sum / scores.length);
    }
    return this.logits;
  }
}

const KERNELS = { recurrent: Recurrent, transformer: Transformer, ngram: NGram, ensemble: Ensemble };

// A model of the file: its kernel, and what Python adds to the kernel's logits.
class Model {
  constructor({ kernel, arguments: parts, vocab_size, tails = [], tail_bias = null }) {
    this.kernel = new KERNELS[kernel](parts);
    Object.assign(this, { vocabulary: vocab_size, tails, tailBias: tail_bias });
  }
  clear() { this.kernel.clear(); }
  // Begins a text. Returns how many of its ids are read already; the last is not.
  resume(ids) {
    if (this.kernel.resume) return this.kernel.resume(ids);
    this.clear();
    return 0;
  }
  // Reads one more token. Returns the logits after it, valid until the next call; null if they are not needed.
  step(id, needsLogits = true) {
    const outputs = this.kernel.step(id, needsLogits);
    if (outputs === null) return null;
    const logits = outputs.subarray(0, this.vocabulary);
    if (this.tails.length > 0) this.finish(logits, outputs.subarray(this.vocabulary));
    return logits;
  }
  // Log-probabilities of an adaptive softmax.
  finish(logits, outputs) {
    const tails = outputs.map((logit, index) => logit + this.tailBias[index]), first = this.tails[0][0];
    const total = logSum(Float32Array.of(...logits.subarray(0, first), ...tails), 0, first + tails.length);
    for (let i = 0; i < first; i++) logits[i] -= total;
    this.tails.forEach(([begin, end], index) => {
      const change = f32(f32(tails[index] - total) - logSum(logits, begin, end));
      for (let i = begin; i < end; i++) logits[i] += change;
    });
  }
}
