const area = () => document.querySelector('TEXT');
const samplesOpen = () => Boolean(document.querySelector('SAMPLES')?.offsetParent);
// The text when it was last read, and its parts in order: [length, piece], where piece 0 is what the visitor typed.
let text = '', parts = [];
// The newest number; the piece that is being added (or null), and how many of its characters are added.
let count = 0, writing = null, added = 0;
let isOwnInput = false;
// The seed of each piece, and the text that a picked token replaces: [offset, token].
let seeds = {}, picked = null;

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
  if (length) before.push([length, piece]);
  // Neighbours of one owner are one part.
  parts = [];
  for (const part of [...before, ...after]) {
    if (parts.length && parts.at(-1)[1] === part[1]) parts.at(-1)[0] += part[0];
    else parts.push(part);
  }
};
// What differs from the text when it was last read was typed.
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
  const end = text.length, isAtEnd = area().scrollHeight - area().scrollTop - area().clientHeight < 40;
  // The caret does not move.
  area().setRangeText(addition, end, end, 'preserve');
  replace(end, 0, area().value.length - end, piece);
  changed();
  if (isAtEnd) area().scrollTop = area().scrollHeight;
};
const pieces = () => [...new Set(parts.map(([, piece]) => piece).filter(Boolean))];
const command = (more) => {
  readEdits();
  const found = pieces();
  return {
    text, parts, pieces: found, seeds: found.map((piece) => seeds[piece]).filter(Number.isInteger),
    new_piece: null, is_retry: false, is_possible: true, ...more,
  };
};
const begin = (more) => {
  readEdits();
  writing = ++count;
  added = 0;
  show();
  return command({ new_piece: writing, ...more });
};
const end = () => {
  writing = null;
  show();
  refresh(0);
};
// Where the text of a piece begins; the end of the text if nothing is left of it.
const startOf = (number) => {
  let at = 0;
  for (const [size, piece] of parts) {
    if (piece === number) return at;
    at += size;
  }
  return at;
};
const undo = () => {
  readEdits();
  const isEmpty = writing !== null && !parts.some(([, piece]) => piece === writing);
  writing = null;
  show();
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
  readEdits();
  const last = Math.max(0, ...pieces());
  const replaced = last && !samplesOpen() && (writing === null || writing === last);
  const group = replaced ? keepVersion(text.slice(0, startOf(last))) : null;
  const undone = undo();
  if (!undone.is_possible) return undone;
  if (group) newVersion(group);
  return begin({ is_retry: true });
};
const take = (sample) => {
  writing = null;
  add(sample, count);
  show();
  return command();
};
const choose = (offset, token) => { picked = [offset, token]; };
// Replace all text from an offset on by a token that the visitor picked, and continue.
const pick = () => {
  writing = null;
  readEdits();
  const [offset, token] = picked;
  if (offset < text.length) newVersion(keepVersion(text.slice(0, offset)));
  replace(offset, text.length - offset, token.length, 0);
  area().value = text.slice(0, offset) + token;
  changed();
  return begin();
};
const fail = end;

// -- the sheet around the text --------------------------------------------------------------------------------------

let refreshing;
// The views and the chart follow the text, a moment after the last change.
const refresh = (delay = 350) => {
  clearTimeout(refreshing);
  refreshing = setTimeout(() => { if (writing === null && area()?.offsetParent !== undefined) trigger('refresh'); }, delay);
};
const button = (id) => document.querySelector(`#${id}`);
const enable = (id, isEnabled) => { const found = button(id); if (found) found.disabled = !isEnabled; };
// The labels of the buttons, and which of them are enabled.
const show = () => {
  const isWriting = writing !== null, root = document.documentElement, hasPiece = parts.some(([, piece]) => piece);
  const focused = document.activeElement;
  root.classList.toggle('sheet-writing', isWriting);
  if (isWriting && focused === button('write-go')) button('write-stop').focus();
  if (!isWriting && focused === button('write-stop')) button('write-go').focus();
  const go = button('write-go');
  if (go) {
    const label = hasPiece ? 'Continue' : 'Write';
    if (go.textContent.trim() !== label) go.textContent = label;
  }
  enable('write-stop', isWriting);
  enable('write-again', hasPiece || isWriting);
  enable('write-undo', hasPiece || isWriting);
  enable('write-download', text.length > 0);
  paint();
  save();
  showBar();
};
// The text in the text area is invisible: a copy behind it has the typed and the written parts in two colours.
const paint = () => {
  const box = area();
  if (!box) return;
  let mirror = box.parentElement.querySelector('.ink');
  if (!mirror) {
    mirror = document.createElement('div');
    mirror.className = 'ink';
    mirror.setAttribute('aria-hidden', 'true');
    box.before(mirror);
    box.addEventListener('scroll', () => { mirror.scrollTop = box.scrollTop; });
    new ResizeObserver(paint).observe(box);
    box.classList.add('inked');
  }
  const style = getComputedStyle(box);
  for (const name of ['font', 'letterSpacing', 'padding', 'borderWidth']) mirror.style[name] = style[name];
  Object.assign(mirror.style, {
    left: `${box.offsetLeft}px`, top: `${box.offsetTop}px`, width: `${box.clientWidth}px`, height: `${box.clientHeight}px`,
  });
  const spans = [];
  let at = 0;
  for (const [size, piece] of parts) {
    const span = document.createElement('span');
    span.className = piece ? 'written' : 'typed';
    span.textContent = text.slice(at, at + size);
    spans.push(span);
    at += size;
  }
  mirror.replaceChildren(...spans, document.createTextNode('\u200b'));
  mirror.scrollTop = box.scrollTop;
};
const view = (name) => { document.documentElement.dataset.sheet = name; refresh(0); };

DRAFTS
window.inklingEditor = {
  begin, undo, again, take, fail, pick, choose, view, current: () => command(), sync: () => { readEdits(); show(); },
};

document.addEventListener('input', (event) => {
  if (isOwnInput || event.target !== area()) return;
  readEdits();
  const isWriting = writing !== null;
  writing = null;
  show();
  refresh();
  if (isWriting) trigger('halt');
});
watch('value', () => {
  const { piece, text: whole, ended, seed } = props.value ?? {};
  if (piece !== writing || writing === null) return;
  seeds[piece] = seed;
  const addition = whole.slice(added);
  added = whole.length;
  if (addition) add(addition, writing);
  if (ended) end(); else show();
});
openDrafts();
