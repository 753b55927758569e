// The chart of the next token. The server sends the logits; the browser does the rest, so it follows the sliders.
const MOST_BARS = LIMIT;
let options = DEFAULTS;
let shown = null;
const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const visible = (text) => text.replace(/\n/g, '↵').replace(/\t/g, '→').replace(/ /g, '␣') || '·';
const percent = (share) => {
  if (share === 0) return '0';
  return share >= 0.0995 ? `${(100 * share).toFixed(0)}%` : share >= 0.001 ? `${(100 * share).toFixed(1)}%` : '<0.1%';
};
const count = (number) => number.toLocaleString('en');
const bold = (text) => `<b>“${escaped(text)}”</b>`;
const floats = (encoded) => {
  const bytes = Uint8Array.from(atob(encoded), (sign) => sign.charCodeAt(0));
  return Float64Array.from(new Float32Array(bytes.buffer));
};

const sentence = (position, before, after, best, name) => {
  const where = position.before ? `After ${bold(position.before)}` : 'At the start of a text';
  const top = before.indexOf(Math.max(...before)), kept = after.filter((share) => share > 0).length;
  const parts = [`${where}, the model gives ${escaped(percent(before[top]))} to ${bold(visible(name(top)))}.`];
  if (kept === 1) parts.push(`Your settings keep only ${bold(visible(name(best)))}.`);
  else parts.push(`Your settings keep ${count(kept)} of ${count(before.length)} tokens and give it ${escaped(percent(after[top]))}.`);
  if (position.actual !== null) {
    const share = after[position.actual];
    const settings = share ? `${escaped(percent(share))} with your settings` : 'excluded by your settings';
    parts.push(`The text has ${bold(visible(name(position.actual)))}: ${escaped(percent(before[position.actual]))} in the model, ${settings}.`);
  }
  if (position.unknown) parts.push('The text has a symbol outside the vocabulary: the model reads it as unknown.');
  return `<p class="said" aria-live="polite">${parts.join(' ')}</p>`;
};
const shares = (before, after) =>
  `<span class="share">${escaped(percent(before))}</span><b class="share">${after ? escaped(percent(after)) : '–'}</b>`;
const bar = (token, before, after, scale, name, position) => {
  const kinds = `${token === position.actual ? ' chosen' : ''}${after === 0 ? ' out' : ''}`;
  const width = (share) => Math.min(100, (100 * share) / scale).toFixed(2);
  return `<button type="button" class="bar${kinds}" data-token="${token}" title="Continue with this token">`
    + `<span class="token">${escaped(visible(name(token)))}</span><span class="lanes">`
    + `<span class="lane before" style="width:${width(before)}%"></span>`
    + `<span class="lane after${after > scale ? ' beyond' : ''}" style="width:${width(after)}%"></span></span>`
    + `${shares(before, after)}</button>`;
};
// All tokens side by side, as wide as their probabilities, in the order of their ids: the number falls on one.
const line = (after, position, name) => {
  const parts = [];
  let small = 0, odd = false;
  const gap = () => { if (small > 0) parts.push(`<i class="small" style="flex-grow:${small}"></i>`); small = 0; };
  after.forEach((share, token) => {
    if (share < 0.01) { small += share; return; }
    gap();
    odd = !odd;
    const drawn = position.number !== null && token === position.actual ? ' drawn' : '';
    parts.push(`<i class="${odd ? 'odd' : 'even'}${drawn}" style="flex-grow:${share}" title="${escaped(visible(name(token)))} ${escaped(percent(share))}">`
      + `${share >= 0.06 ? escaped(visible(name(token))) : ''}</i>`);
  });
  gap();
  const mark = position.number === null ? '' : `<span class="drop" style="left:${100 * position.number}%"></span>`;
  const drawn = position.number === null ? 'The draw: a random number from 0 to 1 falls on one token.'
    : `The number ${position.number.toFixed(3)} falls on ${visible(name(position.actual))}.`;
  return `<div class="line" role="img" aria-label="${escaped(drawn)}"><div class="parts">${parts.join('')}</div>${mark}</div>`
    + `<p class="number">${escaped(drawn)}</p>`;
};
const chart = (position) => {
  const { logits } = position, name = (token) => position.texts[token] ?? `#${token}`;
  const before = inklingFilters.softmax(logits), after = inklingFilters.probabilities(logits, options, position);
  const order = [...before.keys()].sort((a, b) => before[b] - before[a] || a - b);
  const best = after.reduce((most, share, token) => (share > after[most] ? token : most), 0);
  // No bar moves when a setting changes: the order is the model's, and so is the scale.
  const listed = new Set([...order.slice(0, MOST_BARS), best, ...(position.actual === null ? [] : [position.actual])]);
  const ranked = order.filter((token) => listed.has(token));
  const scale = Math.min(1, 2 * before[order[0]]) || 1;
  const others = order.filter((token) => !listed.has(token));
  const sum = (values) => others.reduce((total, token) => total + values[token], 0);
  const rest = others.length ? `<div class="rest"><span>${count(others.length)} other${others.length > 1 ? 's' : ''}</span>${shares(sum(before), sum(after))}</div>` : '';
  return `${sentence(position, before, after, best, name)}<div class="legend"><span class="key before"></span>the model`
    + '<span class="key after"></span><b>with your settings</b></div>'
    + `<div class="rows">${ranked.map((token) => bar(token, before[token], after[token], scale, name, position)).join('')}${rest}</div>`
    + line(after, position, name);
};
const render = () => {
  const box = element.querySelector('.bars');
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.token : undefined;
  box.innerHTML = shown ? chart(shown) : EMPTY;
  if (focused) box.querySelector(`[data-token="${focused}"]`)?.focus();
};
const read = () => {
  const { value } = props;
  if (value?.error) { shown = null; element.querySelector('.bars').innerHTML = `<p class="said">${escaped(value.error)}</p>`; return; }
  shown = value?.logits ? { ...value, logits: floats(value.logits) } : null;
  render();
};
window.inklingChart = {
  settings: (names, values, off) => {
    options = { ...options };
    names.forEach((name, index) => {
      options[name] = values[index] === off[index] || values[index] === null ? null : Number(values[index]);
    });
    if (shown) render();
  },
};
element.addEventListener('click', (event) => {
  const picked = event.target.closest('.bar');
  if (!picked || !shown) return;
  const text = shown.texts[picked.dataset.token];
  // A part of a character is no text: it cannot be added.
  if (!text || text.includes('\ufffd')) return;
  window.inklingEditor.choose(shown.offset, text);
  trigger('pick');
});
if (window.inklingSettings) window.inklingChart.settings(...window.inklingSettings);
watch('value', read);
read();
