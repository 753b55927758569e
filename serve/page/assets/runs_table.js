// When rows change, a browser keeps a tick at its row number: put each one back at the name of its run.
let selected = new Set();
const boxes = () => [...element.querySelectorAll('input')];
const remember = () => { selected = new Set(boxes().filter((box) => box.checked).map((box) => box.value)); };
element.addEventListener('change', () => { remember(); trigger('choose'); });
watch('value', () => {
  boxes().forEach((box) => { box.checked = selected.has(box.value); });
  remember();
});
