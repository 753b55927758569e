const area = () => document.querySelector('TEXT');
const samplesOpen = () => Boolean(document.querySelector('SAMPLES')?.offsetParent);
// The last known text, and its parts in order: [length, piece], where piece 0 is what the visitor typed.
let text = '', parts = [];
// The newest number; the piece that is being added (or null), and how many of its characters are added.
let count = 0, writing = null, added = 0;
let isOwnInput = false;

// Replace `removed` characters at `from` by `length` characters of a piece.
const replace = (from, removed, length, piece) => {
  const before = [], after = [];
  let at = 0;
  for (const [size, owner] of parts) {
    const left = Math.max(0, Math.min(size, from - at));
    const right = Math.max(0, Math.min(size, at + size - from - removed));
    if (left) before.push([left, owner]);
    if (right) after.push([right, owner]);
    at += size;
  }
  if (length && before.length && before.at(-1)[1] === piece) before.at(-1)[0] += length;
  else if (length) before.push([length, piece]);
  parts = [...before, ...after];
};
// What differs from the last known text was typed.
const readEdits = () => {
  const now = area().value, limit = Math.min(now.length, text.length);
  if (now === text) return;
  let head = 0, tail = 0;
  while (head < limit && now[head] === text[head]) head++;
  while (tail < limit - head && now[now.length - 1 - tail] === text[text.length - 1 - tail]) tail++;
  replace(head, text.length - head - tail, now.length - head - tail, 0);
  text = now;
};
const changed = () => {
  text = area().value;
  isOwnInput = true;
  area().dispatchEvent(new Event('input', { bubbles: true }));
  isOwnInput = false;
};
const add = (addition, piece) => {
  readEdits();
  const end = text.length;
  // The caret does not move.
  area().setRangeText(addition, end, end, 'preserve');
  replace(end, 0, area().value.length - end, piece);
  changed();
};
const command = (more) => {
  readEdits();
  const pieces = [...new Set(parts.map(([, piece]) => piece).filter(Boolean))];
  return { text, pieces, new_piece: null, is_retry: false, is_possible: true, ...more };
};
const begin = (more) => {
  writing = ++count;
  added = 0;
  return command({ new_piece: writing, ...more });
};
const undo = () => {
  readEdits();
  const isEmpty = writing !== null && !parts.some(([, piece]) => piece === writing);
  writing = null;
  // A piece without text, and samples that are still open, added nothing to remove.
  if (isEmpty || samplesOpen()) return command();
  const last = parts.reduce((highest, [, piece]) => Math.max(highest, piece), 0);
  if (!last) return command({ is_possible: false });
  let at = 0, left = '';
  for (const [size, piece] of parts) {
    if (piece !== last) left += text.slice(at, at + size);
    at += size;
  }
  parts = parts.filter(([, piece]) => piece !== last);
  area().value = left;
  changed();
  return command();
};
const again = () => {
  const undone = undo();
  return undone.is_possible ? begin({ is_retry: true }) : undone;
};
const take = (sample) => {
  writing = null;
  add(sample, count);
  return command();
};
const fail = () => { writing = null; };
window.inklingEditor = { begin, undo, again, take, fail };

document.addEventListener('input', (event) => {
  if (isOwnInput || event.target !== area()) return;
  readEdits();
  if (writing === null) return;
  writing = null;
  trigger('halt');
});
watch('value', () => {
  const { piece, text: whole, ended } = props.value ?? {};
  if (piece !== writing || writing === null) return;
  const addition = whole.slice(added);
  added = whole.length;
  if (addition) add(addition, writing);
  if (ended) writing = null;
});
