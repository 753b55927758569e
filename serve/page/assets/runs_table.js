// When rows change, a browser keeps a tick at its row number: put each one back at the name of its run.
let selected = new Set();
let sorted = { column: null, rising: true };
const boxes = () => [...element.querySelectorAll('input')];
const storeSelection = () => { selected = new Set(boxes().filter((box) => box.checked).map((box) => box.value)); };
const key = (row, column) => {
  const cell = row.children[column];
  const text = cell?.dataset.key ?? cell?.firstChild?.textContent ?? '';
  return text === 'None' ? null : text;
};
const compare = (one, other) => {
  const numbers = [Number(one), Number(other)];
  return numbers.some(Number.isNaN) ? one.localeCompare(other) : numbers[0] - numbers[1];
};
const sort = () => {
  const heads = [...element.querySelectorAll('thead th')];
  heads.forEach((head, column) => {
    const order = column === sorted.column ? (sorted.rising ? 'ascending' : 'descending') : 'none';
    if (head.hasAttribute('aria-sort')) head.setAttribute('aria-sort', order);
  });
  if (sorted.column === null) return;
  const body = element.querySelector('tbody');
  // Runs without a value come last in both orders.
  const rows = [...body.rows].map((row) => [key(row, sorted.column), row]);
  const withValue = rows.filter(([value]) => value !== null && value !== '');
  withValue.sort(([one], [other]) => (sorted.rising ? 1 : -1) * compare(one, other));
  body.append(...withValue.map(([, row]) => row), ...rows.filter(([value]) => value === null || value === '').map(([, row]) => row));
};
element.addEventListener('click', ({ target }) => {
  const head = target.closest?.('thead th');
  if (!head || !target.closest('button')) return;
  const column = [...head.parentNode.children].indexOf(head);
  sorted = { column, rising: sorted.column === column ? !sorted.rising : true };
  sort();
});
element.addEventListener('change', () => { storeSelection(); trigger('choose'); });
watch('value', () => {
  boxes().forEach((box) => { box.checked = selected.has(box.value); });
  storeSelection();
  sort();
});
