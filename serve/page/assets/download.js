(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'text/plain' }));
  link.download = 'inkling.txt';
  link.click();
  URL.revokeObjectURL(link.href);
}
