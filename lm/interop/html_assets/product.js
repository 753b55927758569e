// The memory of a model, and products of its int8 matrices: whole numbers, exact. A small WebAssembly module multiplies;
// where a browser has none, JavaScript does the same.
//
// The memory begins with the arrays of the file. Behind them lie the operands of a product: the inputs as int16, and the
// sums as int32. Each row of an int8 matrix begins at a multiple of ROW bytes and ends with zeros.

const ROW = 16;
const PAGE_BYTES = 65536;

// The module: sum[row] = row · inputs, for `rows` rows of `stride` bytes.
function productModule() {
  const [CODES, STRIDE, ROWS, INPUTS, SUMS, END, AT, FIRST, SECOND] = Array(9).keys();
  const I32 = 0x7f, V128 = 0x7b, VOID = 0x40, END_OF_BLOCK = 0x0b;
  const number = (value) => (value < 128 ? [value] : [(value & 127) | 128, ...number(value >> 7)]);
  const list = (items) => [...number(items.length), ...items.flat()];
  const section = (id, bytes) => [id, ...number(bytes.length), ...bytes];
  const name = (text) => list([...text].map((char) => [char.charCodeAt(0)]));
  const get = (local) => [0x20, local], set = (local) => [0x21, local], constant = (value) => [0x41, value];
  const add = [0x6a], subtract = [0x6b], isLess = [0x49], repeatIf = [0x0d, 0];
  const vector = (code, ...more) => [0xfd, ...number(code), ...more];
  const zeros = vector(0x0c, ...Array(16).fill(0)), addVectors = vector(0xae), dot = vector(0xba);
  const load8 = (offset) => vector(0x01, 0, offset), load16 = (offset) => vector(0x00, 0, offset);
  const lane = (index) => vector(0x1b, index), store = [0x36, 2, 0];
  const step = (local, by) => [...get(local), ...constant(by), ...add, ...set(local)];
  const loop = (...body) => [0x03, VOID, ...body.flat(), END_OF_BLOCK];
  const addDot = (sum, codes, inputs) => [
    ...get(sum), ...get(CODES), ...load8(codes), ...get(AT), ...load16(inputs), ...dot, ...addVectors, ...set(sum),
  ];
  const total = [0, 1, 2, 3].map((index) => [...get(FIRST), ...lane(index), ...(index ? add : [])]).flat();
  const code = [
    ...loop(
      [...get(CODES), ...get(STRIDE), ...add, ...set(END), ...get(INPUTS), ...set(AT)],
      [...zeros, ...set(FIRST), ...zeros, ...set(SECOND)],
      loop(
        addDot(FIRST, 0, 0), addDot(SECOND, 8, 16), step(CODES, ROW), step(AT, 2 * ROW),
        [...get(CODES), ...get(END), ...isLess, ...repeatIf],
      ),
      [...get(FIRST), ...get(SECOND), ...addVectors, ...set(FIRST), ...get(SUMS), ...total, ...store],
      [...step(SUMS, 4), ...get(ROWS), ...constant(1), ...subtract, 0x22, ROWS, ...repeatIf],
    ),
    END_OF_BLOCK,
  ];
  const body = [...list([[2, I32], [2, V128]]), ...code];
  return Uint8Array.from([
    0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, list([[0x60, ...list(Array(5).fill([I32])), 0]])),
    ...section(2, list([[...name("model"), ...name("memory"), 0x02, 0, 1]])),
    ...section(3, list([[0]])),
    ...section(7, list([[...name("multiply"), 0, 0]])),
    ...section(10, list([[...number(body.length), ...body]])),
  ]);
}

class Memory {
  // Bytes of the arrays of the file, of the inputs and of the sums.
  constructor({ arrays, inputs, sums }) {
    const align = (bytes) => Math.ceil(bytes / ROW) * ROW;
    this.arrays = arrays;
    this.inputsAt = align(arrays);
    this.sumsAt = this.inputsAt + align(inputs);
    this.open(Math.ceil((this.sumsAt + sums) / PAGE_BYTES) || 1);
    this.inputs = new Int16Array(this.buffer, this.inputsAt, inputs / 2);
    this.sums = new Int32Array(this.buffer, this.sumsAt, sums / 4);
  }
  open(pages) {
    try {
      const memory = new WebAssembly.Memory({ initial: pages });
      const instance = new WebAssembly.Instance(new WebAssembly.Module(productModule()), { model: { memory } });
      this.buffer = memory.buffer;
      this.run = instance.exports.multiply;
    } catch {
      this.buffer = new ArrayBuffer(pages * PAGE_BYTES);
      this.run = null;
    }
  }
  // `sums`: each row of a matrix times `inputs`.
  multiply({ codes, rows, stride }) {
    if (this.run) return this.run(codes.byteOffset, stride, rows, this.inputsAt, this.sumsAt);
    const { inputs, sums } = this;
    for (let row = 0, at = 0; row < rows; row++) {
      let sum = 0;
      for (let k = 0; k < stride; k++, at++) sum += codes[at] * inputs[k];
      sums[row] = sum;
    }
  }
}

// A matrix (rows, columns) of the file: float32 `values`, or int8 `codes` in rows of `stride` and a scale for each row.
class Matrix {
  constructor({ rows, columns, values = null, codes = null, stride = columns, scales = null, memory = null }) {
    Object.assign(this, { rows, columns, values, codes, stride, scales, memory });
  }
  // All values, row by row.
  all() {
    if (this.values) return this.values;
    const all = new Float32Array(this.rows * this.columns);
    for (let row = 0; row < this.rows; row++) all.set(this.row(row), row * this.columns);
    return all;
  }
  row(index) {
    if (this.values) return this.values.subarray(index * this.columns, (index + 1) * this.columns);
    const row = new Float32Array(this.columns), scale = this.scales[index], begin = index * this.stride;
    for (let i = 0; i < row.length; i++) row[i] = this.codes[begin + i] * scale;
    return row;
  }
}

// int8 matrices with a bias, ready to multiply: matrices below each other are one.
class Product {
  constructor(matrices, bias = null) {
    this.matrices = matrices;
    this.inputs = matrices[0].columns;
    this.outputs = matrices.reduce((sum, each) => sum + each.rows, 0);
    this.bias = bias ?? new Float32Array(this.outputs);
  }

  // to[i] = row i times the inputs from[begin...], plus the bias. Inputs are rounded to int8 times a scale.
  multiply(from, to, begin = 0) {
    const { inputs, bias, matrices } = this, { memory } = matrices[0];
    let most = 0;
    for (let k = 0; k < inputs; k++) most = Math.max(most, Math.abs(from[begin + k]));
    const inverse = most > 0 ? f32(127 / most) : 0, scale = f32(most / 127);
    // Rounded to the nearest integer, halves to even, by adding and taking away 1.5 * 2^52.
    for (let k = 0; k < inputs; k++) {
      memory.inputs[k] = (from[begin + k] * inverse + 6755399441055744) - 6755399441055744;
    }
    let first = 0;
    for (const matrix of matrices) {
      memory.multiply(matrix);
      const { sums } = memory, { rows, scales } = matrix;
      for (let row = 0; row < rows; row++) {
        to[first + row] = f32(sums[row]) * f32(scales[row] * scale) + bias[first + row];
      }
      first += rows;
    }
  }
}
