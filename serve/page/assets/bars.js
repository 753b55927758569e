element.addEventListener('click', (event) => {
  const bar = event.target.closest('.bar');
  if (bar) trigger('pick', { token: Number(bar.dataset.token) });
});
