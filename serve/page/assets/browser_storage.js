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
  // What each component shows, for a link to it.
  const shown = {};
  document.addEventListener('input', ({ target }) => {
    const box = target.closest?.('.STORED');
    if (box && target.tagName === 'TEXTAREA') write(box.id, (shown[box.id] = target.value));
  });
  const atOpening = (name, stored) => window.inklingShell?.atOpening(name, stored) ?? stored;
  let opened = false;
  return {
    value: (name) => shown[name],
    chooseModels: (keys, offered, picked) => {
      // At first the choice of the link or the stored one; then what the picker shows, whatever other windows store.
      const requested = opened ? picked : keys.map((key) => atOpening(key, read(key)));
      const selected = requested.map((name, index) => (offered.names.includes(name) ? name : offered.defaults[index]));
      keys.forEach((key, index) => {
        shown[key] = selected[index];
        if (!opened && atOpening(key, null) && requested[index] !== selected[index]) {
          window.inklingShell.missingModel(requested[index]);
        }
      });
      opened = true;
      return selected;
    },
    store: (name, value) => { if (restored) write(name, (shown[name] = value)); },
    restore: (names, values) => {
      restored = true;
      return names.map((name, index) => (shown[name] = atOpening(name, read(name)) ?? values[index]));
    },
  };
})();
