// Text ↔ token ids, as lm/tokenizers. A stream gives the text of one id after the other, never half a character.

const UNKNOWN = "\ufffd";
const utf8 = new TextEncoder();
// The white space of Python's str.split().
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPACES = new RegExp(`[${SPACE}]+`, "u"), WORDS = new RegExp(`[^${SPACE}]+`, "gu");

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

// A binary heap of numbers, the least first.
class Heap {
  constructor() { this.items = []; }
  push(item) {
    const { items } = this;
    let at = items.length;
    for (let up = (at - 1) >> 1; at > 0 && items[up] > item; at = up, up = (at - 1) >> 1) items[at] = items[up];
    items[at] = item;
  }
  pop() {
    const { items } = this, least = items[0], last = items.pop();
    if (items.length === 0) return least;
    let at = 0;
    for (let down = 1; down < items.length; at = down, down = 2 * at + 1) {
      if (down + 1 < items.length && items[down + 1] < items[down]) down++;
      if (items[down] >= last) break;
      items[at] = items[down];
    }
    items[at] = last;
    return least;
  }
}

// The matches of a pattern, and what lies between them.
function isolated(text, pattern) {
  const parts = [];
  let begin = 0;
  for (const { index, 0: match } of text.matchAll(pattern)) {
    parts.push(text.slice(begin, index), match);
    begin = index + match.length;
  }
  return [...parts, text.slice(begin)].filter((part) => part);
}

// Byte pair encoding of the library tokenizers: added tokens, then normal forms, words, merges.
class PretrainedTokenizer {
  constructor(parts) {
    const { unknown, vocabulary, bytes, sizes, labels, added, special, normal_forms, words, left, right, merged } = parts;
    const { alphabet, whole_words, fallback, unknown_token, fuses_unknown, unknown_id, has_all_bytes } = parts;
    Object.assign(this, { policy: unknown, labels, alphabet, fallback, merged });
    Object.assign(this, { forms: normal_forms, wholeWords: whole_words, fusesUnknown: fuses_unknown });
    this.unknownToken = unknown_token;
    this.unknown = has_all_bytes ? null : unknown_id;
    Object.assign(this, { doublesSpace: parts.doubles_first_space, dropsSpace: parts.drops_first_space });
    const always = () => true, recomposed = (word) => word !== word.normalize("NFC");
    this.altered = [];
    if (parts.alters_space) this.altered.push([/\u2581/gu, always]);
    if (parts.composes) this.altered.push([WORDS, recomposed]);
    this.ids = new Map(vocabulary.map((name, id) => [name, id]).filter(([name]) => name !== null));
    this.width = vocabulary.length;
    this.ranks = new Map(Array.from(left, (id, rank) => [id * this.width + right[rank], rank]));
    let at = 0;
    this.table = Array.from(sizes, (size) => bytes.subarray(at, (at += size)));
    this.added = new Map(added);
    const contents = [...this.added.keys(), ...special].sort((a, b) => b.length - a.length);
    const escaped = contents.map((each) => each.replace(/[\\^$.*+?()[\]{}|/]/gu, "\\$&"));
    this.finds = contents.length ? new RegExp(escaped.join("|"), "gu") : null;
    this.words = words.map((step) => (step.pattern ? { ...step, pattern: new RegExp(step.pattern, "gu") } : step));
  }

  encode(text) {
    text = this.unaltered(withoutSurrogates(text, this.policy));
    if (this.doublesSpace && text.startsWith(" ")) text = " " + text;
    const ids = [];
    let begin = 0;
    for (const { index, 0: match } of this.finds ? text.matchAll(this.finds) : []) {
      const id = this.added.get(match);
      if (id === undefined) continue; // a special token: text is text
      this.encodePart(text.slice(begin, index), begin === 0, ids);
      ids.push(id);
      begin = index + match.length;
    }
    this.encodePart(text.slice(begin), begin === 0, ids);
    if (this.unknown === null || this.policy === "replace" || !ids.includes(this.unknown)) return ids;
    if (this.policy === "error") throw new Error("The prompt has a symbol outside the vocabulary of this model.");
    return ids.filter((id) => id !== this.unknown);
  }

  // The policies error and skip, for what the normal forms change.
  unaltered(text) {
    if (this.policy !== "error" && this.policy !== "skip") return text;
    for (const [pattern, isAltered] of this.altered) {
      text = text.replace(pattern, (symbol) => {
        if (!isAltered(symbol)) return symbol;
        if (this.policy === "skip") return "";
        throw new Error(`${JSON.stringify(symbol)} is outside the vocabulary of this model.`);
      });
    }
    return text;
  }

  encodePart(text, isFirst, ids) {
    if (!text) return;
    for (const { form, from, to } of this.forms) {
      if (form === "nfc") text = text.normalize("NFC");
      else if (form === "prepend") text = to + text;
      else text = text.replaceAll(from, to);
    }
    let words = [text];
    for (const step of this.words) words = words.flatMap((word) => this.cut(word, step, isFirst));
    for (const word of words) this.merge(word, ids);
  }

  cut(word, { pattern, space, prepends, splits }, isFirst) {
    if (pattern) return isolated(word, pattern);
    word = word.replaceAll(" ", space);
    if (!word.startsWith(space) && (prepends === "always" || (prepends === "first" && isFirst))) word = space + word;
    if (!splits) return [word];
    const words = word.split(space);
    return [words[0], ...words.slice(1).map((each) => space + each)].filter((each) => each);
  }

  // Joins the neighbours of the lowest rank, the first of equals, until none have a rank.
  merge(word, ids) {
    if (this.alphabet) word = Array.from(utf8.encode(word), (value) => this.alphabet[value]).join("");
    const whole = this.wholeWords ? this.ids.get(word) : undefined;
    if (whole !== undefined) return ids.push(whole);
    const tokens = this.symbols(word), count = tokens.length, heap = new Heap();
    const next = tokens.map((_, i) => i + 1), before = tokens.map((_, i) => i - 1);
    const rankOf = (i) => this.ranks.get(tokens[i] * this.width + tokens[next[i]]);
    const offer = (i) => {
      const rank = i >= 0 && next[i] < count ? rankOf(i) : undefined;
      if (rank !== undefined) heap.push(rank * 2 ** 32 + i);
    };
    for (let i = 0; i < count; i++) offer(i);
    while (heap.items.length > 0) {
      const key = heap.pop(), i = key % 2 ** 32, rank = Math.floor(key / 2 ** 32), joined = next[i];
      // A neighbour has been joined since.
      if (tokens[i] < 0 || joined >= count || rankOf(i) !== rank) continue;
      [tokens[i], tokens[joined], next[i]] = [this.merged[rank], -1, next[joined]];
      if (next[i] < count) before[next[i]] = i;
      offer(before[i]);
      offer(i);
    }
    for (const token of tokens) if (token >= 0) ids.push(token);
  }

  // The tokens of single characters.
  symbols(word) {
    const found = [];
    let wasUnknown = false;
    for (const char of word) {
      const id = this.ids.get(char), known = id !== undefined ? [id] : this.fallback ? this.spelled(char) : [];
      if (known.length) found.push(...known);
      else if (this.unknownToken !== null && !(this.fusesUnknown && wasUnknown)) found.push(this.unknownToken);
      wasUnknown = known.length === 0;
    }
    return found;
  }
  // The tokens of the bytes of a character; none if one is missing.
  spelled(char) {
    const hex = (value) => value.toString(16).toUpperCase().padStart(2, "0");
    const ids = Array.from(utf8.encode(char), (value) => this.ids.get(`<0x${hex(value)}>`));
    return ids.includes(undefined) ? [] : ids;
  }

  piece(id) {
    return this.labels[id] ?? new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.table[id]);
  }
  stream(after = []) {
    const whole = byteStream(this.table);
    if (!this.dropsSpace || after.some((id) => this.table[id].length)) return whole;
    let begins = true;
    const feed = (id) => {
      const text = whole.feed(id);
      if (!begins || !text) return text;
      begins = false;
      return text.startsWith(" ") ? text.slice(1) : text;
    };
    return { feed, end: whole.end };
  }
}

const TOKENIZERS = {
  byte: ByteTokenizer, char: CharTokenizer, word: WordTokenizer, subword: SubwordTokenizer,
  pretrained: PretrainedTokenizer,
};
