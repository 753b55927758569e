const marks = () => [...element.querySelectorAll('.mark')];
const about = (mark) => { element.querySelector('.about').textContent = mark.title; };
const pick = (mark) => {
  element.querySelectorAll('.mark.chosen').forEach((other) => other.classList.remove('chosen'));
  element.querySelectorAll('.mark[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
  mark.classList.add('chosen');
  mark.tabIndex = 0;
  about(mark);
  trigger('pick', { index: Number(mark.dataset.index) });
};
element.addEventListener('click', (event) => {
  const mark = event.target.closest('.mark');
  if (mark) pick(mark);
});
element.addEventListener('focusin', (event) => {
  const mark = event.target.closest('.mark');
  if (mark) about(mark);
});
element.addEventListener('keydown', (event) => {
  const mark = event.target.closest('.mark');
  if (!mark) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); pick(mark); return; }
  const all = marks();
  const next = event.key === 'Home' ? all[0] : event.key === 'End' ? all.at(-1) : step && all[all.indexOf(mark) + step];
  if (!next) return;
  event.preventDefault();
  mark.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
