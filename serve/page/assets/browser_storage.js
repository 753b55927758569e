window.inklingStorage = (() => {
  const key = (name) => `inkling.${name}`;
  const read = (name) => {
    try { return JSON.parse(localStorage.getItem(key(name))); } catch { return null; }
  };
  const write = (name, value) => {
    try { localStorage.setItem(key(name), JSON.stringify(value)); } catch { /* full, or switched off */ }
  };
  // Before values are restored, a change only means that a component was created.
  let restored = false;
  document.addEventListener('input', ({ target }) => {
    const box = target.closest?.('.STORED');
    if (box && target.tagName === 'TEXTAREA') write(box.id, target.value);
  });
  let opened = false;
  return {
    chooseModels: (keys, offered, shown) => {
      // At first the stored choice; then what the picker shows, whatever other windows store.
      const wanted = opened ? shown : keys.map(read);
      opened = true;
      return wanted.map((name, index) => (offered.names.includes(name) ? name : offered.defaults[index]));
    },
    store: (name, value) => { if (restored) write(name, value); },
    restore: (names, values) => {
      restored = true;
      return names.map((name, index) => read(name) ?? values[index]);
    },
  };
})();
