// A line chart by uPlot. The value: {lines, x_title, y_title, x_end, file}; a line: {name, colour, x, y, low, high, thin, best}.
const HEIGHT = 300, FIRST_DROP = 0.03;
const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const number = (value, digits = 4) => value.toLocaleString('en', { maximumSignificantDigits: digits });
const settings = { logX: false, logY: false, smoothing: 0 };
const hidden = new Set();
let data = null, plot = null, shape = '', at = null;

const holder = make('div', { className: 'plot', tabIndex: 0 });
holder.setAttribute('role', 'group');
const keys = make('ul');
const readout = make('p', { className: 'said' });
readout.setAttribute('aria-live', 'polite');
const title = make('span', { className: 'title' });
const below = make('div', { className: 'title below' });
const toggle = (name, label) => {
  const box = make('input', { type: 'checkbox' });
  box.addEventListener('change', () => { settings[name] = box.checked; draw(); });
  return make('label', {}, box, label);
};
const slider = make('input', { type: 'range', min: 0, max: 0.98, step: 0.02, value: 0 });
slider.addEventListener('input', () => { settings.smoothing = Number(slider.value); draw(); });
const button = (text, act) => {
  const made = make('button', { type: 'button', textContent: text });
  made.addEventListener('click', act);
  return made;
};
const tools = make(
  'div', { className: 'tools' }, title, toggle('logY', 'Log scale'), toggle('logX', 'Log x'),
  make('label', {}, 'Smoothing', slider), button('PNG', savePicture), button('CSV', saveTable),
);
const root = make('div', { className: 'curves' }, tools, holder, below, keys, readout);

// -- numbers ------------------------------------------------------------------------------------------

// Exponential mean, corrected for its start, as TensorBoard smooths.
function smooth(values, weight) {
  let last = 0, sum = 0;
  return values.map((value) => {
    last = last * weight + value * (1 - weight);
    sum = sum * weight + (1 - weight);
    return last / sum;
  });
}

// Only points that the scales can show.
function visiblePoints(line) {
  const weight = settings.smoothing, columns = [line.y, line.low ?? [], line.high ?? []];
  const [y, low, high] = weight ? columns.map((column) => smooth(column, weight)) : columns;
  const kept = line.x.map((_, index) => index).filter((index) => (
    (!settings.logX || line.x[index] > 0) && (!settings.logY || (low[index] ?? y[index]) > 0)
  ));
  const pick = (column) => kept.map((index) => column[index]);
  return { x: pick(line.x), y: pick(y), raw: pick(line.y), low: pick(low), high: pick(high) };
}

function roundTicks(low, high, most, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      found.push(...[1, 2, 5].map((digit) => digit * 10 ** power));
    }
    const inside = found.filter((tick) => tick >= low && tick <= high);
    if (inside.length > 2) return inside;
  }
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = [1, 2, 5, 10, 20].map((digit) => digit * power).find((size) => (high - low) / size <= most);
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high * (1 + 1e-12); index += 1) ticks.push(index * step);
  return ticks;
}

const span = (values, least) => values.reduce(
  ([low, high], value) => [Math.min(low, value), Math.max(high, value)], least ?? [Infinity, -Infinity],
);

// -- the chart ----------------------------------------------------------------------------------------

function draw() {
  if (!element.contains(root)) element.append(root);
  const value = props.value;
  data = value && value.lines ? value : null;
  root.hidden = !data;
  if (!data) { plot?.destroy(); plot = null; shape = ''; return; }
  title.textContent = data.y_title;
  below.textContent = data.x_title;
  holder.setAttribute('aria-label', `${data.y_title} by ${data.x_title}: ${data.lines.map((line) => line.name).join(', ')}. `
    + 'The arrow keys read the values.');
  const shown = data.lines.map(visiblePoints);
  const tables = shown.map((line, index) => {
    const columns = [line.x, line.y];
    if (settings.smoothing) columns.push(line.raw);
    if (data.lines[index].low) columns.push(line.low, line.high);
    return columns;
  }).map((columns) => (columns[0].length ? columns : columns.map(() => [])));
  const columns = uPlot.join(tables);
  const next = JSON.stringify([settings, data.x_title, data.y_title, data.lines.map((line) => [line.name, line.colour, !!line.low])]);
  if (plot && next === shape && holder.contains(plot.root)) {
    const zoomed = plot.zoomed;
    plot.shown = shown;
    plot.setData(columns, !zoomed);
    if (zoomed) plot.redraw();
  } else {
    plot?.destroy();
    shape = next;
    build(shown, columns);
  }
  showKeys();
}

function build(shown, columns) {
  const series = [{}], bands = [], main = [];
  data.lines.forEach((line, index) => {
    const show = !hidden.has(line.name);
    main.push(series.length);
    series.push({
      stroke: line.colour + (line.thin ? '99' : ''), width: line.thin ? 1.2 : 2, spanGaps: true, show,
      points: { show: !line.thin && line.x.length <= 40 && !settings.smoothing, size: 6, fill: line.colour },
    });
    if (settings.smoothing) {
      series.push({ stroke: `${line.colour}40`, width: 1, spanGaps: true, show, points: { show: false } });
    }
    if (line.low) {
      const edge = { stroke: 'transparent', width: 0, spanGaps: true, show, points: { show: false } };
      series.push({ ...edge }, { ...edge });
      bands.push({ series: [series.length - 1, series.length - 2], fill: `${line.colour}2e` });
    }
  });
  const style = getComputedStyle(root);
  const colour = (name) => () => style.getPropertyValue(name).trim() || style.color;
  const axis = (log, most) => ({
    stroke: colour('--body-text-color'), font: '12px system-ui, sans-serif', grid: { stroke: colour('--border-color-primary'), width: 1 },
    ticks: { show: false }, splits: (chart, _, low, high) => roundTicks(low, high, most, log), filter: (_, splits) => splits,
    values: (_, splits) => splits.map((tick) => number(tick, 6)),
  });
  const isWhole = (low, high, xs) => low <= xs[0] && high >= xs[xs.length - 1];
  const wholeRange = (low, high) => {
    const end = Math.max(data.x_end ?? 0, high);
    return settings.logX ? [low, end > low ? end : low * 2] : [Math.min(0, low), end || 1];
  };
  const options = {
    width: Math.max(200, holder.clientWidth), height: HEIGHT, series, bands, legend: { show: false },
    scales: {
      x: {
        time: false, distr: settings.logX ? 3 : 1,
        range: (chart, low, high) => {
          chart.zoomed = !isWhole(low, high, (chart.data ?? columns)[0]);
          // The vertical range follows this one, before uPlot stores it.
          chart.span = chart.zoomed ? [low, high] : wholeRange(low, high);
          return chart.span;
        },
      },
      y: { distr: settings.logY ? 3 : 1, range: (chart) => heights(chart) },
    },
    axes: [{ ...axis(settings.logX, 8), size: 28 }, { ...axis(settings.logY, 6), size: 60 }],
    cursor: { dataIdx: nearest, points: { size: 9 }, drag: { x: true, y: false }, focus: { prox: -1 } },
    hooks: { setCursor: [showKeys], draw: [drawBest] },
  };
  plot = new uPlot(options, columns, holder);
  Object.assign(plot, { shown, main });
}

// The first drop of the training loss would flatten the rest.
function heights(chart) {
  const [min, max] = chart.span ?? [-Infinity, Infinity], shown = chart.shown ?? data.lines.map(visiblePoints);
  const last = Math.max(...shown.map((line) => line.x[line.x.length - 1] ?? 0));
  const begin = chart.zoomed ? -Infinity : FIRST_DROP * last;
  let [low, high] = [Infinity, -Infinity];
  shown.forEach((line, index) => {
    if (hidden.has(data.lines[index].name)) return;
    const from = data.lines[index].thin ? begin : -Infinity;
    const inside = line.x.map((_, point) => point).filter((point) => line.x[point] >= Math.max(min, from) && line.x[point] <= max);
    const values = inside.flatMap((point) => [line.y[point], line.low[point], line.high[point]]).filter(Number.isFinite);
    [low, high] = span(values, [low, high]);
  });
  if (low > high) return settings.logY ? [1, 10] : [0, 1];
  if (settings.logY) return low === high ? [low / 2, high * 2] : [low / 1.05, high * 1.05];
  const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.5;
  return [low - margin, high + margin];
}

// Curves have their points at different x: each shows the one that is nearest to the pointer.
function nearest(chart, index, hovered) {
  const xs = chart.data[0], ys = chart.data[index];
  let before = hovered, after = hovered;
  while (before >= 0 && ys[before] == null) before -= 1;
  while (after < xs.length && ys[after] == null) after += 1;
  if (before < 0) return after < xs.length ? after : null;
  if (after >= xs.length) return before;
  return xs[hovered] - xs[before] <= xs[after] - xs[hovered] ? before : after;
}

function drawBest(chart) {
  const { ctx } = chart, scale = devicePixelRatio || 1;
  data.lines.forEach((line) => {
    if (line.best == null || hidden.has(line.name)) return;
    const x = chart.valToPos(line.x[line.best], 'x', true), y = chart.valToPos(line.y[line.best], 'y', true);
    const { left, top, width, height } = chart.bbox;
    if (!(x >= left && x <= left + width && y >= top && y <= top + height)) return;
    ctx.save();
    ctx.strokeStyle = line.colour;
    ctx.lineWidth = 1.5 * scale;
    ctx.beginPath();
    ctx.arc(x, y, 7 * scale, 0, 2 * Math.PI);
    ctx.stroke();
    ctx.restore();
  });
}

function showKeys() {
  if (!plot?.main) return;
  const values = [];
  const items = data.lines.map((line, index) => {
    const point = plot.cursor.left >= 0 ? plot.cursor.idxs?.[plot.main[index]] : null;
    const facts = [];
    if (point != null && plot.data[plot.main[index]][point] != null) {
      const value = number(plot.data[plot.main[index]][point], 5);
      facts.push(`${value} at ${number(plot.data[0][point], 6)}`);
      if (!hidden.has(line.name)) values.push(`${line.name} ${value} at ${data.x_title} ${number(plot.data[0][point], 6)}`);
    } else if (line.best != null) {
      facts.push(`best ${number(line.y[line.best], 5)} at ${number(line.x[line.best], 6)}`);
    }
    return [line, facts.join('')];
  });
  // The buttons stay, so that the focus stays.
  while (keys.children.length > items.length) keys.lastChild.remove();
  items.forEach(([line, facts], index) => {
    let item = keys.children[index];
    if (!item) {
      const press = make('button', { type: 'button' }, make('i'), make('span', { className: 'name' }), make('span', { className: 'value' }));
      press.addEventListener('click', () => switchLine(data.lines[index].name));
      item = make('li', {}, press);
      keys.append(item);
    }
    const [press] = item.children, [mark, name, value] = press.children;
    mark.style.background = line.colour;
    mark.className = line.thin ? 'thin' : '';
    name.textContent = line.name;
    value.textContent = facts;
    press.setAttribute('aria-pressed', String(!hidden.has(line.name)));
    press.title = 'Show or hide this curve';
  });
  readout.textContent = document.activeElement === holder ? values.join('; ') : '';
}

function switchLine(name) {
  if (hidden.has(name)) hidden.delete(name); else hidden.add(name);
  plot.batch(() => {
    data.lines.forEach((line, index) => {
      const end = plot.main[index + 1] ?? plot.series.length;
      for (let series = plot.main[index]; series < end; series += 1) plot.setSeries(series, { show: !hidden.has(line.name) });
    });
  });
  // The heights of the others may differ.
  plot.setScale('x', { min: plot.scales.x.min, max: plot.scales.x.max });
  showKeys();
}

holder.addEventListener('keydown', (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!plot || (!step && event.key !== 'Escape')) return;
  event.preventDefault();
  if (event.key === 'Escape') { at = null; plot.setCursor({ left: -10, top: -10 }); return; }
  const last = plot.data[0].length - 1;
  at = at == null ? (step > 0 ? 0 : last) : Math.max(0, Math.min(last, at + step));
  plot.setCursor({ left: plot.valToPos(plot.data[0][at], 'x'), top: plot.over.clientHeight / 2 });
});

new ResizeObserver(() => {
  if (plot && holder.clientWidth && holder.clientWidth !== plot.width) plot.setSize({ width: holder.clientWidth, height: HEIGHT });
  else if (!plot && holder.clientWidth) draw();
}).observe(holder);

// -- files --------------------------------------------------------------------------------------------

function save(blob, ending) {
  const link = make('a', { href: URL.createObjectURL(blob), download: `${data.file}.${ending}` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveTable() {
  const cell = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const rows = [['curve', data.x_title, data.y_title, 'low', 'high']];
  data.lines.forEach((line) => line.x.forEach((x, index) => {
    rows.push([line.name, x, line.y[index], line.low?.[index] ?? '', line.high?.[index] ?? '']);
  }));
  save(new Blob([`${rows.map((row) => row.map(cell).join(',')).join('\n')}\n`], { type: 'text/csv' }), 'csv');
}

function savePicture() {
  const scale = devicePixelRatio || 1, chart = plot.ctx.canvas, row = 20 * scale, style = getComputedStyle(root);
  const lines = data.lines.filter((line) => !hidden.has(line.name));
  const canvas = make('canvas', { width: chart.width, height: chart.height + row * (lines.length + 2.5) });
  const context = canvas.getContext('2d');
  context.fillStyle = getComputedStyle(document.body).backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(chart, 0, 1.4 * row);
  context.font = `${13 * scale}px system-ui, sans-serif`;
  const write = (text, x, y) => { context.fillStyle = style.color; context.fillText(text, x, y); };
  write(data.y_title, row / 2, row);
  write(data.x_title, canvas.width / 2, chart.height + 2 * row);
  lines.forEach((line, index) => {
    const y = chart.height + row * (index + 3);
    context.fillStyle = line.colour;
    context.fillRect(row / 2, y - 5 * scale, row, 3 * scale);
    write(line.name, 2 * row, y);
  });
  canvas.toBlob((blob) => save(blob, 'png'), 'image/png');
}

watch('value', draw);
draw();
