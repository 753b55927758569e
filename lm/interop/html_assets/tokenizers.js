// Text ↔ token ids, as lm/tokenizers. A stream gives the text of one id after the other, never half a character.

const UNKNOWN = "\ufffd";
const utf8 = new TextEncoder();
// The white space of Python's str.split().
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/u;

// The text without lone surrogates, which have no UTF-8 bytes.
function withoutSurrogates(text, policy) {
  if (policy === "error" && /\p{Cs}/u.test(text)) throw new Error("The prompt has half of a UTF-16 pair.");
  return text.replace(/\p{Cs}/gu, policy === "skip" ? "" : UNKNOWN);
}

// The ids of symbols; the policy decides about those outside the vocabulary.
function lookUp(symbols, ids, policy, unknown) {
  const found = [];
  for (const symbol of symbols) {
    const id = ids.get(symbol);
    if (id !== undefined) found.push(id);
    else if (policy === "error") throw new Error(`${JSON.stringify(symbol)} is outside the vocabulary of this model.`);
    else if (policy !== "skip") found.push(unknown);
  }
  return found;
}

function byteStream(table) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return {
    feed: (id) => decoder.decode(table[id], { stream: true }),
    end: () => decoder.decode(),
  };
}

const singleBytes = Array.from({ length: 256 }, (_, value) => Uint8Array.of(value));

class ByteTokenizer {
  constructor({ unknown }) { this.policy = unknown; }
  encode(text) { return [...utf8.encode(withoutSurrogates(text, this.policy))]; }
  stream() { return byteStream(singleBytes); }
}

class CharTokenizer {
  constructor({ unknown, vocabulary, unknown_id }) {
    this.policy = unknown;
    this.symbols = [...vocabulary, UNKNOWN];
    this.unknown = unknown_id;
    this.ids = new Map([...vocabulary].map((char, id) => [char, id]));
  }
  encode(text) { return lookUp(text, this.ids, this.policy, this.unknown); }
  stream() { return { feed: (id) => this.symbols[id], end: () => "" }; }
}

class WordTokenizer {
  constructor({ unknown, vocabulary, unknown_id, start_id }) {
    Object.assign(this, { policy: unknown, words: vocabulary, unknown: unknown_id, start: start_id });
    this.ids = new Map(vocabulary.map((word, id) => [word, id]));
  }
  encode(text) {
    const words = text.replaceAll("\n", ` ${this.words[this.start]} `).split(SPACES).filter((word) => word);
    return lookUp(words, this.ids, this.policy, this.unknown);
  }
  stream(after = []) {
    let lineStart = after.length === 0 || after.at(-1) === this.start;
    const feed = (id) => {
      const isEnd = id === this.start, text = isEnd ? "\n" : (lineStart ? "" : " ") + this.words[id];
      lineStart = isEnd;
      return text;
    };
    return { feed, end: () => "" };
  }
}

// Pieces of sentencepiece, with spaces in place of U+2581: `first` is the first of them, bytes come before.
class SubwordTokenizer {
  constructor({ unknown, algorithm, pieces, scores, first }) {
    Object.assign(this, { policy: unknown, algorithm, first });
    this.bytesAt = first - 256;
    this.scores = scores;
    this.ids = new Map(pieces.map((piece, index) => [piece, first + index]));
    this.longest = Math.max(...pieces.map((piece) => [...piece].length));
    this.unknownScore = scores.reduce((least, score) => Math.min(least, score), Infinity) - 10;
    this.table = [utf8.encode(UNKNOWN), new Uint8Array(), ...singleBytes, ...pieces.map((piece) => utf8.encode(piece))];
    // Merges never cross a border between a word and a space, if no piece does.
    this.parts = pieces.some((piece) => /[^ ] /u.test(piece)) ? /[^]+/gu : / *[^ ]+| +/gu;
  }
  encode(text) {
    const ids = [];
    for (const [line] of withoutSurrogates(text, this.policy).matchAll(/\u2581|[^\n\u2581]*\n|[^\n\u2581]+/gu)) {
      if (line === "\u2581") this.spell(line, ids);
      else if (this.algorithm === "unigram") this.likeliest([...line], ids);
      else for (const [part] of line.matchAll(this.parts)) this.merge([...part], ids);
    }
    return ids;
  }
  spell(symbol, ids) {
    for (const value of utf8.encode(symbol)) ids.push(this.bytesAt + value);
  }
  // Joins the neighbours that make the piece of the highest score, the first of equals, until none do.
  merge(symbols, ids) {
    for (;;) {
      let best = -1, most = -Infinity;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const id = this.ids.get(symbols[i] + symbols[i + 1]);
        if (id !== undefined && this.scores[id - this.first] > most) [best, most] = [i, this.scores[id - this.first]];
      }
      if (best < 0) break;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
    }
    for (const symbol of symbols) {
      const id = this.ids.get(symbol);
      if (id === undefined) this.spell(symbol, ids);
      else ids.push(id);
    }
  }
  // The pieces with the highest sum of scores, which is float32.
  likeliest(symbols, ids) {
    const best = new Float32Array(symbols.length + 1), from = new Array(symbols.length + 1).fill(-1), pieces = [];
    const offer = (begin, end, score, id) => {
      if (from[end] >= 0 && score + best[begin] <= best[end]) return;
      [best[end], from[end], pieces[end]] = [score + best[begin], begin, id];
    };
    for (let begin = 0; begin < symbols.length; begin++) {
      let piece = "", single = false;
      for (let end = begin + 1; end <= Math.min(symbols.length, begin + this.longest); end++) {
        piece += symbols[end - 1];
        const id = this.ids.get(piece);
        if (id === undefined) continue;
        offer(begin, end, this.scores[id - this.first], id);
        single ||= end === begin + 1;
      }
      if (!single) offer(begin, begin + 1, this.unknownScore, -1);
    }
    const path = [];
    for (let end = symbols.length; end > 0; end = from[end]) path.push([from[end], pieces[end]]);
    for (const [begin, id] of path.reverse()) {
      if (id < 0) this.spell(symbols[begin], ids);
      else ids.push(id);
    }
  }
  stream() { return byteStream(this.table); }
}

const TOKENIZERS = { byte: ByteTokenizer, char: CharTokenizer, word: WordTokenizer, subword: SubwordTokenizer };
